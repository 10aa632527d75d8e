"""Floating-point operations of a training step and of scoring, counted, and the rate a machine can reach."""

import time
from collections.abc import Callable

from training import Shape as Work

from spinlm.plan.model_shape import Shape, shape_from_config

SMOLLM2 = shape_from_config(
    {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    }
)


def flops(model: Shape, work: Work) -> tuple[float, float]:
    """Operations of a step and of the scoring pass of the same pairs, without gradient checkpointing.

    Two for every weight and token, forward; with frozen weights backward has one product of the same size (towards the
    input), and for the adapter two. Attention counts what a causal tree needs.
    """
    trees = work.pairs // work.opponents
    branches = [work.response] * (1 + work.opponents)
    tokens = trees * (work.prompt + sum(length - 1 for length in branches))
    linear = sum(inputs * outputs for _, inputs, outputs in model.linears)
    adapter = work.rank * sum(inputs + outputs for _, inputs, outputs in model.linears)
    seen = work.prompt**2 / 2 + sum(length * (work.prompt + length / 2) for length in branches)
    attention = 4 * model.heads * model.head_dim * seen * trees * model.layers
    forward = 2 * tokens * model.layers * (linear + adapter) + attention
    backward = 2 * tokens * model.layers * (linear + 2 * adapter) + 2 * attention
    head = 2 * trees * sum(branches) * model.hidden * model.vocab
    return forward + backward + 2 * head, forward + head


def peak(dtype: str, device: str = "cpu", threads: int = 1) -> float:
    """The best rate of a large matrix product here and now, in GFLOP/s, by either library."""
    import torch

    from spinlm.model.kernels import linear

    torch.set_num_threads(threads)
    size = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, dtype=getattr(torch, dtype), device=device) for _ in range(2))
    ways: tuple[Callable[[], object], ...] = (lambda: a @ b, lambda: linear(a, b))
    best = 0.0
    for way in ways:
        for _ in range(6):
            began = time.perf_counter()
            way()
            if device != "cpu":
                torch.cuda.synchronize()
            best = max(best, 2 * size**3 / (time.perf_counter() - began) / 1e9)
    return best
