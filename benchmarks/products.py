"""Measure matrix products of SmolLM2-135M's shapes with PyTorch's default library and with oneDNN, on one thread.

python benchmarks/products.py
"""

import time
from collections.abc import Callable
from functools import partial

import torch

from spinlm.model.kernels import linear, prepack

SHAPES = ((576, 1536), (1536, 576), (576, 49152))  # inputs, outputs
ROWS = (32, 64, 192, 384)


def gflops_per_second(product: Callable[[torch.Tensor], object], weights: list[torch.Tensor], flops: float) -> float:
    """Measure the rate over many weights, so that no weight stays in the cache, as in a model."""
    for weight in weights[:2]:
        product(weight)
    start = time.perf_counter()
    for weight in weights:
        product(weight)
    return flops * len(weights) / (time.perf_counter() - start) / 1e9


def main() -> None:
    torch.set_num_threads(1)
    print("GFLOP/s of x · Wᵀ, one thread, float32: PyTorch's default / oneDNN / oneDNN with a prepacked weight.\n")
    print("| inputs × outputs | " + " | ".join(f"{rows} rows" for rows in ROWS) + " |")
    print("|---|" + "---|" * len(ROWS))
    for inputs, outputs in SHAPES:
        weights = [torch.randn(outputs, inputs) for _ in range(2 if outputs > 10_000 else 60)]
        cells = []
        for rows in ROWS:
            x, flops = torch.randn(rows, inputs), 2.0 * rows * inputs * outputs
            packed = [tensor for weight in weights if (tensor := prepack(weight, rows)) is not None] or weights
            methods = ((torch.nn.functional.linear, weights), (linear, weights), (linear, packed))
            rates = [gflops_per_second(partial(function, x), operands, flops) for function, operands in methods]
            cells.append(" / ".join(f"{rate:.0f}" for rate in rates))
        print(f"| {inputs} × {outputs} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
