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


def auto_class(config: Any) -> Any:
    """Return the class that loads a model with this config: that of causal language models, or of multimodal ones."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    is_text = type(config) in AutoModelForCausalLM._model_mapping or "AutoModelForCausalLM" in getattr(
        config, "auto_map", ()
    )
    return AutoModelForCausalLM if is_text or config.get_text_config() is config else AutoModelForImageTextToText


def text_model(model: Any) -> Any:
    """Return the part of a causal language model that computes the final hidden states."""
    return model.model if model.base_model is model else model.base_model  # Llama 4 names a part that it does not have
