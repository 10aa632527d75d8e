"""Training, scoring and generation at the shape of a 7B model on one GPU, with random weights.

    python benchmarks/gpu.py [--model 7b] [--budget 6144] [--prompt 512] [--response 256] [--opponents 2] [--rank 64]

Prints seconds, pairs per second, the share of the measured matmul peak (model FLOPs utilisation: operations counted
without those that checkpointing repeats), peak memory, and the hours that the paper's four iterations would take at
these rates and lengths. `--model tiny` runs on a CPU, to try the script.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

from flops import flops, peak
from training import Shape as Work

CONFIGS: dict[str, dict[str, Any]] = {
    "7b": {  # Mistral-7B, and so Zephyr
        "model_type": "mistral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "model_type": "mistral",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
}
PROMPTS, EPOCHS, PLAYED = 50_000, 2, (1, 2, 2, 2)  # the paper's; synthetic responses in use in each iteration


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, default="7b")
    parser.add_argument("--budget", type=int, default=6144, help="tokens in a micro-batch")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--response", type=int, default=256)
    parser.add_argument("--opponents", type=int, default=2)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rows", type=int, default=128, help="responses generated at once")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--checkpointed", action="store_true")
    parser.add_argument(
        "--pieces", action="store_true", help="plain attention, piece by piece, in place of FlexAttention"
    )
    print(json.dumps(measure(**vars(parser.parse_args())), indent=1))


def measure(
    model: str,
    budget: int,
    prompt: int,
    response: int,
    opponents: int,
    rank: int,
    rows: int,
    steps: int,
    checkpointed: bool,
    pieces: bool,
) -> dict[str, Any]:
    import torch

    from spinlm.generation.base import Sampling
    from spinlm.generation.local import LocalEngine
    from spinlm.model.attention import register_tree_attention
    from spinlm.model.prefix_trees import PrefixTree, pack_batch
    from spinlm.plan.model_shape import shape_from_config
    from spinlm.recipe.schema import Lora
    from spinlm.training.activation_checkpointing import saved_activation_bytes, switch_checkpointing

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    register_tree_attention()
    player = _player(CONFIGS[model], Lora(r=rank, alpha=2 * rank), device, dtype, pieces)
    if checkpointed:
        switch_checkpointing(player.causal_lm, on=True)
    length = prompt + (1 + opponents) * response
    trees = max(1, budget // length)
    work = Work(prompt, response, opponents, trees * opponents, rank=rank)
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(3, CONFIGS[model]["vocab_size"], (count,), generator=generator).tolist()

    batch = [PrefixTree(ids(prompt), tuple(ids(response) for _ in range(1 + opponents))) for _ in range(trees)]
    layout = pack_batch(batch, True).to(device)

    def step() -> None:
        player.train()
        player(layout).sum().backward()
        player.zero_grad()

    def score() -> None:
        player.eval()
        with torch.no_grad():
            player(layout)

    engine = LocalEngine(player, rows, True)
    prompts = [ids(prompt) for _ in range(rows)]

    def generate() -> None:
        engine.generate(prompts, Sampling(1.0, 1.0, response, prompt + response, 1, ()), 0, lambda *_: None)

    seconds = {
        name: _median(run, count, device)
        for name, run, count in (("step", step, steps), ("reference_logprobs", score, steps))
    }
    memory = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
    seconds["generate"] = _median(generate, 1, device)
    shape = shape_from_config(CONFIGS[model])
    step_flops, score_flops = flops(shape, work)
    rate = 1e9 * peak(str(dtype).split(".")[1], device.type, torch.get_num_threads())
    token = (prompt + 3 * response, prompt + 2 * response)  # of a tree with two synthetic responses, and with one
    per_token = {name: seconds[name] / (trees * length) for name in ("step", "reference_logprobs")}
    hours = sum(
        PROMPTS * seconds["generate"] / rows
        + PROMPTS * token[0 if used == 2 else 1] * (EPOCHS * per_token["step"] + per_token["reference_logprobs"])
        for used in PLAYED
    )
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "flex_attention": player.uses_flex_attention(device),
        "tokens_in_a_micro_batch": trees * length,
        "seconds": seconds,
        "pairs_per_second_over_two_epochs": work.pairs / (EPOCHS * seconds["step"] + seconds["reference_logprobs"]),
        "generated_tokens_per_second": rows * response / seconds["generate"],
        "matmul_peak_tflops": rate / 1e12,
        "utilisation_step": step_flops / seconds["step"] / rate,
        "utilisation_score": score_flops / seconds["reference_logprobs"] / rate,
        "peak_gigabytes": memory,
        "kept_kilobytes_per_token": saved_activation_bytes(player, True, length) / 1e3,
        "planned_kilobytes_per_token": shape.activation_bytes(
            dtype.itemsize, length, Lora(r=rank), checkpointing=checkpointed
        )
        / 1e3,
        "hours_of_the_papers_four_iterations": hours / 3600,
    }


def _player(config: dict[str, Any], lora: Any, device: Any, dtype: Any, pieces: bool) -> Any:
    """A random model with an adapter, made where it will compute."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from spinlm.model.fused import fuse_layers
    from spinlm.model.loading import add_adapter
    from spinlm.model.logprobs import LogProbs

    settings = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]](**settings), dtype=dtype)
    adapted = add_adapter(model, lora, 0)
    fuse_layers(adapted)

    class Pieces(LogProbs):
        def uses_flex_attention(self, device: Any) -> bool:
            return False

    return (Pieces if pieces else LogProbs)(adapted.to(device))


def _median(run: Callable[[], None], count: int, device: Any) -> float:
    """Median seconds of some runs, after one that is not counted."""
    import torch

    found = []
    for _ in range(count + 1):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return sorted(found[1:])[(len(found) - 1) // 2]


if __name__ == "__main__":
    main()
