"""Fused forward and backward passes for LoRA layers, gated MLPs, RMS norms and GPT-Neo's GELU.

A linear layer with a LoRA update computes y = x·Wᵀ + b + (α/r) (x·Aᵀ)·Bᵀ (LoRA, arXiv 2106.09685), and rank-stabilized
LoRA has α/√r in place of α/r. Other variants, such as DoRA, keep PEFT's layers. PEFT's layer needs
three more passes over a tensor of the output's size, and autograd saves a copy for each. The fused layer adds both
products in place, forward and backward, and saves only x and x·Aᵀ. A fused gated MLP recomputes act(g) ⊙ u from g and u
in backward. A 4-bit weight is dequantized again in backward. Fusing changes no parameters, names or saved files.

Shapes: L tokens, D hidden, I inputs, O outputs, R rank. In code, x·Aᵀ [L, R] is `low_rank`.
"""

import contextlib
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from spinlm.model.kernels import linear, matmul_tn, prepack
from spinlm.model.quantize import dequantize, is_4bit, linear_4bit

PREPACKED = "spinlm_prepacked"
"""Attribute of a LoRA layer that holds the merged and prepacked weight during decoding."""


def fuse_layers(model: nn.Module) -> int:
    """Replace the forward of every layer that has a fused version, in place.

    LoRA layers are fused if the base layer is a frozen linear layer, plain or in 4 bits. A gated MLP is fused if its
    three projections are fused LoRA layers, an RMS norm if its weight is frozen and in float32, and GPT-Neo's GELU if
    it is between fused LoRA layers. MLPs, norms and the GELU are recognized by the names of their parts, so they are
    fused only if both versions agree on random inputs.

    Returns:
        The number of fused layers.
    """
    layers: list[Any] = list(model.modules())
    adapters = [layer for layer in layers if _is_lora_linear(layer)]
    for layer in adapters:
        _set_forward(layer, _lora_forward)
    norms = [
        layer for layer in layers if _is_rms_norm(layer) and _fuse_if_equal(layer, _rms_norm_forward, layer.weight)
    ]
    mlps = [
        layer
        for layer in layers
        if _is_gated_mlp(layer) and _fuse_if_equal(layer, _gated_mlp_forward, _base_weight(layer.gate_proj))
    ]
    gelus = [
        layer
        for layer in layers
        if _is_gelu_mlp(layer) and _fuse_if_equal(layer.act, _gelu_forward, _base_weight(layer.c_proj))
    ]
    return len(adapters) + len(norms) + len(mlps) + len(gelus)


@contextlib.contextmanager
def prepacked_adapters(model: nn.Module, rows: int) -> Iterator[None]:
    """Compute fused LoRA layers with one merged weight, prepacked for products with about `rows` rows.

    Applies to float32 on a CPU only: elsewhere merging is no faster, or rounds too much. Costs the memory of the merged
    weights, so 4-bit layers stay as they are. The base weights are not changed. DoRA layers keep their weight norms,
    which PEFT otherwise computes for every token.
    """
    from peft.helpers import DoraCaching
    from peft.tuners.lora.dora import DoraLinearLayer

    layers: list[Any] = [layer for layer in model.modules() if _has_forward(layer, _lora_forward)]
    dora_layers = [layer for layer in model.modules() if isinstance(layer, DoraLinearLayer)]
    try:
        for layer in layers:
            if layer.base_layer.weight.dtype == torch.float32:
                vars(layer)[PREPACKED] = prepack(_merged_weight(layer), rows)
        with DoraCaching(enabled=bool(dora_layers)):
            yield
    finally:
        for dora_layer in dora_layers:
            dora_layer.train().eval()  # training mode clears the cache
        for layer in layers:
            vars(layer).pop(PREPACKED, None)


def _set_forward(layer: Any, forward: Callable[..., Tensor]) -> None:
    layer.forward = MethodType(forward, layer)


def _has_forward(layer: Any, forward: Callable[..., Tensor]) -> bool:
    return getattr(vars(layer).get("forward"), "__func__", None) is forward


@torch.no_grad()
def _fuse_if_equal(layer: Any, forward: Callable[..., Tensor], weight: Tensor) -> bool:
    """Replace the forward of a layer with weight [I] or [O, I] if both versions agree on random inputs [3, I]."""
    x = torch.randn(3, weight.shape[-1], generator=torch.Generator().manual_seed(0)).to(weight)
    modes = [(module, module.training) for module in layer.modules()]
    layer.eval()  # disables dropout
    try:
        fused, original = forward(layer, x), layer(x)
    except (TypeError, ValueError, RuntimeError):  # the arguments or shapes differ from what the names suggest
        return False
    finally:
        for module, training in modes:
            module.training = training
    if not torch.allclose(fused, original, rtol=1e-4 if weight.dtype == torch.float32 else 1e-2, atol=1e-5):
        return False
    _set_forward(layer, forward)
    return True


def _is_lora_linear(layer: Any) -> bool:
    from peft.tuners.lora import Linear, LoraLayer
    from transformers.pytorch_utils import Conv1D

    if not isinstance(layer, LoraLayer):
        return False
    plain = isinstance(layer, Linear) and type(layer.base_layer) in (nn.Linear, Conv1D)
    return (
        (plain or is_4bit(layer.base_layer))
        and not layer.lora_variant
        and not layer.lora_bias.get("default")
        and not any(parameter.requires_grad for parameter in layer.base_layer.parameters())
    )


def _base_weight(layer: Any) -> Tensor:
    """Return W of a LoRA layer: [O, I]."""
    base = layer.base_layer
    if is_4bit(base):
        return dequantize(base)
    weight: Tensor = base.weight.T if layer.fan_in_fan_out else base.weight
    return weight


def _lora_weights(layer: Any) -> tuple[Tensor, Tensor]:
    """Return A [R, I] and B [O, R]."""
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def _scale(layer: Any) -> float:
    """Return α/r, or α/√r of rank-stabilized LoRA."""
    return float(layer.scaling["default"])


def _has_dropout(layer: Any) -> bool:
    return layer.training and not isinstance(layer.lora_dropout["default"], nn.Identity)


def _merged_weight(layer: Any) -> Tensor:
    """Return W + (α/r) B·A: [O, I]."""
    lora_a, lora_b = (weight.detach() for weight in _lora_weights(layer))
    return torch.addmm(_base_weight(layer).detach(), lora_b, lora_a, alpha=_scale(layer))


def _lora_forward(layer: Any, x: Tensor) -> Tensor:
    """Forward of a fused LoRA layer: [..., I] → [..., O]."""
    if layer.disable_adapters or layer.merged:
        plain: Tensor = type(layer).forward(layer, x)
        return plain
    if (weight := vars(layer).get(PREPACKED)) is not None:
        return linear(x.flatten(0, -2), weight, layer.base_layer.bias).view(*x.shape[:-1], -1)
    dropped = layer.lora_dropout["default"](x) if _has_dropout(layer) else None
    result: Tensor = _LoraLinear.apply(x, dropped, layer, *_lora_weights(layer))
    return result


class _LoraLinear(torch.autograd.Function):
    """([..., I], [..., I] or None, layer, A [R, I], B [O, R]) → [..., O] in the precision of x.

    The second argument is the adapter's input after dropout, or None without dropout. The third argument is the layer
    and not its frozen weight, because forward and backward each dequantize a 4-bit weight.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: Tensor | None, layer: Any, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        adapter_input = (x if dropped is None else dropped.to(x.dtype)).flatten(0, -2)  # [L, I]
        y, low_rank = _lora_products(x.flatten(0, -2), adapter_input, layer, lora_a, lora_b)
        ctx.layer, ctx.has_dropout = layer, dropped is not None
        ctx.save_for_backward(adapter_input, low_rank, lora_a, lora_b)
        return _reshaped(y, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        adapter_input, low_rank, lora_a, lora_b = ctx.saved_tensors
        shape, grad = grad_y.shape[:-1], grad_y.flatten(0, -2)  # [L, O]
        grad_low_rank, grad_a, grad_b = _lora_gradients(
            grad, adapter_input, low_rank, lora_a, lora_b, _scale(ctx.layer)
        )
        grad_x = grad_dropped = None
        if ctx.needs_input_grad[0]:
            grad_x = linear(grad, _base_weight(ctx.layer).T)  # [L, I]
            if not ctx.has_dropout:
                grad_x.addmm_(grad_low_rank, lora_a.to(grad.dtype))
            grad_x = grad_x.view(*shape, -1)
        if ctx.has_dropout and ctx.needs_input_grad[1]:
            grad_dropped = (grad_low_rank @ lora_a.to(grad.dtype)).view(*shape, -1)
        return grad_x, grad_dropped, None, grad_a, grad_b


def _reshaped(y: Tensor, x: Tensor) -> Tensor:
    """Reshape [L, O] to the leading dimensions of x. Not as a view, which models could not change in place."""
    return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])


def _lora_products(
    x: Tensor, adapter_input: Tensor, layer: Any, lora_a: Tensor, lora_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Return y [L, O] and x·Aᵀ [L, R]."""
    low_rank, base = linear(adapter_input, lora_a.to(x.dtype)), layer.base_layer
    if is_4bit(base):
        y = linear_4bit(base, x)
    else:
        y = linear(x, _base_weight(layer), None if base.bias is None else base.bias.to(x.dtype))
    return y.addmm_(low_rank, lora_b.to(x.dtype).T, alpha=_scale(layer)), low_rank


def _lora_gradients(
    grad_y: Tensor, adapter_input: Tensor, low_rank: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x·Aᵀ [L, R], A [R, I] and B [O, R]."""
    grad_low_rank = linear(grad_y, lora_b.to(grad_y.dtype).T).mul_(scale)
    grad_a = matmul_tn(grad_low_rank, adapter_input).to(lora_a.dtype)
    grad_b = matmul_tn(low_rank, grad_y).to(lora_b.dtype).mul_(scale).T
    return grad_low_rank, grad_a, grad_b


def _is_gated_mlp(layer: Any) -> bool:
    projections: list[Any] = [getattr(layer, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    fused = all(layer is not None and _has_forward(layer, _lora_forward) for layer in projections)
    return fused and hasattr(layer, "act_fn") and not projections[0].fan_in_fan_out


def _gated_mlp_forward(layer: Any, x: Tensor) -> Tensor:
    """down_proj(act(gate_proj(x)) ⊙ up_proj(x)): [..., D] → [..., D]."""
    gate, up, down_proj = layer.gate_proj(x), layer.up_proj(x), layer.down_proj
    if not torch.is_grad_enabled():
        result: Tensor = down_proj(layer.act_fn(gate).mul_(up))
    elif _has_dropout(down_proj) or down_proj.disable_adapters or down_proj.merged:
        result = down_proj(layer.act_fn(gate) * up)
    else:
        result = _GatedLoraLinear.apply(gate, up, layer.act_fn, down_proj, *_lora_weights(down_proj))
    return result


class _GatedLoraLinear(torch.autograd.Function):
    """`_LoraLinear` of x = act(gate) ⊙ up, without saving x.

    (gate [..., I], up [..., I], act, layer, A [R, I], B [O, R]) → [..., O].
    """

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor], layer: Any, lora_a: Tensor, lora_b: Tensor
    ) -> Tensor:
        x = (act(gate) * up).flatten(0, -2)
        y, low_rank = _lora_products(x, x, layer, lora_a, lora_b)
        ctx.act, ctx.layer = act, layer
        ctx.save_for_backward(gate, up, low_rank, lora_a, lora_b)
        return _reshaped(y, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, low_rank, lora_a, lora_b = ctx.saved_tensors
        grad = grad_y.flatten(0, -2)
        with torch.enable_grad():
            gate_leaf = gate.detach().requires_grad_()
            activated = ctx.act(gate_leaf)
        x = activated.detach() * up
        grad_low_rank, grad_a, grad_b = _lora_gradients(
            grad, x.flatten(0, -2), low_rank, lora_a, lora_b, _scale(ctx.layer)
        )
        grad_x = linear(grad, _base_weight(ctx.layer).T).addmm_(grad_low_rank, lora_a.to(grad.dtype)).view_as(x)
        grad_up = torch.mul(activated.detach(), grad_x, out=x)  # reuses the memory of x
        (grad_gate,) = torch.autograd.grad(activated, gate_leaf, grad_x.mul_(up))
        return grad_gate, grad_up, None, None, grad_a, grad_b


def _is_gelu_mlp(layer: Any) -> bool:
    """Return whether a layer is GPT-Neo's MLP. GPT-2's has the same names and other linear layers."""
    projections: list[Any] = [getattr(layer, name, None) for name in ("c_fc", "c_proj")]
    fused = all(layer is not None and _has_forward(layer, _lora_forward) for layer in projections)
    return fused and not projections[0].fan_in_fan_out and type(layer.act).__name__ == "NewGELUActivation"


def _gelu_forward(_: Any, x: Tensor) -> Tensor:
    """½ x (1 + tanh(√(2/π) (x + 0.044715 x³))): [..., D] → [..., D]. Saves x only."""
    return F.gelu(x, approximate="tanh")


def _is_rms_norm(layer: Any) -> bool:
    weight = getattr(layer, "weight", None)
    return (
        type(layer).__name__.endswith("RMSNorm")
        and hasattr(layer, "variance_epsilon")
        and isinstance(weight, Tensor)
        and weight.dim() == 1
        and weight.dtype == torch.float32
        and not weight.requires_grad
    )


def _rms_norm_forward(layer: Any, x: Tensor) -> Tensor:
    """x / √(mean x² + ε) ⊙ w (RMSNorm, arXiv 1910.07467): [..., D] → [..., D]."""
    if x.dtype != torch.float32:
        plain: Tensor = type(layer).forward(layer, x)
        return plain
    if not torch.is_grad_enabled():
        return _rms_norm(x, layer.weight, layer.variance_epsilon)[0]
    result: Tensor = _RmsNorm.apply(x, layer.weight, layer.variance_epsilon)
    return result


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return the normalized x [..., D] and 1 / √(mean x² + ε) [..., 1]."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
    return (x * inverse).mul_(weight), inverse


class _RmsNorm(torch.autograd.Function):
    """([..., D], [D], ε) → [..., D] in float32, for a frozen weight. Saves x and one number per token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        result, inverse = _rms_norm(x, weight, epsilon)
        ctx.save_for_backward(x, weight, inverse)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        grad = grad_y * weight
        # d/dx of x·r(x) with r = (mean x² + ε)^(-1/2): r·g − x · r³ · mean(g ⊙ x)
        along = torch.linalg.vecdot(grad, x).unsqueeze(-1).mul_(inverse.pow(3)).div_(-x.shape[-1])
        return grad.mul_(inverse).addcmul_(x, along), None, None
