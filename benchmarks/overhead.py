"""The share of a run's time that the model and the optimiser take, and what is left for everything else.

    python benchmarks/overhead.py [section.key=value ...]

Plays the quickstart in this process, with the overrides given or else a smaller one, and times the calls that compute:
forward and backward passes, the comparison of layouts, gradient norms and optimiser steps, merging and packing weights,
decoding steps and sampling.
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
    from accelerate import Accelerator

    from spinlm.generation import local
    from spinlm.model import fused, loading, players
    from spinlm.model.decoding import RaggedBatch
    from spinlm.model.logprobs import LogProbs
    from spinlm.recipe.load import load_recipe
    from spinlm.selfplay import run

    imported = time.perf_counter() - began
    spent: dict[str, float] = {}
    timing = False

    def timed(owner: Any, name: str, kind: str) -> None:
        inner = getattr(owner, name)

        def outer(*args: Any, **kwargs: Any) -> Any:
            nonlocal timing
            if timing:  # within another call that is timed
                return inner(*args, **kwargs)
            timing, start = True, time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                timing = False
                spent[kind] = spent.get(kind, 0.0) + time.perf_counter() - start

        setattr(owner, name, outer)

    timed(LogProbs, "forward", "forward")
    timed(Accelerator, "backward", "backward")
    timed(players, "max_logprob_error", "forward")
    timed(players, "checkpoint_if_needed", "forward")
    timed(Accelerator, "clip_grad_norm_", "optimiser")
    timed(torch.optim.AdamW, "step", "optimiser")
    timed(fused, "_merged_weight", "decoding")
    timed(fused, "prepack", "decoding")
    timed(RaggedBatch, "prefill", "decoding")
    timed(RaggedBatch, "step", "decoding")
    timed(local, "sample", "sampling")
    timed(loading, "_unpack_gguf", "unpacking the .gguf file, once in a run's life")
    timed(players, "load_model", "loading the model")
    with tempfile.TemporaryDirectory() as folder:
        run(load_recipe(RECIPE, sys.argv[1:] or SMALL), Path(folder) / "run")
    total = time.perf_counter() - began
    spent["importing"] = imported
    spent["everything else"] = total - sum(spent.values())
    print("| | seconds | share |\n|---|---|---|")
    for name, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"| {name} | {seconds:.1f} | {seconds / total:.1%} |")


if __name__ == "__main__":
    main()
