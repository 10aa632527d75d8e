"""The files of a base model other than weights: config, tokenizer, license. Exports copy them byte for byte.

transformers rewrites these files when it saves a model, with names that its older versions and other programs misread.
"""

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from math import prod
from pathlib import Path
from typing import Any

from spinlm.recipe.model import Model
from spinlm.utils.atomic import read_json, write_json
from spinlm.utils.hub import LICENSE_FILES, Repository
from spinlm.utils.model_path import resolve_model

log = logging.getLogger("spinlm")

VOCABULARY_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.*", "tekken.json", "*.model", "*.tiktoken")
"""A folder with a tokenizer has at least one of these files."""

TOKENIZER_FILES = (
    *(*VOCABULARY_FILES, "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("chat_template*", "additional_chat_templates/*.jinja"),
)
MODEL_FILES = ("config.json", "generation_config.json", "*processor_config.json", *LICENSE_FILES)
CODE_FILES = ("*.py",)

CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG = "config.json", "generation_config.json", "tokenizer_config.json"
CHAT_TEMPLATES = ("chat_template*", "additional_chat_templates")
MAX_SHARD_SIZE = "5GB"
STORED_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Names of precisions in safetensors headers and in torch."""


def base_folder(model: Model, path: str) -> Path:
    """Return the folder of a base model. For a hub id, download the small files that the hub cache lacks."""
    return resolve_model(path) or Repository(path, model.revision).folder()


def copy_tokenizer_files(model: Model, source: Path, target: Path) -> bool:
    """Copy the files of a tokenizer, and their code if the recipe trusts it. Return whether there are any."""
    names = _copy(source, target, (*TOKENIZER_FILES, *(CODE_FILES if model.trust_remote_code else ())))
    return bool(names)


def copy_model_files(model: Model, source: Path, target: Path) -> None:
    """Copy config, generation config, processors, license and trusted code. Replace those that transformers wrote."""
    for name in (CONFIG, GENERATION_CONFIG):
        (target / name).unlink(missing_ok=True)
    _copy(source, target, (*MODEL_FILES, *(CODE_FILES if model.trust_remote_code else ())))
    if not (target / GENERATION_CONFIG).exists():  # otherwise transformers would ignore these values of config.json
        config = read_json(target / CONFIG)
        ids = {name: config[name] for name in ("bos_token_id", "pad_token_id") if config.get(name) is not None}
        write_json(target / GENERATION_CONFIG, ids)


def save_whole_model(
    model: Model,
    loaded: Any,
    base: str,
    target: Path,
    weights: Mapping[str, Any] | None = None,
    *,
    untied: bool = False,
) -> None:
    """Save the weights of a model of transformers, with the other files of its base. The tokenizer is not saved.

    Args:
        model: whether to copy code.
        loaded: the model to save.
        base: hub id or folder of the base.
        target: the folder to write.
        weights: the weights, if `loaded` holds shards.
        untied: whether input and output embeddings of a base that shares them differ.
    """
    from transformers import GenerationConfig

    source, dtype = base_folder(model, base), str(loaded.dtype).removeprefix("torch.")
    loaded.generation_config = GenerationConfig()  # transformers refuses to save some of those that it loads
    loaded.save_pretrained(target, state_dict=weights, max_shard_size=MAX_SHARD_SIZE)
    copy_model_files(model, source, target)
    change_config(target, dtype=None if dtype == stored_dtype(source) else dtype, untied=untied)


def _copy(source: Path, target: Path, patterns: Iterable[str]) -> list[str]:
    target.mkdir(parents=True, exist_ok=True)
    files = [path for path in (*source.glob("*"), *source.glob("additional_chat_templates/*")) if path.is_file()]
    names = [path.relative_to(source).as_posix() for path in files]
    copied = [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]
    for name in copied:
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)
    return copied


def write_chat_template(folder: Path, template: str) -> None:
    """Replace the chat template of a tokenizer's folder.

    The template is written twice: new versions of transformers read chat_template.jinja, older versions read
    tokenizer_config.json.
    """
    for pattern in CHAT_TEMPLATES:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    path = folder / TOKENIZER_CONFIG
    write_json(path, (read_json(path) if path.exists() else {}) | {"chat_template": template})


def change_config(folder: Path, *, dtype: str | None = None, untied: bool = False) -> None:
    """Write another precision, and that the embeddings are not tied, into a config.json. Other values stay."""
    path = folder / CONFIG
    config = read_json(path)
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    changes: dict[str, Any] = {}
    for section in sections:
        for key in ("dtype", "torch_dtype"):
            if dtype is not None and section.get(key, dtype) != dtype:
                section[key] = changes[key] = dtype
        if untied and ("tie_word_embeddings" in section or section is config):
            section["tie_word_embeddings"] = changes["tie_word_embeddings"] = False
    if changes:
        write_json(path, config)


def use_legacy_names(folder: Path) -> None:
    """Rename keys that only transformers 5 reads, in a model folder that it saved. Versions 4 and 5 read the result."""
    config = read_json(folder / CONFIG)
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:  # otherwise there are several, by type of layer
        del config["rope_parameters"]
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = None if rope.get("rope_type") == "default" else rope
    write_json(folder / CONFIG, config)
    tokenizer = read_json(folder / TOKENIZER_CONFIG)
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name in ("is_local", "local_files_only"):  # where this machine found the files
        tokenizer.pop(name, None)
    write_json(folder / TOKENIZER_CONFIG, tokenizer)
    if (template := folder / "chat_template.jinja").exists():
        write_chat_template(folder, template.read_text(encoding="utf-8"))


def stored_dtype(folder: Path) -> str:
    """Return the precision of most weights in a model's folder: float32, bfloat16 or float16.

    Weights that are not safetensors count by config.json, and as float32 if it does not say.
    """
    counts: Counter[str] = Counter()
    for path in folder.glob("*.safetensors"):
        for name, tensor in safetensors_header(path).items():
            if name != "__metadata__" and tensor["dtype"] in STORED_DTYPES:
                counts[STORED_DTYPES[tensor["dtype"]]] += prod(tensor["shape"])
    if counts:
        return counts.most_common(1)[0][0]
    config = read_json(folder / CONFIG)
    declared = config.get("dtype") or config.get("torch_dtype")
    return declared if declared in STORED_DTYPES.values() else "float32"


def safetensors_header(path: Path) -> dict[str, Any]:
    """Return the header of a safetensors file: dtype and shape of each tensor by name."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
    return header
