"""Count the floating-point operations of a training step and of scoring, and measure a machine's peak rate."""

import time
from collections.abc import Callable

from training import Shape as Workload

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


def flops(model: Shape, workload: Workload) -> tuple[float, float]:
    """Count the operations of a training step and of scoring the same pairs, without gradient checkpointing.

    Forward takes two operations per weight and token. Backward takes the same number for frozen weights, for the
    gradient of the input, and twice the number for the adapter. Attention counts visible pairs of tokens only.
    """
    trees = workload.pairs // workload.opponents
    branches = [workload.response] * (1 + workload.opponents)
    tokens = trees * (workload.prompt + sum(length - 1 for length in branches))
    linear = sum(inputs * outputs for _, inputs, outputs in model.linears)
    adapter = workload.rank * sum(inputs + outputs for _, inputs, outputs in model.linears)
    visible = workload.prompt**2 / 2 + sum(length * (workload.prompt + length / 2) for length in branches)
    attention = 4 * model.heads * model.head_dim * visible * trees * model.layers
    forward = 2 * tokens * model.layers * (linear + adapter) + attention
    backward = 2 * tokens * model.layers * (linear + 2 * adapter) + 2 * attention
    head = 2 * trees * sum(branches) * model.hidden * model.vocab
    return forward + backward + 2 * head, forward + head


def peak_gflops(dtype: str, device: str = "cpu", threads: int = 1) -> float:
    """Measure the best rate of a large matrix product, with PyTorch and with `kernels.linear`, in GFLOP/s."""
    import torch

    from spinlm.model.kernels import linear

    torch.set_num_threads(threads)
    size = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, dtype=getattr(torch, dtype), device=device) for _ in range(2))
    products: tuple[Callable[[], object], ...] = (lambda: a @ b, lambda: linear(a, b))
    best = 0.0
    for product in products * 6:
        start = time.perf_counter()
        product()
        if device != "cpu":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - start) / 1e9)
    return best
