"""Measure how much of a run's time the model and the optimizer take, and how much is left for everything else.

    python benchmarks/overhead.py [section.key=value ...]

Runs the quickstart in this process, with the given overrides or else with a smaller size. Times the calls that compute:
forward and backward passes, the check of prefix sharing, gradient norms and optimizer steps, merging and prepacking
weights, decoding steps and sampling.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SMALL = ("data.prompts=24", "data.heldout=24", "sft.prompts=48", "sft.epochs=1", "selfplay.iterations=1")
RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"


def main() -> None:
    began = time.perf_counter()
    import torch

    from spinlm.generation import local
    from spinlm.model import base_model, fused, players
    from spinlm.model.decoding import RaggedBatch
    from spinlm.model.logprobs import LogProbs
    from spinlm.recipe.load import load_recipe
    from spinlm.selfplay import run
    from spinlm.training import trainer

    seconds = {"importing": time.perf_counter() - began}
    timing = False

    def time_calls(owner: Any, name: str, kind: str) -> None:
        inner = getattr(owner, name)

        def outer(*args: Any, **kwargs: Any) -> Any:
            nonlocal timing
            if timing:  # the enclosing call is timed already
                return inner(*args, **kwargs)
            timing, start = True, time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                timing = False
                seconds[kind] = seconds.get(kind, 0.0) + time.perf_counter() - start

        setattr(owner, name, outer)

    time_calls(LogProbs, "forward", "forward")
    time_calls(LogProbs, "logprobs_and_features", "forward")
    time_calls(torch.Tensor, "backward", "backward")
    time_calls(players, "max_logprob_error", "forward")
    time_calls(trainer, "set_activation_checkpointing", "forward")
    time_calls(torch.nn.utils, "clip_grad_norm_", "optimizer")
    time_calls(torch.optim.AdamW, "step", "optimizer")
    time_calls(fused, "_merged_weight", "decoding")
    time_calls(fused, "prepack", "decoding")
    time_calls(RaggedBatch, "prefill", "decoding")
    time_calls(RaggedBatch, "step", "decoding")
    time_calls(local, "sample", "sampling")
    time_calls(base_model, "_convert_gguf", "converting the .gguf file, once per run")
    time_calls(players, "load_model", "loading the model")
    with tempfile.TemporaryDirectory() as folder:
        run(load_recipe(RECIPE, sys.argv[1:] or SMALL), Path(folder) / "run")
    total = time.perf_counter() - began
    seconds["everything else"] = total - sum(seconds.values())
    print("| | seconds | share |\n|---|---|---|")
    for kind, value in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"| {kind} | {value:.1f} | {value / total:.1%} |")


if __name__ == "__main__":
    main()
