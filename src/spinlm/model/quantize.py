"""A frozen base in 4 bits (QLoRA, arXiv 2305.14314): NF4, its scales quantised once more, by bitsandbytes.

A layer's weight is unpacked for its product, and again for the product's gradient; it is never kept. bitsandbytes' own
layers do the same, but not on CPUs with AVX-512 BF16: there they compute in bfloat16 outside of training, and change
their weights in place to do so. The model that scores would be another than the one that is trained.

Shapes: L tokens, I inputs, O outputs.
"""

import importlib.util
import logging
from collections.abc import Iterable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spinlm.errors import MissingPackageError, ModelError
from spinlm.model.kernels import linear


def check_quantization() -> None:
    """Make sure that this machine can compute with weights in 4 bits, by trying it.

    Raises:
        MissingPackageError: bitsandbytes is not installed.
        ModelError: it has nothing for this machine.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingPackageError(
            "model.load_in_4bit needs a package that is not installed. Run: pip install 'spinlm[bitsandbytes]'"
        )
    # It tells of a kernel that it would like to download and that is not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.linspace(-1, 1, 128, device=device).view(2, 64)
    try:
        packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        error = (bitsandbytes.functional.dequantize_4bit(packed, state) - weight).abs().max().item()
    except (RuntimeError, NotImplementedError, AttributeError, ValueError) as failure:  # each device has its own
        raise ModelError(
            f"model.load_in_4bit: bitsandbytes {bitsandbytes.__version__} cannot compute in 4 bits on this machine's "
            f"{device}: {failure}. Upgrade it, or leave model.load_in_4bit out"
        ) from failure
    if not error < 0.2:  # half of the widest step is 0.15
        raise ModelError(
            f"model.load_in_4bit: on this machine's {device}, bitsandbytes {bitsandbytes.__version__} does not give "
            "back the weights that it was given. Upgrade it, or leave model.load_in_4bit out"
        )


def bnb_config(dtype: torch.dtype) -> Any:
    """What transformers is to be told, to quantise while it loads and to compute in a precision."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def patch_4bit_layers(model: nn.Module) -> None:
    """Let every quantised layer compute as `product` does."""
    for layer in model.modules():
        if is_quantised(layer):
            layer.forward = MethodType(_forward, layer)


def is_quantised(layer: Any) -> bool:
    """Whether a layer's own weight is in 4 bits. A LoRA layer shows its base's as if it were its own."""
    return isinstance(layer, nn.Module) and hasattr(layer._parameters.get("weight"), "quant_state")


def count(parameters: Iterable[Tensor]) -> int:
    """How many numbers parameters stand for: those in 4 bits are stored two in a byte."""
    return sum(one.quant_state.shape.numel() if hasattr(one, "quant_state") else one.numel() for one in parameters)


def unpack(layer: Any) -> Tensor:
    """The weight of a quantised layer in the precision to compute in: [O, I]."""
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight


def product(layer: Any, x: Tensor) -> Tensor:
    """What a quantised layer computes, outside of autograd: [L, I] → [L, O]."""
    if x.is_cuda:  # has kernels for few rows, which read 4 bits instead of 16
        y: Tensor = type(layer).forward(layer, x)
        return y
    return linear(x, unpack(layer), None if layer.bias is None else layer.bias.to(x.dtype))


def _forward(layer: Any, x: Tensor) -> Tensor:
    result: Tensor = _QuantisedLinear.apply(x, layer)
    return result


class _QuantisedLinear(torch.autograd.Function):
    """([..., I], layer) → [..., O], for a layer without an adapter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        return product(layer, x.flatten(0, -2)).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad = linear(upstream.flatten(0, -2), unpack(ctx.layer).T)
        return grad.view(*upstream.shape[:-1], -1), None
