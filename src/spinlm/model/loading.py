"""Finding and loading what a player is made of: the model, its tokenizer, a fresh adapter, saved weights."""

import functools
import logging
import os
import pickle
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from spinlm.errors import ModelError
from spinlm.model.quantize import bnb_config, check_4bit_support, patch_4bit_layers
from spinlm.recipe.schema import Lora, Model
from spinlm.rundir.layout import RunDir
from spinlm.utils.atomic import atomic_path, file_digest, read_json, write_json
from spinlm.utils.model_path import resolve_model

log = logging.getLogger("spinlm")

# What transformers, safetensors and gguf raise when a file is missing, damaged, or of another model.
_LOADING = (ValueError, OSError, KeyError, RuntimeError, struct.error, SafetensorError, pickle.UnpicklingError)


def compute_dtype(model: Model, device: torch.device) -> torch.dtype:
    """The precision that a recipe means on a device."""
    if model.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, model.dtype)
    return dtype


def ensure_base(model: Model, run: RunDir) -> str:
    """Where transformers finds the model: a hub id, a folder, or for a .gguf file a folder it is unpacked to once.

    Raises:
        ModelError: there is no such model, or it cannot be unpacked.
    """
    if model.trust_remote_code:
        warn_of_code()
    # Or transformers asks a service of the hub to turn pickled weights into safetensors, which nobody has asked for.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    path = resolve_model(model.path)
    if path is None:
        return model.path
    if path.suffix == ".gguf":
        _unpack_gguf(path, run.base)
        return str(run.base.absolute())  # a player's adapter notes it as its base
    if not (path / "config.json").exists():
        raise ModelError(f"{path}: no config.json in this folder, so it is not a model. Give the folder that holds it")
    if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        raise ModelError(f"{path}: a model folder without weights (no *.safetensors, no *.bin)")
    return str(path)


@functools.cache
def warn_of_code() -> None:
    """Say once in a process that code which comes with a model is run."""
    log.warning("model.trust_remote_code is on: the code that comes with the model runs on this machine, as you")


def _unpack_gguf(path: Path, folder: Path) -> None:
    """Save a .gguf file as an ordinary model, unless that has been done."""
    source = {"file": path.name, "bytes": path.stat().st_size}
    noted = folder / "source.json"
    if noted.exists():
        known = _unpacked.get(folder) == source
        if known or read_json(noted) == source | {"files": _digests(folder)}:
            _unpacked[folder] = source
            return
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    log.info("unpacking %s into %s", path.name, folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
    except _LOADING as error:
        raise ModelError(f"{path}: transformers cannot read this .gguf file: {error}") from error
    with atomic_path(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / noted.name, source | {"files": _digests(temporary)})
    _unpacked[folder] = source


_unpacked: dict[Path, dict[str, Any]] = {}  # of which file; folders that this process has made, or looked through


def _digests(folder: Path) -> dict[str, str]:
    """What the files of an unpacked model are known by, but for the one that notes it."""
    return {path.name: file_digest(path) for path in sorted(folder.iterdir()) if path.name != "source.json"}


def hub_commit(model: Model) -> str | None:
    """The commit of the hub that a model's name means now; None where that cannot be found out."""
    from transformers.utils.hub import cached_file, extract_commit_hash

    log.info("asking the hub for %s", model.path)
    try:
        found = cached_file(model.path, "config.json", revision=model.revision)
    except OSError:  # loading it will tell
        return None
    return extract_commit_hash(found, None)


def load_tokenizer(model: Model, path: str) -> Any:
    """The tokenizer of a model.

    Raises:
        ModelError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    except _LOADING as error:
        hub = "" if resolve_model(path) else " (no such folder here, so it was looked for on the hub)"
        raise ModelError(f"{path}: the tokenizer cannot be loaded{hub}: {_why(error)}") from error


def stop_ids(model: Model, path: str) -> list[int]:
    """The end tokens that a model's generation config (or else its config) names."""
    from transformers import AutoConfig, GenerationConfig

    revision: dict[str, Any] = {} if model.revision is None else {"revision": model.revision}
    try:
        ids = GenerationConfig.from_pretrained(path, **revision).eos_token_id
    except OSError:
        ids = AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code, **revision).eos_token_id
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def save_stop_ids(folder: Path, ids: Iterable[int]) -> None:
    """Let whoever loads a player from a folder stop where it stopped here; whatever else is there stays."""
    path = folder / "generation_config.json"
    write_json(path, (read_json(path) if path.exists() else {}) | {"eos_token_id": list(ids)})


def load_model(model: Model, path: str, dtype: torch.dtype, *, quantize: bool = False) -> Any:
    """The causal language model in a precision, its linear layers quantised to 4 bits or not.

    Raises:
        ModelError: it cannot be loaded, or comes quantised.
        MissingPackageError: what quantises is not installed.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    origin = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    options: dict[str, Any] = {}
    if quantize:
        check_4bit_support()
        options["quantization_config"] = bnb_config(dtype)
    try:
        if getattr(AutoConfig.from_pretrained(path, **origin), "quantization_config", None):
            raise ModelError(
                f"{path}: its weights come quantised, and such models are not supported. Give the model that it was "
                "made from: with model.load_in_4bit it is quantised when it is loaded"
            )
        loaded = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **origin, **options)
    except ModelError:
        raise
    except _LOADING as error:
        raise ModelError(f"{path}: the model cannot be loaded: {_why(error)}") from error
    if quantize:
        patch_4bit_layers(loaded)
    return loaded


def _why(error: Exception) -> str:
    """The reason, in the library's own words where they do not ask for something dangerous."""
    if isinstance(error, pickle.UnpicklingError):
        return (
            "its weights are a pickle that holds more than tensors, which could run anything and is not opened. Get "
            "the model as safetensors"
        )
    if "custom code" in str(error):
        return (
            "it brings code of its own, which is not run unless the recipe has model.trust_remote_code: true. Read its "
            ".py files first: they run as you"
        )
    return _first_line(error)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def add_adapter(model: Any, lora: Lora, seed: int, revision: str | None = None) -> Any:
    """The model with a fresh LoRA adapter, in float32, whose output is zero; it notes the revision of its base.

    Raises:
        ModelError: no layer has a name in `lora.target_modules`.
    """
    from peft import LoraConfig, get_peft_model

    alpha: Any = lora.alpha  # PEFT declares an int and takes any number
    config = LoraConfig(
        r=lora.r,
        lora_alpha=alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        bias="none",
        task_type="CAUSAL_LM",
        revision=revision,
    )
    torch.manual_seed(seed)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"lora.target_modules: {_first_line(error)}") from error


def load_player(model: Any, folder: Path) -> None:
    """Put a saved player's weights into the model it was made from, in place.

    Raises:
        ModelError: the folder holds no player of this model, or not all of it.
    """
    load = _load_adapter if hasattr(model, "get_base_model") else _load_whole
    try:
        wrong = load(model, folder)
    except ModelError:
        raise
    except _LOADING as error:
        raise ModelError(f"{folder}: not a player of this model: {_first_line(error)}") from error
    if wrong:
        names = ", ".join(sorted(wrong)[:3])
        raise ModelError(f"{folder}: not a player of this model: {len(wrong)} weights missing or unknown ({names} …)")


def _load_adapter(model: Any, folder: Path) -> set[str]:
    """Load an adapter; returns the names that only one side has."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    weights = load_file(folder / "adapter_model.safetensors")
    _check_finite(folder, weights)
    wrong = set(weights) ^ set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if not wrong:
        set_peft_model_state_dict(model, weights)
    return wrong


def _load_whole(model: Any, folder: Path) -> set[str]:
    """Load a whole model; returns the names that only one side has."""
    from transformers import AutoConfig

    kind = AutoConfig.from_pretrained(folder).model_type
    if kind != model.config.model_type:
        raise ValueError(f"it is a {kind} and not a {model.config.model_type}")
    dtype = next(model.parameters()).dtype
    # Through transformers, since for some models the names on disk are not those of the modules.
    fresh, info = type(model).from_pretrained(folder, dtype=dtype, output_loading_info=True)
    wrong = {str(name) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[kind]}
    if not wrong:
        _check_finite(folder, fresh.state_dict())
        model.load_state_dict(fresh.state_dict())
    return wrong


def _check_finite(folder: Path, weights: Mapping[str, Tensor]) -> None:
    if names := not_finite(weights.items()):
        raise ModelError(
            f"{folder}: {names}: training has destroyed this player. Lower train.learning_rate, and run in another "
            "--run-dir"
        )


def not_finite(weights: Iterable[tuple[str, Any]]) -> str:
    """Which weights hold what is no number, or an infinite one, in words; empty for none."""
    names = [name for name, tensor in weights if tensor is not None and not torch.isfinite(tensor).all()]
    return f"{len(names)} weights are not finite ({', '.join(names[:3])} …)" if names else ""


def disable_dropout(model: Any) -> None:
    """Turn off every dropout but the adapter's own, so that an untrained main player equals its opponent.

    Code reads its rate from modules, from their attributes, or from the config: all are set to 0, and a whole model
    that is saved says so in its config.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    for name, value in causal.config.to_dict().items():
        if isinstance(value, float) and _is_dropout(name):
            setattr(causal.config, name, 0.0)
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and ".lora_dropout" not in name:
            module.p = 0.0
        for attribute, value in list(vars(module).items()):
            if isinstance(value, float) and _is_dropout(attribute):
                setattr(module, attribute, 0.0)


def _is_dropout(name: str) -> bool:
    return "dropout" in name or "pdrop" in name
