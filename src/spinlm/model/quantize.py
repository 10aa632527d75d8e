"""Frozen weights in 4 bits (QLoRA, arXiv 2305.14314): NF4 with double quantization, by bitsandbytes.

Each product dequantizes the weight, forward and again backward; the dequantized weight is never kept. The layers of
bitsandbytes do the same, except on CPUs with AVX-512 BF16. There they compute in bfloat16 outside of training and
convert their weights in place, so the model that scores would differ from the model that is trained.

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


def check_4bit_support() -> None:
    """Quantize and dequantize a small weight on this machine's device.

    Raises:
        MissingPackageError: bitsandbytes is not installed.
        ModelError: bitsandbytes does not support this device.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingPackageError(
            "model.load_in_4bit: bitsandbytes is not installed. Run: pip install 'spinlm[bitsandbytes]'"
        )
    # bitsandbytes warns that a CPU kernel cannot be downloaded; spinlm does not use that kernel.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes

    device = "cuda" if torch.cuda.is_available() else "cpu"
    version = f"bitsandbytes {bitsandbytes.__version__}"
    weight = torch.linspace(-1, 1, 128, device=device).view(2, 64)
    try:
        packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        error = (bitsandbytes.functional.dequantize_4bit(packed, state) - weight).abs().max().item()
    except (RuntimeError, NotImplementedError, AttributeError, ValueError) as failure:  # each device raises its own
        raise ModelError(
            f"model.load_in_4bit: {version} does not work on this machine's {device}: {failure}. "
            "Upgrade bitsandbytes, or set model.load_in_4bit: false"
        ) from failure
    if not error < 0.2:  # half of the widest NF4 step is 0.15
        raise ModelError(
            f"model.load_in_4bit: {version} dequantizes to wrong values on this machine's {device}. "
            "Upgrade bitsandbytes, or set model.load_in_4bit: false"
        )


def bnb_config(dtype: torch.dtype) -> Any:
    """Return the `BitsAndBytesConfig` to load a model in NF4 and compute in `dtype`."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def patch_4bit_layers(model: nn.Module) -> None:
    """Replace the forward of every 4-bit layer with `linear_4bit` and its gradient."""
    for layer in model.modules():
        if is_4bit(layer):
            layer.forward = MethodType(_forward, layer)


def is_4bit(layer: Any) -> bool:
    """Return whether the layer itself holds a 4-bit weight. False for a LoRA layer, whose `weight` is its base's."""
    return isinstance(layer, nn.Module) and hasattr(layer._parameters.get("weight"), "quant_state")


def count_parameters(parameters: Iterable[Tensor]) -> int:
    """Count the elements of parameters. A 4-bit parameter stores two elements per byte."""
    return sum(p.quant_state.shape.numel() if hasattr(p, "quant_state") else p.numel() for p in parameters)


def dequantize(layer: Any) -> Tensor:
    """Return the weight of a 4-bit layer in its compute precision: [O, I]."""
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight


def linear_4bit(layer: Any, x: Tensor) -> Tensor:
    """Compute a 4-bit layer outside of autograd: [L, I] → [L, O]."""
    if x.is_cuda:  # for few rows, the CUDA kernels read 4 bits per weight instead of 16
        y: Tensor = type(layer).forward(layer, x)
        return y
    return linear(x, dequantize(layer), None if layer.bias is None else layer.bias.to(x.dtype))


def _forward(layer: Any, x: Tensor) -> Tensor:
    result: Tensor = _Linear4bit.apply(x, layer)
    return result


class _Linear4bit(torch.autograd.Function):
    """A 4-bit layer without an adapter: ([..., I], layer) → [..., O]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        return linear_4bit(layer, x.flatten(0, -2)).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = linear(grad_y.flatten(0, -2), dequantize(ctx.layer).T)
        return grad_x.view(*grad_y.shape[:-1], -1), None
