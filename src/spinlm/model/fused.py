"""A linear layer with its LoRA update as one operation: y = x·Wᵀ + b + (α/r) (x·Aᵀ)·Bᵀ (LoRA, arXiv 2106.09685).

PEFT's own layer adds the update in three more passes over an output-sized tensor, and autograd keeps a copy for each.
Here both products are added in place, forward and backward, and only x and x·Aᵀ are kept. The layers' parameters,
names and files stay PEFT's.

Shapes: L tokens, I inputs, O outputs, R rank.
"""

import contextlib
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spinlm.model.kernels import linear, pack

PACKED = "spinlm_packed"
"""Attribute of a layer that holds base and adapter as one packed weight, while there is decoding."""


def fuse_adapters(model: nn.Module) -> int:
    """Let the LoRA layers of a model compute as one operation; returns how many do.

    A layer stays as PEFT has it where its base is no plain linear layer, is trained itself, or is quantised.
    """
    from peft.tuners.lora import Linear
    from transformers.pytorch_utils import Conv1D

    fused = 0
    for layer in model.modules():
        if not isinstance(layer, Linear) or type(layer.base_layer) not in (nn.Linear, Conv1D):
            continue
        if (
            layer.lora_variant
            or layer.lora_bias.get("default")
            or any(p.requires_grad for p in layer.base_layer.parameters())
        ):
            continue
        layer.forward = MethodType(_forward, layer)  # type: ignore[method-assign]  # of this instance alone
        fused += 1
    return fused


@contextlib.contextmanager
def packed_adapters(model: nn.Module, rows: int) -> Iterator[None]:
    """Within the block, fused layers compute with base and adapter merged into one weight, packed for so many rows.

    That costs the memory of the merged weights, and is done in float32 on a CPU only: elsewhere nothing is gained, or
    too much would be lost to rounding. The base itself is not touched.
    """
    layers: list[Any] = [layer for layer in model.modules() if _is_fused(layer)]
    try:
        for layer in layers:
            weight = _merged(layer) if layer.base_layer.weight.dtype == torch.float32 else None
            packed = None if weight is None else pack(weight, rows)
            if packed is not None:
                vars(layer)[PACKED] = packed
        yield
    finally:
        for layer in layers:
            vars(layer).pop(PACKED, None)


def _is_fused(layer: nn.Module) -> bool:
    return getattr(vars(layer).get("forward"), "__func__", None) is _forward


def _merged(layer: Any) -> Tensor:
    weight = layer.base_layer.weight.detach()
    weight = weight.T if layer.fan_in_fan_out else weight  # [O, I]
    down, up = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    return torch.addmm(weight, up, down, alpha=float(layer.scaling["default"]))


def _forward(layer: Any, x: Tensor) -> Tensor:
    """What a fused layer computes: [..., I] → [..., O]."""
    if layer.disable_adapters or layer.merged:
        plain: Tensor = type(layer).forward(layer, x)
        return plain
    base, scale = layer.base_layer, float(layer.scaling["default"])
    down, up, dropout = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_dropout["default"]
    if PACKED in vars(layer):
        return linear(x.flatten(0, -2), vars(layer)[PACKED], base.bias).view(*x.shape[:-1], -1)
    weight = base.weight.T if layer.fan_in_fan_out else base.weight  # [O, I]
    dropped = dropout(x) if layer.training and not isinstance(dropout, nn.Identity) else None
    result: Tensor = _AdaptedLinear.apply(x, dropped, weight, base.bias, down, up, scale)
    return result


class _AdaptedLinear(torch.autograd.Function):
    """([..., I], [..., I]?, [O, I], [O]?, [R, I], [O, R], scale) → [..., O] in the precision of x.

    The second input is what the adapter sees, where dropout makes that differ from x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
    ) -> Tensor:
        seen = (x if dropped is None else dropped.to(x.dtype)).flatten(0, -2)  # [L, I]
        low = seen @ down.to(x.dtype).T  # [L, R]
        y = linear(x.flatten(0, -2), weight, None if bias is None else bias.to(x.dtype))  # [L, O]
        y.addmm_(low, up.to(x.dtype).T, alpha=scale)
        ctx.scale, ctx.apart = scale, dropped is not None
        ctx.save_for_backward(seen, low, weight, down, up)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        seen, low, weight, down, up = ctx.saved_tensors
        shape, kind = upstream.shape[:-1], upstream.dtype
        grad = upstream.flatten(0, -2)  # [L, O]
        grad_low = (grad @ up.to(kind)).mul_(ctx.scale)  # [L, R]
        # Of a thin product, the wide side last is the faster order.
        grad_up = (low.T @ grad).to(up.dtype).mul_(ctx.scale).T if ctx.needs_input_grad[5] else None
        grad_down = (grad_low.T @ seen).to(down.dtype) if ctx.needs_input_grad[4] else None
        grad_x = grad_dropped = None
        if ctx.needs_input_grad[0]:
            grad_x = linear(grad, weight.T)  # [L, I]
            if not ctx.apart:
                grad_x.addmm_(grad_low, down.to(kind))
            grad_x = grad_x.view(*shape, -1)
        if ctx.apart and ctx.needs_input_grad[1]:
            grad_dropped = (grad_low @ down.to(kind)).view(*shape, -1)
        return grad_x, grad_dropped, None, None, grad_down, grad_up, None
