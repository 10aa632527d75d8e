"""Matrix products that autograd does not see.

For float32 on a CPU that is oneDNN: PyTorch's own choice, MKL, took 1.0 to 1.6 times as long at the shapes of a 135M
model on an AMD processor with AVX-512, and with a weight packed beforehand up to twice as long for the few rows of a
decoding step (`benchmarks/products.py` measures it).
"""

import torch
from torch import Tensor
from torch.nn.functional import linear as plain_linear
from torch.nn.functional import pad as pad_rows

BLOCK = 64
"""More rows than this are padded to a multiple of it. oneDNN makes, and keeps, code for every number of rows it meets:
without padding each micro-batch would cost a millisecond and hundreds of kilobytes for every layer."""

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias: [M, I], [O, I], [O]? → [M, O]. The weight may be one that `pack` returned."""
    if not _packs(x):
        return plain_linear(x, weight, bias)
    rows = len(x)
    if rows > BLOCK and rows % BLOCK:
        x = pad_rows(x, (0, 0, 0, -rows % BLOCK))
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result[:rows]


def tall(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ · right, over many rows: [M, R], [M, I] → [R, I]. With a small R this is the faster order of the two."""
    whole_blocks = len(left) % BLOCK == 0  # else there would be code for every M again
    return linear(left.T, right.T) if whole_blocks else left.T @ right


def pack(weight: Tensor, rows: int) -> Tensor | None:
    """A copy of a weight [O, I] in the order that suits products with about so many rows; None where there is none."""
    if not _packs(weight):
        return None
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return packed


def _packs(tensor: Tensor) -> bool:
    return _ONEDNN and tensor.device.type == "cpu" and tensor.dtype == torch.float32
