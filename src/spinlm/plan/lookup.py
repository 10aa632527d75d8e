"""Where a model's shape is written: its config.json, its .gguf header, the hub cache, or a table of published ones."""

import json
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

from spinlm.errors import ModelError
from spinlm.plan.model_shape import Shape, UnknownShapeError, shape_from_config
from spinlm.recipe.schema import Model
from spinlm.utils.model_path import resolve_model


def find_shape(model: Model) -> tuple[Shape, str]:
    """The shape of a recipe's model, and where it was read.

    Raises:
        UnknownShapeError: it can be read nowhere; says what is missing and how to get it.
    """
    try:
        path, cached = resolve_model(model.path), _cached_folder(model)
    except ModelError as missing:
        raise UnknownShapeError(str(missing)) from None
    if path is None and (cached / "config.json").is_file():
        return shape_from_config(_json_config(cached)), "read from config.json in the local hub cache"
    if path is not None and path.is_file():
        return shape_from_config(_gguf_config(path)), f"read from the header of {path.name}"
    if path is not None:
        return shape_from_config(_json_config(path)), f"read from config.json in {path}"
    base = model.path.removesuffix("-Instruct")
    if base not in _PUBLISHED:
        raise UnknownShapeError(
            f"{model.path} is not in the local hub cache. `hf download {model.path} config.json` puts its shape there"
        )
    return shape_from_config(dict(zip(_KEYS, _PUBLISHED[base], strict=True))), f"published config of {base}"


_MISTRAL_7B = ("mistral", 32000, 4096, 32, 32, 8, 14336, 32768, False)
_GPT2 = ("gpt2", 50257, 768, 12, 12, 12, 3072, 1024, True)
_PUBLISHED = {
    "EleutherAI/gpt-neo-2.7B": ("gpt_neo", 50257, 2560, 32, 20, 20, 10240, 2048, True),
    "HuggingFaceH4/mistral-7b-sft-beta": _MISTRAL_7B,
    "HuggingFaceTB/SmolLM2-135M": ("llama", 49152, 576, 30, 9, 3, 1536, 8192, True),
    "HuggingFaceTB/SmolLM2-360M": ("llama", 49152, 960, 32, 15, 5, 2560, 8192, True),
    "HuggingFaceTB/SmolLM2-1.7B": ("llama", 49152, 2048, 24, 32, 32, 8192, 8192, True),
    "Qwen/Qwen2.5-7B": ("qwen2", 152064, 3584, 28, 28, 4, 18944, 131072, False),
    "alignment-handbook/zephyr-7b-sft-full": _MISTRAL_7B,
    "gpt2": _GPT2,
    "meta-llama/Llama-3.1-8B": ("llama", 128256, 4096, 32, 32, 8, 14336, 131072, False),
    "meta-llama/Llama-3.1-70B": ("llama", 128256, 8192, 80, 64, 8, 28672, 131072, False),
    "mistralai/Mistral-7B-v0.1": _MISTRAL_7B,
    "openai-community/gpt2": _GPT2,
}
"""Sizes from the config.json of well-known models, so that their plans need no network."""
_KEYS = (
    *("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "max_position_embeddings", "tie_word_embeddings"),
)


def _cached_folder(model: Model) -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE) / f"models--{model.path.replace('/', '--')}"
    revision = model.revision or "main"
    reference = folder / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    return folder / "snapshots" / commit


def _json_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnknownShapeError(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise UnknownShapeError(f"{path} holds no model configuration")
    return config


_GGUF_SIZES = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
}
_GGUF_STRING, _GGUF_ARRAY = 8, 9
_GGUF_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}


def _gguf_config(path: Path) -> dict[str, Any]:
    """A .gguf file's header in the words of a config.json.

    Read by hand: the gguf package's reader makes an array of every token of the vocabulary, which takes seconds.
    """
    try:
        with path.open("rb") as file:
            values, tensors = _gguf_header(file)
    except (OSError, ValueError, KeyError, OverflowError, MemoryError, struct.error) as error:
        raise UnknownShapeError(f"{path} is not a readable .gguf file: {error}") from None
    family = values.get("general.architecture")
    return {
        "model_type": family,
        "vocab_size": values.get("tokenizer.ggml.tokens"),
        "tie_word_embeddings": "output.weight" not in tensors,
        **{name: values.get(f"{family}.{key}") for name, key in _GGUF_SIZES.items()},
    }


def _gguf_header(file: BinaryIO) -> tuple[dict[str, Any], set[str]]:
    """Metadata (of an array its length) and the tensors' names."""

    def take(form: str) -> Any:
        return struct.unpack(form, file.read(struct.calcsize(form)))[0]

    def text() -> str:
        return file.read(take("<Q")).decode("utf-8", "replace")

    def value(kind: int) -> Any:
        if kind != _GGUF_ARRAY:
            return text() if kind == _GGUF_STRING else take(_GGUF_NUMBERS[kind])
        element, count = take("<I"), take("<Q")
        if element == _GGUF_STRING:
            for _ in range(count):
                file.seek(take("<Q"), os.SEEK_CUR)
        else:
            file.seek(count * struct.calcsize(_GGUF_NUMBERS[element]), os.SEEK_CUR)
        return count

    if take("4s") != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    _version, tensors, values = take("<I"), take("<Q"), take("<Q")
    metadata = {text(): value(take("<I")) for _ in range(values)}
    names = set()
    for _ in range(tensors):
        names.add(text())
        take(f"{8 * take('<I') + 12}s")  # sizes, type and offset
    return metadata, names
