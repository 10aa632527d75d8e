"""PEFT adapters: train an adapter of another program further, or merge an adapter into its base."""

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spinlm.errors import ModelError
from spinlm.model.base_files import (
    TOKENIZER_CONFIG,
    base_folder,
)
from spinlm.model.extrapolate import pad_rank
from spinlm.model.loading import as_model_error, attach_adapter, check_no_mismatch, load_tokenizer
from spinlm.recipe.model import Lora, Model

PEFT_PREFIX = "base_model.model."
"""What PEFT writes before the name of a weight."""

log = logging.getLogger("spinlm")


def tokenizer_folder(base: Model, adapter: Path | None) -> Path:
    """Return the folder with the tokenizer: that of the adapter if it has one, otherwise that of the base."""
    if adapter is not None and (adapter / TOKENIZER_CONFIG).exists():
        return adapter
    return base_folder(base, base.path)


def load_start_tokenizer(base: Model, adapter: Path | None) -> tuple[Any, Any]:
    """Load the tokenizer of an adapter or its base. It has the base's chat template if the adapter's has none.

    Returns:
        The tokenizer, and the chat template in its files.
    """
    tokenizer = load_tokenizer(base, base.path if adapter is None else str(tokenizer_folder(base, adapter)))
    file_template = tokenizer.chat_template
    if file_template is None and adapter is not None:
        tokenizer.chat_template = load_tokenizer(base, base.path).chat_template
    return tokenizer, file_template


def continue_adapter(model: Any, folder: Path, lora: Lora, base: Model, *, double: bool = False) -> Any:
    """Add the adapter in a folder to its base model, to be trained further. Its weights are in float32.

    Args:
        model: the base model.
        folder: the folder of the adapter.
        lora: the recipe's section, which has the adapter's settings. Only its dropout may differ.
        base: name and revision of the base, for the adapter's config.
        double: give the adapter twice the rank, and zeros as the additional weights.

    Raises:
        ModelError: the adapter is damaged, has trained embeddings, or belongs to another base.
    """
    from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    message = f"{folder}: not an adapter of {base.path}"
    with as_model_error(message):
        config = PeftConfig.from_pretrained(str(folder))
        weights = load_peft_weights(str(folder), device="cpu")
    config.lora_dropout, config.inference_mode = lora.dropout, False
    config.base_model_name_or_path, config.revision = base.path, base.revision
    _remove_embeddings(model, weights, folder)
    adapted = attach_adapter(model, config, double=double)
    if double:
        shapes = {name: weight.shape for name, weight in get_peft_model_state_dict(adapted).items()}
        weights = {name: pad_rank(name, weight, shapes.get(name, weight.shape)) for name, weight in weights.items()}
    with as_model_error(message):
        result: Any = set_peft_model_state_dict(adapted, weights)
        trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
        check_no_mismatch(trained & {*result.missing_keys} | {*result.unexpected_keys})
    return adapted


def merge_adapter(peft_model: Any, dtype: torch.dtype) -> bool:
    """Merge the adapter of a PEFT model into its base, layer by layer, in float32. Round once, to `dtype`.

    Input and output embeddings that share a weight get a weight each if the adapter changes only one of them.

    Returns:
        Whether the embeddings were untied.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    causal_lm = peft_model.get_base_model()
    was_tied = causal_lm.config.get_text_config().tie_word_embeddings
    _untie(causal_lm)
    for layer in [module for module in causal_lm.modules() if isinstance(module, BaseTunerLayer)]:
        base = layer.get_base_layer()
        base.float()
        layer.merge()
        base.to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that every layer is merged already
        peft_model.merge_and_unload()
    if causal_lm.dtype != dtype:
        causal_lm.to(dtype)
    head = causal_lm.get_output_embeddings()
    return was_tied and head is not None and head.weight is not causal_lm.get_input_embeddings().weight


def _remove_embeddings(model: Any, weights: dict[str, Tensor], folder: Path) -> None:
    """Remove copies of the base's embeddings from an adapter's weights; PEFT saves them with LoRA on embeddings.

    Raises:
        ModelError: the embeddings differ from the base's.
    """
    base = model.state_dict()
    for name in [name for name in weights if "lora_" not in name]:
        saved, original = weights.pop(name), base.get(name.removeprefix(PEFT_PREFIX).replace(".base_layer.", "."))
        if original is None or not torch.equal(saved.to(original.device, original.dtype), original):
            raise ModelError(
                f"{folder}: has trained weights of the base ({name.removeprefix(PEFT_PREFIX)}), which spinlm cannot "
                "train further. Set lora.create_new_adapter: true, which merges this adapter and trains a new one"
            )


def _untie(model: Any) -> None:
    """Give the output head its own weights if an adapter is on the head or on the embedding."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    plain: list[Any] = [layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer for layer in layers]
    embedding, head = plain
    is_adapted = any(isinstance(layer, BaseTunerLayer) for layer in layers)
    if is_adapted and getattr(head, "weight", None) is getattr(embedding, "weight", embedding):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
        log.info("the adapter changes the embeddings, so the merged model's output head does not share their weights")
