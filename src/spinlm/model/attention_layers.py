"""Tree attention for models that pass no keyword arguments to their attention layers: GPT-Neo, GPT-J, StableLM, …

Such a model passes on a 4-D attention mask unchanged, so the layout of the batch is an attribute of a mask. A layer
keeps the layout with its arguments, also when activation checkpointing computes the layer again. Where the attention
layer does not use transformers' `AttentionInterface`, one method of the layer is replaced. Parameters, names and saved
files do not change.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from spinlm.model.attention import LAYOUT, tree_attention

LAYOUT_IN_MASK = ("gpt_neo", "gptj", "codegen", "gpt_neox_japanese", "xglm", "stablelm", "nemotron")
"""Values of `model_type` whose layers receive the layout in the attention mask."""


def layout_mask(layout: dict[str, Any], device: torch.device) -> Tensor:
    """Return a mask [1, 1, 1, 1] that passes keyword arguments on to `tree_attention`."""
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    setattr(mask, LAYOUT, layout)
    return mask


def replaceable_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers whose attention is a method that `replace_attention` replaces."""
    return [layer for layer in model.modules() if type(layer).__name__ in _METHODS]


def replace_attention(layers: list[nn.Module], enabled: bool) -> None:
    """Let the layers call `tree_attention`, or undo this."""
    for layer in layers:
        name, method = _METHODS[type(layer).__name__]
        if enabled:
            vars(layer)[name] = MethodType(method, layer)
        else:
            vars(layer).pop(name, None)


def _attn(layer: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor) -> tuple[Tensor, None]:
    """Compute attention scaled by 1/√E: [N, H, Q, E], [N, H, K, E], [N, H, K, E] → [N, H, Q, E]."""
    dtype = value.dtype  # rotary embeddings may return another precision
    return tree_attention(layer, query.to(dtype), key.to(dtype), value, attention_mask)[0].transpose(1, 2), None


def _gpt_neo_attn(layer: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor) -> tuple[Tensor, None]:
    """Compute attention without scaling; a local layer has a window."""
    window = layer.config.window_size if layer.attention_type == "local" else None
    output, _ = tree_attention(layer, query, key, value, attention_mask, scaling=1.0, sliding_window=window)
    return output.transpose(1, 2), None


def _xglm_forward(
    layer: Any, hidden_states: Tensor, past_key_values: Any = None, attention_mask: Tensor | None = None, **_: Any
) -> tuple[Tensor, None]:
    """Compute the attention layer: [N, L, D] → [N, L, D]."""
    query, key, value = (
        projection(hidden_states).unflatten(-1, (layer.num_heads, layer.head_dim)).transpose(1, 2)
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, layer.layer_idx)
    output: Tensor = layer.out_proj(tree_attention(layer, query, key, value, attention_mask)[0].flatten(2))
    return output, None


_METHODS: dict[str, tuple[str, Callable[..., tuple[Tensor, None]]]] = {
    "GPTNeoSelfAttention": ("_attn", _gpt_neo_attn),
    "GPTJAttention": ("_attn", _attn),
    "CodeGenAttention": ("_attn", _attn),
    "GPTNeoXJapaneseAttention": ("_attn", _attn),
    "XGLMAttention": ("forward", _xglm_forward),
}
"""Name of the attention layer → the method to replace, and its replacement."""
