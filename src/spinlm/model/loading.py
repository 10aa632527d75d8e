"""Load the parts of a player: base model, tokenizer, new LoRA adapter, saved weights."""

import contextlib
import logging
import pickle
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from spinlm.errors import ModelError, first_line
from spinlm.model.base_files import base_folder
from spinlm.model.checkpoint_checks import check_architecture, check_complete, check_folder
from spinlm.model.extrapolate import double_rank, pad_rank
from spinlm.model.families import auto_class
from spinlm.model.quantize import bnb_config, check_4bit_support, patch_4bit_layers
from spinlm.model.trained_layers import target_modules
from spinlm.recipe.model import Lora, Model
from spinlm.utils.atomic import read_json, write_json
from spinlm.utils.hub import Repository
from spinlm.utils.model_path import resolve_model

log = logging.getLogger("spinlm")


@contextlib.contextmanager
def as_model_error(message: str) -> Iterator[None]:
    """Raise a ModelError instead of the errors of transformers, safetensors and gguf for missing or damaged files."""
    try:
        yield
    except ModelError:
        raise
    except (
        ValueError,
        OSError,
        KeyError,
        RuntimeError,
        struct.error,
        SafetensorError,
        pickle.UnpicklingError,
    ) as error:
        raise ModelError(f"{message}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return why loading failed: the message of the library, unless it recommends something dangerous."""
    if isinstance(error, pickle.UnpicklingError):
        return (
            "its weights are a pickle that holds more than tensors. Such a file can run any code, so spinlm does not "
            "open it. Get the model as safetensors"
        )
    if "custom code" in str(error):
        return (
            "its repository contains code, which spinlm runs only with model.trust_remote_code: true. Read its .py "
            "files first: they run as your user"
        )
    if isinstance(error, SafetensorError):
        return f"a .safetensors file is damaged or incomplete ({first_line(error)}). Download or copy it again"
    text = str(error).strip()
    return " ".join(text.splitlines()[1:2]).strip() if text.startswith("Error(s) in loading") else first_line(error)


def compute_dtype(model: Model, device: torch.device) -> torch.dtype:
    """Resolve `model.dtype` for a device."""
    if model.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, model.dtype)
    return dtype


def _from_pretrained(loader: Any, path: str, **options: Any) -> Any:
    """Call `from_pretrained` of a class of transformers; retry if the hub does not answer."""
    return Repository(path, options.get("revision")).call(lambda: loader.from_pretrained(path, **options))


def load_tokenizer(model: Model, path: str) -> Any:
    """Load the tokenizer of a model.

    Raises:
        ModelError: the tokenizer cannot be loaded.
    """
    from transformers import AutoTokenizer

    if folder := resolve_model(path):
        check_folder(folder, trust_remote_code=model.trust_remote_code)
    with as_model_error(f"{path}: the tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(
            base_folder(model, path), revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    tokenizer.init_kwargs.pop("local_files_only", None)  # depends on HF_HUB_OFFLINE; players must not
    return tokenizer


def load_stop_ids(model: Model, path: str) -> list[int]:
    """Return the end tokens in a model's generation config, or in its config if it has no generation config."""
    from transformers import AutoConfig, GenerationConfig

    folder = base_folder(model, path)
    try:
        ids = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
        ids = getattr(config, "eos_token_id", None)
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def save_stop_ids(folder: Path, ids: Iterable[int]) -> None:
    """Set the end tokens in a folder's generation_config.json; other values in the file stay."""
    path = folder / "generation_config.json"
    write_json(path, (read_json(path) if path.exists() else {}) | {"eos_token_id": list(ids)})


def load_model(model: Model, path: str, dtype: torch.dtype, *, load_in_4bit: bool = False) -> Any:
    """Load the causal language model in `dtype`, with its linear layers in 4 bits if `load_in_4bit`.

    Raises:
        ModelError: the model cannot be loaded, is pre-quantized, or this machine does not support 4 bits.
        MissingPackageError: bitsandbytes is not installed.
    """
    from transformers import AutoConfig

    options: dict[str, Any] = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    with as_model_error(f"{path}: the model cannot be loaded"):
        config = _from_pretrained(AutoConfig, path, **options)
        check_architecture(config, path)
        if getattr(config, "quantization_config", None):
            raise ModelError(
                f"{path}: pre-quantized models are not supported. Set model.path, or model.base if model.path is an "
                "adapter, to the unquantized model; model.load_in_4bit: true quantizes it at load "
                "time"
            )
        if load_in_4bit:
            check_4bit_support()
            options["quantization_config"] = bnb_config(dtype)
        loader = auto_class(config)
        loaded, info = _from_pretrained(loader, path, dtype=dtype, output_loading_info=True, **options)
        check_complete(info["missing_keys"], path)
    if config.get_text_config() is not config and loaded.config.get_text_config() is loaded.config:
        log.warning("%s: only its language model is loaded; a merged player has no vision or audio tower", path)
    if load_in_4bit:
        patch_4bit_layers(loaded)
    return loaded


def add_adapter(model: Any, lora: Lora, seed: int, revision: str | None = None, *, double: bool = False) -> Any:
    """Add a new adapter in float32 whose output is zero. The adapter's config records the base's revision.

    With `double`, the adapter has twice the rank of `lora` and the same scale.

    Raises:
        ModelError: no layer has a name in `lora.target_modules`, or such a layer cannot have an adapter.
    """
    from peft import LoraConfig

    alpha: Any = lora.alpha  # PEFT's annotation is int, but any number works
    config = LoraConfig(
        r=lora.r,
        lora_alpha=alpha,
        lora_dropout=lora.dropout,
        target_modules=target_modules(model, lora.target_modules),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        bias="none",
        task_type="CAUSAL_LM",
        revision=revision,
    )
    torch.manual_seed(seed)
    return attach_adapter(model, config, double=double)


def attach_adapter(model: Any, config: Any, *, double: bool = False) -> Any:
    """Add a new adapter in float32 by PEFT's configuration. With `double`, it has twice the rank and the same scale.

    Raises:
        ModelError: no layer has a name in the target modules, or such a layer cannot have an adapter.
    """
    from peft import get_peft_model

    if double:
        for name, value in double_rank(config.to_dict()).items():
            setattr(config, name, value)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"lora.target_modules: {first_line(error)}") from error


def load_player(model: Any, folder: Path, *, pad: bool = False) -> None:
    """Load the weights of a saved player into the model, in place. With `pad`, an adapter may have a lower rank.

    Raises:
        ModelError: the weights in the folder are incomplete, damaged, not finite, or of another model.
    """
    is_adapter = hasattr(model, "get_base_model")
    with as_model_error(f"{folder}: not a player of this model"):
        check_no_mismatch(_load_adapter(model, folder, pad) if is_adapter else _load_full_model(model, folder))


def check_no_mismatch(names: set[str]) -> None:
    """Raise ValueError if there are names of weights that only a file or only the model has."""
    if names:
        raise ValueError(f"{len(names)} weights missing or unknown ({', '.join(sorted(names)[:3])} …)")


def _load_adapter(model: Any, folder: Path, pad: bool) -> set[str]:
    """Load an adapter. Return the names of weights that only the file or only the model has."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    weights = load_file(folder / "adapter_model.safetensors")
    _check_finite(folder, weights)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    mismatched = set(weights) ^ set(expected)
    if not mismatched:
        if pad:
            weights = {name: pad_rank(name, weight, expected[name].shape) for name, weight in weights.items()}
        set_peft_model_state_dict(model, weights)
    return mismatched


def _load_full_model(model: Any, folder: Path) -> set[str]:
    """Load all weights. Return the names of weights that are missing, unknown, or of another shape."""
    from transformers import AutoConfig

    model_type = AutoConfig.from_pretrained(folder).model_type
    if model_type != model.config.model_type:
        raise ValueError(f"it is a {model_type} and not a {model.config.model_type}")
    # `from_pretrained`, because some models have other weight names on disk than in memory.
    dtype = next(model.parameters()).dtype
    saved, info = type(model).from_pretrained(folder, dtype=dtype, output_loading_info=True)
    mismatched = {str(name) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[key]}
    if not mismatched:
        _check_finite(folder, saved.state_dict())
        model.load_state_dict(saved.state_dict())
    return mismatched


def _check_finite(folder: Path, weights: Mapping[str, Tensor]) -> None:
    if message := non_finite_weights(weights.items()):
        raise ModelError(
            f"{folder}: {message}: training diverged. Lower train.learning_rate, and use another --run-dir"
        )


def non_finite_weights(weights: Iterable[tuple[str, Any]]) -> str:
    """Describe the weights that contain NaN or infinite values; empty if there are none."""
    names = [name for name, tensor in weights if tensor is not None and not torch.isfinite(tensor).all()]
    return f"{len(names)} weights are not finite ({', '.join(names[:3])} …)" if names else ""


def disable_dropout(model: Any) -> None:
    """Set every dropout rate except LoRA's to 0, so that an untrained main player equals its opponent.

    Models read the rate from modules, from module attributes, or from the config, so all three are set. A saved full
    model has the rate 0 in its config.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    for name, value in causal_lm.config.to_dict().items():
        if isinstance(value, float) and _is_dropout(name):
            setattr(causal_lm.config, name, 0.0)
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and ".lora_dropout" not in name:
            module.p = 0.0
        for attribute, value in list(vars(module).items()):
            if isinstance(value, float) and _is_dropout(attribute):
                setattr(module, attribute, 0.0)


def _is_dropout(name: str) -> bool:
    return "dropout" in name or "pdrop" in name
