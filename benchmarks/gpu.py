"""Measure training, scoring and generation with a randomly initialized 7B model on one GPU.

    python benchmarks/gpu.py [--model 7b] [--budget 6144] [--prompt 512] [--response 256] [--opponents 2] [--rank 64]

Prints seconds, pairs per second, model FLOPs utilization (without the operations that checkpointing repeats, relative
to the measured matmul peak), peak memory, and the hours that the paper's four iterations would take at these rates and
lengths. `--model tiny` tries the script on a CPU.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from flops import flops, peak_gflops
from training import Shape as Workload
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from spinlm.generation.base import Sampling
from spinlm.generation.local import LocalEngine
from spinlm.model.attention import register_tree_attention
from spinlm.model.fused import fuse_layers
from spinlm.model.loading import add_adapter
from spinlm.model.logprobs import LogProbs
from spinlm.model.prefix_trees import PrefixTree, pack_batch
from spinlm.plan.model_shape import shape_from_config
from spinlm.recipe.model import Lora
from spinlm.training.activation_checkpointing import saved_activation_bytes, switch_activation_checkpointing

CONFIGS: dict[str, dict[str, Any]] = {
    "7b": {  # Mistral-7B, the base of Zephyr
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
PROMPTS, EPOCHS = 50_000, 2  # the paper's
SYNTHETIC = (1, 2, 2, 2)  # synthetic responses per prompt in each of the paper's iterations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, default="7b")
    parser.add_argument("--budget", type=int, default=6144, help="tokens in a micro-batch")
    parser.add_argument("--prompt", type=int, default=512, help="tokens in a prompt")
    parser.add_argument("--response", type=int, default=256, help="tokens in a response")
    parser.add_argument("--opponents", type=int, default=2, help="synthetic responses per prompt")
    parser.add_argument("--rank", type=int, default=64, help="rank of the adapter")
    parser.add_argument("--rows", type=int, default=128, help="responses generated at once")
    parser.add_argument("--steps", type=int, default=5, help="steps to measure")
    parser.add_argument("--checkpointing", action="store_true", help="use gradient checkpointing")
    parser.add_argument("--no-flex", action="store_true", help="compute attention in segments, without FlexAttention")
    print(json.dumps(measure(parser.parse_args()), indent=1))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = random_model(CONFIGS[args.model], Lora(r=args.rank, alpha=2 * args.rank), device, dtype, not args.no_flex)
    if args.checkpointing:
        switch_activation_checkpointing(model.causal_lm, on=True)
    tree_tokens = args.prompt + (1 + args.opponents) * args.response
    trees = max(1, args.budget // tree_tokens)
    seconds, peak_memory = measure_steps(model, args, trees, device)
    shape = shape_from_config(CONFIGS[args.model])
    workload = Workload(args.prompt, args.response, args.opponents, trees * args.opponents, rank=args.rank)
    step_flops, score_flops = flops(shape, workload)
    peak = 1e9 * peak_gflops(str(dtype).split(".")[1], device.type, torch.get_num_threads())
    planned = shape.activation_bytes(dtype.itemsize, tree_tokens, Lora(r=args.rank), checkpointing=args.checkpointing)
    per_token = (EPOCHS * seconds["step"] + seconds["score"]) / (trees * tree_tokens)
    total = sum(
        PROMPTS * (seconds["generate"] / args.rows + (args.prompt + (1 + synthetic) * args.response) * per_token)
        for synthetic in SYNTHETIC
    )
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "flex_attention": model.uses_flex_attention(device),
        "micro_batch_tokens": trees * tree_tokens,
        "seconds": seconds,
        "pairs_per_second_over_two_epochs": workload.pairs / (EPOCHS * seconds["step"] + seconds["score"]),
        "generated_tokens_per_second": args.rows * args.response / seconds["generate"],
        "matmul_peak_tflops": peak / 1e12,
        "step_utilization": step_flops / seconds["step"] / peak,
        "score_utilization": score_flops / seconds["score"] / peak,
        "peak_memory_gb": peak_memory,
        "saved_kb_per_token": saved_activation_bytes(model, True, tree_tokens) / 1e3,
        "planned_kb_per_token": planned / 1e3,
        "hours_of_the_papers_iterations": total / 3600,
    }


def measure_steps(
    model: LogProbs, args: argparse.Namespace, trees: int, device: torch.device
) -> tuple[dict[str, float], float | None]:
    """Measure the seconds of a training step, of scoring the same pairs, and of generating `args.rows` responses.

    Returns:
        The seconds, and the peak memory of step and scoring in GB; None on a CPU.
    """
    vocabulary = CONFIGS[args.model]["vocab_size"]
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(3, vocabulary, (count,), generator=generator).tolist()

    responses = range(1 + args.opponents)
    prefix_trees = [PrefixTree(ids(args.prompt), tuple(ids(args.response) for _ in responses)) for _ in range(trees)]
    batch = pack_batch(prefix_trees, prefix_sharing=True).to(device)
    engine = LocalEngine(model, args.rows, prefix_sharing=True)
    prompts = [ids(args.prompt) for _ in range(args.rows)]
    sampling = Sampling(1.0, 1.0, args.response, args.prompt + args.response, samples=1, stop_ids=())

    def step() -> None:
        model.train()
        model(batch).sum().backward()
        model.zero_grad()

    def score() -> None:
        model.eval()
        with torch.no_grad():
            model(batch)

    def generate() -> None:
        engine.generate(prompts, sampling, 0, lambda *_: None)

    seconds = {
        name: median_seconds(function, args.steps, device) for name, function in (("step", step), ("score", score))
    }
    peak_memory = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
    return seconds | {"generate": median_seconds(generate, 1, device)}, peak_memory


def random_model(
    config: dict[str, Any], lora: Lora, device: torch.device, dtype: torch.dtype, use_flex: bool
) -> LogProbs:
    """Make a random model with an adapter on the device."""
    register_tree_attention()
    values = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]](**values), dtype=dtype)
    adapted = add_adapter(model, lora, 0)
    fuse_layers(adapted)

    class WithoutFlex(LogProbs):
        def uses_flex_attention(self, device: torch.device) -> bool:
            return False

    return (LogProbs if use_flex else WithoutFlex)(adapted.to(device))


def median_seconds(function: Callable[[], None], count: int, device: torch.device) -> float:
    """Return the median time of `count` calls after a warm-up call."""
    seconds = []
    for _ in range(count + 1):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[1:])[(count - 1) // 2]


if __name__ == "__main__":
    main()
