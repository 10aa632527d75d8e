"""Matrix products with frozen weights, by the fastest library at hand.

For float32 on a CPU that is oneDNN: PyTorch's own choice, MKL, took 1.0 to 1.6 times as long at the shapes of a 135M
model on an AMD processor with AVX-512, and with a weight packed beforehand up to twice as long for the few rows of a
decoding step (`benchmarks/products.py` measures it). Nothing here can be differentiated.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear as plain_linear

_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias: [M, I], [O, I], [O]? → [M, O]. The weight may be one that `pack` returned."""
    if not _packs(x):
        return plain_linear(x, weight, bias)
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


def pack(weight: Tensor, rows: int) -> Tensor | None:
    """A copy of a weight [O, I] in the order that suits products with about so many rows; None where there is none."""
    if not _packs(weight):
        return None
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return packed


def _packs(tensor: Tensor) -> bool:
    return _ONEDNN is not None and tensor.device.type == "cpu" and tensor.dtype == torch.float32
