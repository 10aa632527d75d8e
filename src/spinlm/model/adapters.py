"""Adapters made elsewhere: train one further, or merge one into its base."""

import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spinlm.errors import ModelError
from spinlm.model.base_files import (
    TOKENIZER_CONFIG,
    base_folder,
    copy_tokenizer_files,
    save_whole_model,
    write_chat_template,
)
from spinlm.model.loading import (
    as_model_error,
    attach_adapter,
    load_model,
    load_stop_ids,
    load_tokenizer,
    make_once,
    prepare_base_model,
    save_stop_ids,
)
from spinlm.recipe.adapter import adapter_files
from spinlm.recipe.model import Lora, Model
from spinlm.recipe.schema import Recipe
from spinlm.rundir.layout import RunDir
from spinlm.utils.atomic import file_digest

PREFIX = "base_model.model."
"""What PEFT writes before the name of a weight."""


MAX_MERGE_ERROR = 1e-2
"""Largest difference between log-probabilities before and after a merge in float32, in nats, over all tokens."""

log = logging.getLogger("spinlm")


def prepare_base(recipe: Recipe, folder: RunDir) -> Model:
    """Return the name and revision that transformers loads the frozen base, or the whole model, from.

    A .gguf file is converted once, and an adapter that is not trained further is merged once. Both make a model folder
    in the run folder.

    Raises:
        ModelError: the model does not exist, is incomplete, or cannot be converted or merged.
    """
    model = recipe.model
    if not recipe.merges_adapter:
        path = prepare_base_model(model, folder)
        return model.base_model.model_copy(update={"path": path})
    adapter = adapter_files(model)
    weights = {file.name: file_digest(file) for file in sorted(adapter.glob("adapter_*"))}
    source = {"base": model.base, "revision": model.base_revision, "adapter": weights}
    make_once(folder.base, source, lambda target: _save_merged_base(model, adapter, target))
    return model.base_model.model_copy(update={"path": str(folder.base.absolute()), "revision": None})


def _save_merged_base(model: Model, adapter: Path, target: Path) -> None:
    """Save the base of an adapter with the adapter merged, in float32, with the adapter's tokenizer or the base's."""
    from peft import PeftModel

    log.info("merging %s into its base %s", model.path, model.base)
    with tempfile.TemporaryDirectory(prefix="spinlm-base-") as temporary:
        path = prepare_base_model(model, RunDir(Path(temporary)))
        base = model.base_model.model_copy(update={"path": path})
        with as_model_error(f"{model.path}: this adapter cannot be merged into {model.base}"):
            loaded = load_model(base, path, torch.float32)
            has_new_tokens = _resize_embeddings(loaded, adapter)
            adapted = PeftModel.from_pretrained(loaded, str(adapter))
            expected = sample_logprobs(adapted)
            untied = merge_adapter(adapted, torch.float32)
        save_whole_model(base, loaded, path, target, untied=untied)
        if has_new_tokens:
            loaded.config.save_pretrained(target)
        _save_tokenizer(base, adapter, target)
        save_stop_ids(target, load_stop_ids(base, path))
    del loaded, adapted
    error = (sample_logprobs(load_model(base, str(target), torch.float32)) - expected).abs().max().item()
    if not error < MAX_MERGE_ERROR:
        raise ModelError(
            f"{model.path}: the merged model's log-probabilities differ from the adapter's by {error:.2g} nats. This "
            "adapter cannot be merged: merge it with the program that made it, and set model.path to the result"
        )


def tokenizer_folder(base: Model, adapter: Path | None) -> Path:
    """Return the folder with the tokenizer: that of the adapter if it has one, otherwise that of the base."""
    if adapter is not None and (adapter / TOKENIZER_CONFIG).exists():
        return adapter
    return base_folder(base, base.path)


def _save_tokenizer(base: Model, adapter: Path, target: Path) -> None:
    """Copy the tokenizer of an adapter or its base, with the base's chat template if the adapter's has none."""
    folder = tokenizer_folder(base, adapter)
    tokenizer = load_tokenizer(base, str(folder))
    if not copy_tokenizer_files(base, folder, target):
        tokenizer.save_pretrained(target)
    if folder == adapter and tokenizer.chat_template is None:
        template = load_tokenizer(base, base.path).chat_template
        if template is not None:
            write_chat_template(target, template)


def continue_adapter(model: Any, folder: Path, lora: Lora, base: Model) -> Any:
    """Add the adapter in a folder to its base model, to be trained further. Its weights are in float32.

    Args:
        model: the base model.
        folder: the folder of the adapter.
        lora: the recipe's section, which has the adapter's settings. Only its dropout may differ.
        base: name and revision of the base, for the adapter's config.

    Raises:
        ModelError: the adapter is damaged, has trained embeddings, or belongs to another base.
    """
    from peft import PeftConfig, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    message = f"{folder}: not an adapter of {base.path}"
    with as_model_error(message):
        config = PeftConfig.from_pretrained(str(folder))
        weights = load_peft_weights(str(folder), device="cpu")
    config.lora_dropout, config.inference_mode = lora.dropout, False
    config.base_model_name_or_path, config.revision = base.path, base.revision
    _remove_embeddings(model, weights, folder)
    adapted = attach_adapter(model, config)
    with as_model_error(message):
        result: Any = set_peft_model_state_dict(adapted, weights)
        trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
        if mismatched := sorted(trained & {*result.missing_keys} | {*result.unexpected_keys}):
            raise ValueError(f"{len(mismatched)} weights missing or unknown ({', '.join(mismatched[:3])} …)")
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


@torch.no_grad()
def sample_logprobs(model: Any) -> Tensor:
    """Return the log-probabilities of all tokens after each prefix of a fixed text of 32 tokens: [32, V]."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, 32), generator=torch.Generator().manual_seed(0))
    logits: Tensor = model.eval()(input_ids=ids.to(model.device)).logits
    return torch.log_softmax(logits[0].float(), dim=-1)


def _remove_embeddings(model: Any, weights: dict[str, Tensor], folder: Path) -> None:
    """Remove copies of the base's embeddings from an adapter's weights; PEFT saves them with LoRA on embeddings.

    Raises:
        ModelError: the embeddings differ from the base's.
    """
    base = model.state_dict()
    for name in [name for name in weights if "lora_" not in name]:
        saved, ours = weights.pop(name), base.get(name.removeprefix(PREFIX).replace(".base_layer.", "."))
        if ours is None or saved.shape != ours.shape or not torch.equal(saved.to(ours.device, ours.dtype), ours):
            raise ModelError(
                f"{folder}: has trained weights of the base ({name.removeprefix(PREFIX)}), which spinlm cannot train "
                "further. Set lora.create_new_adapter: true, which merges this adapter and trains a new one"
            )


def _resize_embeddings(model: Any, adapter: Path) -> bool:
    """Give a base the tokens that were added before its adapter was trained. Return whether there are any."""
    from peft.utils import load_peft_weights

    saved, embeddings = load_peft_weights(str(adapter), device="cpu"), model.get_input_embeddings()
    names = [name for name, module in model.named_modules() if module is embeddings]
    stored = [f"{PREFIX}{name}{part}.weight" for name in names for part in ("", ".base_layer")]
    rows = [len(saved[name]) for name in stored if name in saved]
    if not rows or rows[0] == embeddings.num_embeddings:
        return False
    model.resize_token_embeddings(rows[0], mean_resizing=False)
    return True


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
        log.info("the adapter changes the embeddings, so the merged model has an output head of its own")
