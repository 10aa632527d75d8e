"""Matrix products outside of autograd.

For float32 on a CPU the products call oneDNN instead of PyTorch's default, MKL. With the shapes of a 135M model on an
AMD processor with AVX-512, MKL took 1.0 to 1.6 times as long as oneDNN. For the few rows of a decoding step, MKL took
up to twice as long as oneDNN with a prepacked weight. `benchmarks/products.py` measures all three.

Shapes: M rows, I inputs, O outputs, R rank.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

ROW_BLOCK = 64
"""Products with more rows than this are padded to a multiple of it. oneDNN compiles and caches code for every number of
rows. Without padding, each micro-batch would cost a millisecond and hundreds of kilobytes per layer."""

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x · weightᵀ + bias: [M, I], [O, I], [O] or None → [M, O]. `weight` may be a result of `prepack`."""
    if not _uses_onednn(x):
        return F.linear(x, weight, bias)
    rows = len(x)
    if rows > ROW_BLOCK and rows % ROW_BLOCK:
        x = F.pad(x, (0, 0, 0, -rows % ROW_BLOCK))
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result[:rows]


def matmul_tn(left: Tensor, right: Tensor) -> Tensor:
    """Compute leftᵀ · right: [M, R], [M, I] → [R, I]. For R < I this is faster than (rightᵀ · left)ᵀ."""
    # M is the inner dimension, which `linear` does not pad: oneDNN would compile code for every M.
    return linear(left.T, right.T) if len(left) % ROW_BLOCK == 0 else left.T @ right


def prepack(weight: Tensor, rows: int) -> Tensor | None:
    """Copy a weight [O, I] into oneDNN's layout for products with about `rows` rows; None if oneDNN is not used."""
    if not _uses_onednn(weight):
        return None
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return packed


def _uses_onednn(tensor: Tensor) -> bool:
    return _ONEDNN and tensor.device.type == "cpu" and tensor.dtype == torch.float32
