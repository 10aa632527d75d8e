"""What families of models do differently from a plain decoder."""

from typing import Any

ONE_ROW_FAMILIES = ("rwkv",)
"""Families whose states transformers mixes up when it decodes several rows at once."""


def keeps_state(model: Any) -> bool:
    """Return whether a causal language model keeps more than keys and values between tokens, as Mamba does."""
    from transformers import DynamicCache
    from transformers.cache_utils import LinearAttentionCacheLayerMixin

    layers = DynamicCache(config=model.config).layers
    return model._is_stateful or any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)
