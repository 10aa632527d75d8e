"""Refuse models and folders that cannot be trained, with an error that says what they are."""

import contextlib
from pathlib import Path
from typing import Any

from spinlm.errors import ModelError
from spinlm.model.base_files import CONFIG, VOCABULARY_FILES

_TASKS = {
    "ForMaskedLM": "an encoder",
    "ForSequenceClassification": "a classifier or a reward model",
    "ForTokenClassification": "a classifier of tokens",
    "ForQuestionAnswering": "a model that marks answers in a text",
    "ForMultipleChoice": "a classifier",
    "ForPreTraining": "an encoder",
    "ForImageClassification": "a classifier of images",
}
"""Endings of class names in config.json, and what such a model is."""

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def check_architecture(config: Any, path: str) -> None:
    """Check that a config belongs to a causal language model.

    Raises:
        ModelError: the config belongs to another kind of model.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    name = next(iter(config.architectures or ()), type(config).__name__)
    kind = next((kind for ending, kind in _TASKS.items() if name.endswith(ending)), None)
    if config.is_encoder_decoder:
        kind = "an encoder with a decoder"
    mappings = (AutoModelForCausalLM._model_mapping, AutoModelForImageTextToText._model_mapping)
    if kind is None and not any(type(config) in mapping for mapping in mappings):
        kind = None if getattr(config, "auto_map", None) else "a model without a language model head"
    if kind is not None:
        raise ModelError(
            f"{path}: {name} is {kind}, not a causal language model. Set model.path to a model that was trained to "
            "write text from left to right"
        )


def check_complete(missing: set[str], path: str) -> None:
    """Check that a checkpoint has all weights of the model. transformers fills in random weights for the others.

    Raises:
        ModelError: weights are missing.
    """
    if missing:
        names = ", ".join(sorted(missing)[:3])
        raise ModelError(
            f"{path}: the files lack {len(missing)} weights of the model ({names}{' …' if len(missing) > 3 else ''}). "
            "The files belong to another kind of model, or are incomplete"
        )


def check_files(folder: Path) -> None:
    """Check that a folder holds weights.

    Raises:
        ModelError: the folder has no weights, or has pointers of Git LFS in place of weights.
    """
    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    if not files:
        raise ModelError(f"{folder}: a model folder without weights (no *.safetensors, no *.bin)")
    for file in files:
        with file.open("rb") as stream:
            if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise ModelError(
                    f"{file}: is a pointer of Git LFS, not the weights. Run `git lfs pull` in the model's repository"
                )


def check_folder(folder: Path, *, trust_remote_code: bool) -> None:
    """Check that a folder of a model or adapter has a tokenizer, and that the model is a causal language model.

    Raises:
        ModelError: the folder has no tokenizer, or another kind of model.
    """
    from transformers import AutoConfig

    if (folder / CONFIG).exists():
        with contextlib.suppress(ValueError, OSError, KeyError):  # raised again when the model is loaded
            check_architecture(AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code), str(folder))
    if not any(any(folder.glob(name)) for name in VOCABULARY_FILES):
        raise ModelError(
            f"{folder}: the tokenizer cannot be loaded: the folder has none (tokenizer.json, tokenizer.model, "
            "…). Copy the files of the model's tokenizer into it"
        )
