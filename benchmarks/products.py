"""Matrix products by PyTorch's own choice of library and by oneDNN, at the shapes of SmolLM2-135M, one thread, float32.

python benchmarks/products.py
"""

import time
from collections.abc import Callable
from functools import partial

import torch

from spinlm.model.kernels import linear, prepack

SHAPES = ((576, 1536), (1536, 576), (576, 49152))  # inputs, outputs
ROWS = (32, 64, 192, 384)


def rate(product: Callable[[torch.Tensor], object], weights: list[torch.Tensor], flops: float) -> float:
    """GFLOP/s over many different weights, so that none stays in the cache, as in a model."""
    for weight in weights[:2]:
        product(weight)
    began = time.perf_counter()
    for weight in weights:
        product(weight)
    return flops * len(weights) / (time.perf_counter() - began) / 1e9


def main() -> None:
    torch.set_num_threads(1)
    print("GFLOP/s of x · Wᵀ, one thread, float32: PyTorch's own choice, oneDNN, oneDNN with the weight packed.\n")
    print("| inputs × outputs | " + " | ".join(f"{rows} rows" for rows in ROWS) + " |")
    print("|---|" + "---|" * len(ROWS))
    for inputs, outputs in SHAPES:
        count = 2 if outputs > 10_000 else 60
        weights = [torch.randn(outputs, inputs) for _ in range(count)]
        cells = []
        for rows in ROWS:
            x, flops = torch.randn(rows, inputs), 2.0 * rows * inputs * outputs
            packed = [one for one in (prepack(weight, rows) for weight in weights) if one is not None]
            ways = [(torch.nn.functional.linear, weights), (linear, weights), (linear, packed or weights)]
            found = [rate(partial(how, x), given, flops) for how, given in ways]
            cells.append(" / ".join(f"{one:.0f}" for one in found))
        print(f"| {inputs} × {outputs} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
