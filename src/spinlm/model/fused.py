"""Layers that compute as one operation what would be many: LoRA layers, gated MLPs and RMS norms.

A linear layer with its LoRA update is y = x·Wᵀ + b + (α/r) (x·Aᵀ)·Bᵀ (LoRA, arXiv 2106.09685). PEFT's own layer adds
the update in three more passes over an output-sized tensor, and autograd keeps a copy for each. Here both products are
added in place, forward and backward, and only x and x·Aᵀ are kept. A gated MLP's inner act(g) ⊙ u is not kept but
formed again from g and u, and a base in 4 bits is unpacked anew. The layers' parameters, names and files stay as they
are.

Shapes: L tokens, D hidden size, I inputs, O outputs, R rank.
"""

import contextlib
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spinlm.model.kernels import linear, pack, tall
from spinlm.model.quantize import is_quantised, product, unpack

PACKED = "spinlm_packed"
"""Attribute of a layer that holds base and adapter as one packed weight, while there is decoding."""


def fuse(model: nn.Module) -> int:
    """Let layers compute as one operation each, where they can; returns how many do.

    A LoRA layer stays as PEFT has it where its base is no linear layer, plain or in 4 bits, or is trained itself. A
    gated MLP needs LoRA layers of that kind, and a norm a frozen float32 weight; both stay as they are where ours gives
    something else for random inputs, since only the names of their parts say what they are.
    """
    layers: list[Any] = list(model.modules())
    adapters = [layer for layer in layers if _is_plain_adapter(layer)]
    for layer in adapters:
        _replace(layer, _adapted)
    norms = [one for one in layers if _is_norm(one) and _try(one, _normed, one.weight)]
    gated = [one for one in layers if _is_gated(one) and _try(one, _gated, _weight(one.gate_proj))]
    return len(adapters) + len(norms) + len(gated)


@contextlib.contextmanager
def packed_adapters(model: nn.Module, rows: int) -> Iterator[None]:
    """Within the block, fused LoRA layers have base and adapter merged into one weight, packed for so many rows.

    That costs the memory of the merged weights, and is done in float32 on a CPU only: elsewhere nothing is gained, or
    too much would be lost to rounding. A base in 4 bits is there to save that memory, and stays as it is. The base
    itself is not touched.
    """
    layers: list[Any] = [layer for layer in model.modules() if _computes(layer, _adapted)]
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


def _replace(layer: Any, forward: Callable[..., Tensor]) -> None:
    layer.forward = MethodType(forward, layer)  # of this instance alone


def _computes(layer: Any, forward: Callable[..., Tensor]) -> bool:
    return getattr(vars(layer).get("forward"), "__func__", None) is forward


@torch.no_grad()
def _try(layer: Any, forward: Callable[..., Tensor], like: Tensor) -> bool:
    """Replace a layer's computation if ours gives the same for random inputs [3, D], where `like` is [D] or [I, D]."""
    x = torch.randn(3, like.shape[-1], generator=torch.Generator().manual_seed(0)).to(like)
    modes = [(module, module.training) for module in layer.modules()]
    layer.eval()  # without dropout
    try:
        ours, theirs = forward(layer, x), layer(x)
    except (TypeError, ValueError, RuntimeError):  # other arguments or shapes than its parts' names say
        return False
    finally:
        for module, training in modes:
            module.training = training
    if not torch.allclose(ours, theirs, rtol=1e-4 if like.dtype == torch.float32 else 1e-2, atol=1e-5):
        return False
    _replace(layer, forward)
    return True


def _is_plain_adapter(layer: Any) -> bool:
    from peft.tuners.lora import Linear, LoraLayer
    from transformers.pytorch_utils import Conv1D

    if not isinstance(layer, LoraLayer):
        return False
    plain = isinstance(layer, Linear) and type(layer.base_layer) in (nn.Linear, Conv1D)
    return (
        (plain or is_quantised(layer.base_layer))
        and not layer.lora_variant
        and not layer.lora_bias.get("default")
        and not any(parameter.requires_grad for parameter in layer.base_layer.parameters())
    )


def _merged(layer: Any) -> Tensor:
    down, up = (weight.detach() for weight in _adapter(layer))
    return torch.addmm(_weight(layer).detach(), up, down, alpha=_scale(layer))


def _adapted(layer: Any, x: Tensor) -> Tensor:
    """What a fused LoRA layer computes: [..., I] → [..., O]."""
    if layer.disable_adapters or layer.merged:
        plain: Tensor = type(layer).forward(layer, x)
        return plain
    base, dropout = layer.base_layer, layer.lora_dropout["default"]
    if PACKED in vars(layer):
        return linear(x.flatten(0, -2), vars(layer)[PACKED], base.bias).view(*x.shape[:-1], -1)
    dropped = dropout(x) if layer.training and not isinstance(dropout, nn.Identity) else None
    result: Tensor = _AdaptedLinear.apply(x, dropped, layer, *_adapter(layer))
    return result


def _weight(layer: Any) -> Tensor:
    """W of a LoRA layer: [O, I]."""
    base = layer.base_layer
    if is_quantised(base):
        return unpack(base)
    weight: Tensor = base.weight.T if layer.fan_in_fan_out else base.weight
    return weight


def _adapter(layer: Any) -> tuple[Tensor, Tensor]:
    """A [R, I] and B [O, R]."""
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def _scale(layer: Any) -> float:
    """α/r."""
    return float(layer.scaling["default"])


class _AdaptedLinear(torch.autograd.Function):
    """([..., I], [..., I]?, layer, [R, I], [O, R]) → [..., O] in the precision of x.

    The second input is what the adapter sees, where dropout makes that differ from x. The layer's frozen weight is
    asked for when it is needed, since it may have to be unpacked.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        layer: Any,
        down: Tensor,
        up: Tensor,
    ) -> Tensor:
        seen = (x if dropped is None else dropped.to(x.dtype)).flatten(0, -2)  # [L, I]
        y, low = _product(x.flatten(0, -2), seen, layer, down, up)
        ctx.layer, ctx.apart = layer, dropped is not None
        ctx.save_for_backward(seen, low, down, up)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        seen, low, down, up = ctx.saved_tensors
        shape, grad = upstream.shape[:-1], upstream.flatten(0, -2)  # [L, O]
        grad_low, grad_down, grad_up = _adapter_gradients(grad, seen, low, down, up, _scale(ctx.layer))
        grad_x = grad_dropped = None
        if ctx.needs_input_grad[0]:
            grad_x = linear(grad, _weight(ctx.layer).T)  # [L, I]
            if not ctx.apart:
                grad_x.addmm_(grad_low, down.to(grad.dtype))
            grad_x = grad_x.view(*shape, -1)
        if ctx.apart and ctx.needs_input_grad[1]:
            grad_dropped = (grad_low @ down.to(grad.dtype)).view(*shape, -1)
        return grad_x, grad_dropped, None, grad_down, grad_up


def _product(x: Tensor, seen: Tensor, layer: Any, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """y [L, O] and x·Aᵀ [L, R], where the adapter sees `seen` [L, I]."""
    low, base = linear(seen, down.to(x.dtype)), layer.base_layer
    if is_quantised(base):
        y = product(base, x)
    else:
        y = linear(x, _weight(layer), None if base.bias is None else base.bias.to(x.dtype))
    return y.addmm_(low, up.to(x.dtype).T, alpha=_scale(layer)), low


def _adapter_gradients(
    grad: Tensor, seen: Tensor, low: Tensor, down: Tensor, up: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x·Aᵀ [L, R], A and B, from that of y [L, O]."""
    grad_low = linear(grad, up.to(grad.dtype).T).mul_(scale)
    return grad_low, tall(grad_low, seen).to(down.dtype), tall(low, grad).to(up.dtype).mul_(scale).T


def _is_gated(layer: Any) -> bool:
    parts: list[Any] = [getattr(layer, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    adapted = all(part is not None and _computes(part, _adapted) for part in parts)
    return adapted and hasattr(layer, "act_fn") and not parts[0].fan_in_fan_out


def _gated(layer: Any, x: Tensor) -> Tensor:
    """down(act(gate(x)) ⊙ up(x)): [..., D] → [..., D]."""
    gate, up, down = layer.gate_proj(x), layer.up_proj(x), layer.down_proj
    dropout = layer.training and not isinstance(down.lora_dropout["default"], nn.Identity)
    if not torch.is_grad_enabled():
        result: Tensor = down(layer.act_fn(gate).mul_(up))
    elif dropout or down.disable_adapters or down.merged:
        result = down(layer.act_fn(gate) * up)
    else:
        result = _GatedLinear.apply(gate, up, layer.act_fn, down, *_adapter(down))
    return result


class _GatedLinear(torch.autograd.Function):
    """As `_AdaptedLinear`, of x = act(gate) ⊙ up: ([..., I], [..., I], act, layer, …) → [..., O]."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up_states: Tensor,
        act: Callable[[Tensor], Tensor],
        layer: Any,
        down: Tensor,
        up: Tensor,
    ) -> Tensor:
        x = (act(gate) * up_states).flatten(0, -2)
        y, low = _product(x, x, layer, down, up)
        ctx.act, ctx.layer = act, layer
        ctx.save_for_backward(gate, up_states, low, down, up)
        return y.view(*gate.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gate, up_states, low, down, up = ctx.saved_tensors
        grad = upstream.flatten(0, -2)
        with torch.enable_grad():
            get_path = gate.detach().requires_grad_()
            activated = ctx.act(get_path)
        seen = activated.detach() * up_states
        grad_low, grad_down, grad_up = _adapter_gradients(grad, seen.flatten(0, -2), low, down, up, _scale(ctx.layer))
        grad_x = linear(grad, _weight(ctx.layer).T).addmm_(grad_low, down.to(grad.dtype)).view_as(seen)
        torch.mul(activated.detach(), grad_x, out=seen)  # from here on the gradient of `up_states`
        (grad_gate,) = torch.autograd.grad(activated, get_path, grad_x.mul_(up_states))
        return grad_gate, seen, None, None, grad_down, grad_up


def _is_norm(layer: Any) -> bool:
    weight = getattr(layer, "weight", None)
    return (
        type(layer).__name__.endswith("RMSNorm")
        and hasattr(layer, "variance_epsilon")
        and isinstance(weight, Tensor)
        and weight.dim() == 1
        and weight.dtype == torch.float32
        and not weight.requires_grad
    )


def _normed(layer: Any, x: Tensor) -> Tensor:
    """x / √(mean x² + ε) ⊙ w (RMSNorm, arXiv 1910.07467): [..., D] → [..., D]."""
    if x.dtype != torch.float32:
        plain: Tensor = type(layer).forward(layer, x)
        return plain
    if not torch.is_grad_enabled():
        return _rms_norm(x, layer.weight, layer.variance_epsilon)[0]
    result: Tensor = _RmsNorm.apply(x, layer.weight, layer.variance_epsilon)
    return result


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The result [..., D], and what x was multiplied by [..., 1]."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
    return (x * inverse).mul_(weight), inverse


class _RmsNorm(torch.autograd.Function):
    """([..., D], [D], ε) → [..., D] in float32, with a frozen weight. Keeps x and one number for each token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        result, inverse = _rms_norm(x, weight, epsilon)
        ctx.save_for_backward(x, weight, inverse)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        grad = upstream * weight
        # d/dx of x·r(x) with r = (mean x² + ε)^(-1/2): r·g − x · r³ · mean(g ⊙ x)
        along = torch.linalg.vecdot(grad, x).unsqueeze(-1).mul_(inverse.pow(3)).div_(-x.shape[-1])
        return grad.mul_(inverse).addcmul_(x, along), None, None
