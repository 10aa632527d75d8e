"""What families of models do differently from a plain decoder. Importing this module imports no torch."""

from collections.abc import Iterable, Mapping
from typing import Any

from spinlm.errors import ModelError

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
    return model.model if model.base_model is model else model.base_model  # Llama 4 names a submodule that it lacks


def row_limit(config: Mapping[str, Any]) -> tuple[str, int] | None:
    """Return the kind of a position encoding that depends on the length of a row, and the longest row without a change.

    In a longer row, all positions are encoded differently: Phi-3's longrope uses its long factors, and dynamic NTK
    scales its frequencies. `config` is a config.json, or a transformers config as a dictionary.
    """
    text = config.get("text_config") or config
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, Mapping))):
        name = parameters.get("rope_type") or parameters.get("type") or ""
        kind = "longrope" if name in ("longrope", "su") else "dynamic NTK" if "dynamic" in name else None
        limits = [text.get("max_position_embeddings")]
        if kind == "longrope":
            limits = [config.get("original_max_position_embeddings") for config in (parameters, text)] + limits
        limit = next(filter(None, limits), None)
        if kind and limit:
            return kind, int(limit)
    return None


def check_row_length(name: str, config: Mapping[str, Any], max_length: int) -> None:
    """Refuse rows that are too long for a position encoding that depends on the length of a row.

    Raises:
        ModelError: `max_length`, the recipe's train.max_length, is above the limit.
    """
    kind, limit = row_limit(config) or ("", max_length)
    if max_length > limit:
        raise ModelError(
            f"{name}: its position encoding ({kind}) changes for all tokens of a row as soon as the row has more than "
            f"{limit:,} tokens. So the log-probability of a response would depend on its batch, and would differ "
            f"during generation. train.max_length is {max_length:,}: set it to {limit} or less"
        )


def check_vocabulary(name: str, model: Any, tokenizer: Any, token_ids: Iterable[int]) -> None:
    """Refuse a tokenizer with more tokens than the embedding has rows, if one of the additional tokens occurs.

    Some models have such tokens and never use them: Gemma 3 without a vision tower has one for images.

    Args:
        name: the model, for the message.
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        token_ids: the tokens of all examples. They are read only if the tokenizer has more tokens than rows.

    Raises:
        ModelError: a token has no row.
    """
    rows, tokens = model.get_input_embeddings().weight.shape[0], len(tokenizer)
    unknown = next((token for token in token_ids if token >= rows), None) if tokens > rows else None
    if unknown is not None:
        raise ModelError(
            f"{name}: the tokenizer has {tokens:,} tokens, but the model's embedding has only {rows:,} rows, and the "
            f"examples contain {tokenizer.convert_ids_to_tokens(unknown)!r}, token {unknown}. Use the tokenizer that "
            "belongs to the model. Or add rows with transformers' resize_token_embeddings, save the model, and set "
            "model.path to it"
        )
