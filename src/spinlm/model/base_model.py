"""The base model of a run: convert a .gguf file, or merge an adapter, once, into the run folder."""

import contextlib
import functools
import io
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spinlm.errors import ModelError, shortened
from spinlm.model.adapters import PEFT_PREFIX, load_start_tokenizer, merge_adapter, tokenizer_folder
from spinlm.model.base_files import (
    CONFIG,
    copy_tokenizer_files,
    save_whole_model,
    use_legacy_names,
    write_chat_template,
)
from spinlm.model.checkpoint_checks import check_files
from spinlm.model.loading import as_model_error, check_no_mismatch, load_model, load_stop_ids, save_stop_ids
from spinlm.recipe.adapter import ADAPTER_CONFIG, adapter_files
from spinlm.recipe.model import Model
from spinlm.recipe.schema import Recipe
from spinlm.rundir.layout import RunDir
from spinlm.utils.atomic import atomic_path, file_digest, read_json, write_json
from spinlm.utils.hub import Repository
from spinlm.utils.model_path import resolve_model

MODEL_SUFFIXES = (".safetensors", ".bin", ".json", ".jinja", ".model")
"""File types of a model's folder that a run depends on."""

MAX_MERGE_ERROR = 1e-2
"""Largest difference between the log-probabilities of a token before and after a merge in float32, in nats."""

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
        path = prepare_unmerged(model, folder)
        return model.base_model.model_copy(update={"path": path})
    try:
        adapter = adapter_files(model)
    except ModelError:  # the merged base does not need the adapter any more
        if not _is_intact(folder.base):
            raise
    else:
        weights = {file.name: file_digest(file) for file in sorted(adapter.glob("adapter_*"))}
        source = {"base": model.base, "revision": model.base_revision, "adapter": weights}
        make_once(folder.base, source, lambda target: _save_merged_base(model, adapter, target))
    return model.base_model.model_copy(update={"path": str(folder.base.absolute()), "revision": None})


def prepare_unmerged(model: Model, folder: RunDir) -> str:
    """Return the name that transformers loads the model, or the base of an adapter, from: a hub id or a folder.

    A .gguf file is converted once to a model folder in the run folder.

    Raises:
        ModelError: the model does not exist, is incomplete, or cannot be converted.
    """
    if model.trust_remote_code:
        warn_remote_code()
    # Otherwise transformers asks a service of the hub to convert pickled weights to safetensors.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    if model.base is not None:
        with as_base_error(model):
            return _prepare_model(model.base_model, folder, check_hub=True)
    return _prepare_model(model, folder)


@contextlib.contextmanager
def as_base_error(model: Model) -> Iterator[None]:
    """Name the adapter and the remedy in a ModelError about its base model."""
    try:
        yield
    except ModelError as error:
        message = str(error).replace("model.path", "model.base").replace("model.revision", "model.base_revision")
        raise ModelError(
            f"{model.path}: the base model of this adapter cannot be used: {message}. If the base is a folder, set "
            "model.base to its path"
        ) from error


def _prepare_model(model: Model, folder: RunDir, *, check_hub: bool = False) -> str:
    """Return the hub id or folder of a whole model. Convert a .gguf file. `check_hub` asks the hub for the config."""
    path = resolve_model(model.path)
    if path is None:
        if check_hub:
            Repository(model.path, model.revision).folder()
        return model.path
    if path.suffix == ".gguf":
        source = {"file": path.name, "bytes": path.stat().st_size}
        make_once(folder.base, source, lambda target: _convert_gguf(path, target))
        return str(folder.base.absolute())  # absolute, because adapters record the path of their base
    if path.is_file():
        raise ModelError(f"{path}: a file, not a model folder. Set model.path to the folder that holds it")
    if not (path / CONFIG).exists():
        patterns = [f"{place}/{name}" for place in ("*", "*/player") for name in (CONFIG, ADAPTER_CONFIG)]
        inside = sorted({str(file.parent) for pattern in patterns for file in path.glob(pattern)})
        hint = f", such as {shortened(' or '.join(inside))}" if inside else ""
        raise ModelError(
            f"{path}: not a model folder, because it has no config.json. Set model.path to a model folder{hint}"
        )
    check_files(path)
    return str(path)


@functools.cache
def warn_remote_code() -> None:
    """Log a warning, once per process, that code from the model's repository runs."""
    log.warning("model.trust_remote_code is on: code from the model's repository runs on this machine, as your user")


_verified: dict[Path, dict[str, Any]] = {}  # folder → its source, if this process made or verified the folder


def _is_intact(folder: Path) -> bool:
    """Whether a folder that `make_once` made has all its files, with the digests that it recorded."""
    record = folder / "source.json"
    return record.exists() and read_json(record).get("files") == _digests(folder)


def make_once(folder: Path, source: dict[str, Any], make: Callable[[Path], None]) -> None:
    """Make a model folder from a source, unless the folder already holds the result with correct digests.

    Args:
        folder: the folder to make. Its source.json records the source, and the SHA-256 of each file.
        source: what identifies the source.
        make: called with the temporary folder to fill.
    """
    record = folder / "source.json"
    if record.exists() and (
        _verified.get(folder) == source or read_json(record) == source | {"files": _digests(folder)}
    ):
        _verified[folder] = source
        return
    with atomic_path(folder) as temporary:
        make(temporary)
        write_json(temporary / record.name, source | {"files": _digests(temporary)})
    _verified[folder] = source


def _convert_gguf(path: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    log.info("converting %s to a model folder", path.name)
    no_bar = contextlib.redirect_stderr(io.StringIO())  # transformers has no setting for this progress bar
    with no_bar, as_model_error(f"{path}: transformers cannot read this .gguf file"):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        dequantize = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, quantization_config=dequantize, dtype=torch.float32
        )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    use_legacy_names(target)


def _digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a converted model."""
    return {path.name: file_digest(path) for path in sorted(folder.iterdir()) if path.name != "source.json"}


def _save_merged_base(model: Model, adapter: Path, target: Path) -> None:
    """Save the base of an adapter with the adapter merged, in float32, with the adapter's tokenizer or the base's."""
    from peft import PeftModel

    log.info("merging %s into its base %s", model.path, model.base)
    with tempfile.TemporaryDirectory(prefix="spinlm-base-") as temporary:
        path = prepare_unmerged(model, RunDir(Path(temporary)))
        base = model.base_model.model_copy(update={"path": path})
        with as_model_error(f"{model.path}: this adapter cannot be merged into {model.base}"):
            loaded = load_model(base, path, torch.float32)
            has_new_tokens = _resize_embeddings(loaded, adapter)
            adapted = PeftModel.from_pretrained(loaded, str(adapter))
            result: Any = adapted.load_adapter(str(adapter), "default", torch_device="cpu")
            missing = {name for name in result.missing_keys if "vblora_vector_bank" not in name}  # shared by layers
            check_no_mismatch(missing | {*result.unexpected_keys})
            expected = _sample_logprobs(adapted)
            untied = merge_adapter(adapted, torch.float32)
        save_whole_model(base, loaded, path, target, untied=untied)
        if has_new_tokens:
            loaded.config.save_pretrained(target)
        _save_tokenizer(base, adapter, target)
        save_stop_ids(target, load_stop_ids(base, path))
    del loaded, adapted
    error = (_sample_logprobs(load_model(base, str(target), torch.float32)) - expected).abs().max().item()
    if not error < MAX_MERGE_ERROR:
        raise ModelError(
            f"{model.path}: the merged model's log-probabilities differ from the adapter's by {error:.2g} nats. This "
            "adapter cannot be merged: merge it with the program that made it, and set model.path to the result"
        )


def _save_tokenizer(base: Model, adapter: Path, target: Path) -> None:
    """Copy the tokenizer of an adapter or its base, with the base's chat template if the adapter's has none."""
    tokenizer, file_template = load_start_tokenizer(base, adapter)
    if not copy_tokenizer_files(base, tokenizer_folder(base, adapter), target):
        tokenizer.save_pretrained(target)
    if tokenizer.chat_template != file_template:
        write_chat_template(target, tokenizer.chat_template)


@torch.no_grad()
def _sample_logprobs(model: Any) -> Tensor:
    """Return the log-probabilities of all tokens after each prefix of a fixed text of 32 tokens: [32, V]."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, 32), generator=torch.Generator().manual_seed(0))
    logits: Tensor = model.eval()(input_ids=ids.to(model.device)).logits
    return torch.log_softmax(logits[0].float(), dim=-1)


def _resize_embeddings(model: Any, adapter: Path) -> bool:
    """Give a base the tokens that were added before its adapter was trained. Return whether there are any."""
    from peft.utils import load_peft_weights

    saved, embeddings = load_peft_weights(str(adapter), device="cpu"), model.get_input_embeddings()
    names = [name for name, module in model.named_modules() if module is embeddings]
    stored = [f"{PEFT_PREFIX}{name}{part}.weight" for name in names for part in ("", ".base_layer")]
    rows = [len(saved[name]) for name in stored if name in saved]
    if not rows or rows[0] == embeddings.num_embeddings:
        return False
    model.resize_token_embeddings(rows[0], mean_resizing=False)
    return True


def model_fingerprint(model: Model, recorded: dict[str, Any]) -> dict[str, Any]:
    """Return the SHA-256 of each file of a local model, or the commit of a hub model; for an adapter, also its base's.

    `recorded` is the fingerprint of a resumed run. The hub is asked for a commit that it lacks.
    """
    base = {}
    if model.base is not None:
        with as_base_error(model):
            base = {"base": model_fingerprint(model.base_model, recorded.get("base", {}))}
    path = resolve_model(model.path)
    if path is None:
        commit = recorded.get("commit")
        if commit is None:
            log.info("asking the hub for %s", model.path)
            commit = Repository(model.path, model.revision).commit()
        return {"id": model.path, "commit": commit} | base
    files = [path] if path.is_file() else [file for file in sorted(path.iterdir()) if file.suffix in MODEL_SUFFIXES]
    return {file.name: file_digest(file) for file in files} | base
