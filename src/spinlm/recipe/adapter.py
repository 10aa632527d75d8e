"""The PEFT adapter that a recipe may start from: its base model and its LoRA settings. Imports no torch."""

import json
from pathlib import Path
from typing import Any

from spinlm.errors import ModelError, RecipeError
from spinlm.recipe.load import parse_recipe
from spinlm.recipe.model import Lora, Model
from spinlm.recipe.schema import Recipe
from spinlm.utils.hub import Repository
from spinlm.utils.model_path import existing_path, looks_local, resolve_model

ADAPTER_CONFIG = "adapter_config.json"

HEADS = {"lm_head", "embed_out", "output_layer"}
"""Names of output heads."""

UNMERGEABLE = {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT"}
"""PEFT types that add tokens or layers to a model instead of changing its weights."""

BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of `init_lora_weights` that change the weights of the base when the adapter is made."""

OTHER_FORWARD = (
    *("alora_invocation_tokens", "layer_replication", "use_qalora", "velora_config", "monteclora_config"),
    *("use_bdlora", "arrow_config", "kasa_config"),
)
"""Settings of PEFT that change what a LoRA layer or the model computes."""


def with_adapter(recipe: Recipe, *, download: bool = False) -> Recipe:
    """Fill in what the adapter in `model.path` decides: its base model and, unless it is merged, the section `lora`.

    A recipe without an adapter, or with one that is not on this machine, is returned unchanged.

    Args:
        recipe: the recipe as the user wrote it.
        download: whether to ask the hub for the files of a hub id. Otherwise only the local cache is read.

    Raises:
        ModelError: the adapter or its base cannot be used.
        RecipeError: the recipe contradicts the adapter.
    """
    model, lora = recipe.model, recipe.lora
    try:
        file = _config_file(model, download)
    except FileNotFoundError:
        return recipe
    if file is None:
        for name, is_set in (("model.base", model.base), ("lora.create_new_adapter", lora and lora.create_new_adapter)):
            if is_set:
                raise RecipeError(f"{name}: {model.path} is a whole model, not an adapter. Remove {name}")
        return recipe
    config = _read(file)
    fault = _fault(config)
    if config.get("task_type") not in (None, "CAUSAL_LM") or config.get("peft_type") in UNMERGEABLE:
        raise ModelError(
            f"{model.path}: {fault or 'an adapter for the task ' + config['task_type']}. spinlm can neither train nor "
            "merge it. Set model.path to a LoRA adapter for CAUSAL_LM or to a whole model"
        )
    values = recipe.model_dump(mode="json")
    values["model"] |= _base(model, config, file.parent)
    if lora is not None and not lora.create_new_adapter:
        if fault:
            raise ModelError(
                f"{model.path}: {fault}, which spinlm cannot train further. Set lora.create_new_adapter: true, which "
                "merges this adapter into its base and trains a new one"
            )
        values["lora"] |= _lora_values(lora, config, model.path)
    result = parse_recipe(values, f"recipe with the adapter {model.path}")
    patterns = [name for name in ("rank_pattern", "alpha_pattern") if config.get(name)]
    if result.continues_adapter and patterns and result.adapter_engine:
        raise RecipeError(
            f"{model.path}: has a {patterns[0]}, which {result.adapter_engine} ignores. Set opponent.engine: local"
        )
    return result


def adapter_files(model: Model) -> Path:
    """Return the folder with the files of the adapter in `model.path`. A hub adapter is downloaded.

    Raises:
        ModelError: the adapter does not exist, or cannot be downloaded.
    """
    path = resolve_model(model.path)
    if path is not None:
        if not any(path.glob("adapter_model.*")):
            raise ModelError(f"{path}: has no adapter_model.safetensors. Copy the adapter again, with all its files")
        return path
    return Repository(model.path, model.revision).folder("adapter_model.*", config=ADAPTER_CONFIG)


def _config_file(model: Model, download: bool) -> Path | None:
    """Return the adapter_config.json of an adapter; None for a whole model.

    Raises:
        FileNotFoundError: the file or folder does not exist, or the hub has not been asked.
        ModelError: the folder holds both an adapter and a whole model.
    """
    try:
        path = resolve_model(model.path)
    except ModelError as error:
        raise FileNotFoundError from error
    if path is None:
        repository = Repository(model.path, model.revision)
        for ask_hub in (False, True) if download else (False,):  # the cache may hold only the second file
            for name in ("config.json", ADAPTER_CONFIG):
                if file := repository.file(name, download=ask_hub):
                    return file if name == ADAPTER_CONFIG else None
        raise FileNotFoundError
    if not (path / ADAPTER_CONFIG).is_file():
        return None
    weights = [file.name for name in ("model*.safetensors", "pytorch_model*.bin") for file in path.glob(name)]
    if weights and (path / "config.json").exists():
        raise ModelError(
            f"{path}: holds an adapter ({ADAPTER_CONFIG}) and a whole model ({weights[0]}). Move one of them to "
            "another folder"
        )
    return path / ADAPTER_CONFIG


def _read(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return {**config, "peft_type": config["peft_type"]}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{file}: not the configuration of a PEFT adapter: {error!r}") from None


def _fault(config: dict[str, Any]) -> str:
    """Say what keeps an adapter from being trained further; empty if nothing does."""
    targets, initial = config.get("target_modules") or [], config.get("init_lora_weights")
    heads = HEADS & {name.rpartition(".")[2] for name in targets} if isinstance(targets, list) else set()
    if config["peft_type"] != "LORA":
        return f"an adapter of the type {config['peft_type']}, not LoRA"
    if modules := config.get("modules_to_save"):
        return f"has whole trained modules (modules_to_save: {', '.join(modules)})"
    if config.get("trainable_token_indices"):
        return "has trained embeddings of single tokens (trainable_token_indices)"
    if heads:
        return f"has LoRA on the output head (target_modules: {', '.join(heads)})"
    if config.get("bias", "none") != "none":
        return f"has trained biases of the base (bias: {config['bias']})"
    if isinstance(initial, str) and initial.startswith(BASE_CHANGING):
        return f"belongs to a base with changed weights (init_lora_weights: {initial})"
    return next((f"has the setting {name}" for name in OTHER_FORWARD if config.get(name)), "")


def _base(model: Model, config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the values of `model.base` and `model.base_revision`.

    A base that the adapter names is looked up in the current folder, as PEFT does, then in the adapter's folder, then
    next to that folder.
    """
    recorded = config.get("base_model_name_or_path")
    if model.base is not None:
        revision = config.get("revision") if model.base == recorded else None
        return {"base_revision": model.base_revision or revision}
    if not recorded:
        raise ModelError(
            f"{model.path}: {ADAPTER_CONFIG} names no base model. Set model.base to the model it was trained on"
        )
    places = (Path(), folder, folder.parent)
    local = next(filter(None, (existing_path(str(place / recorded)) for place in places)), None)
    if local is None and looks_local(recorded):
        raise ModelError(
            f"{model.path}: its base model {recorded} is not on this machine; {ADAPTER_CONFIG} names the folder on the "
            "machine that trained the adapter. Set model.base to a folder or hub id of that model"
        )
    base = recorded if local is None else str(local.absolute())
    return {"base": base, "base_revision": model.base_revision or config.get("revision")}


def _lora_values(lora: Lora, config: dict[str, Any], path: str) -> dict[str, Any]:
    """Return the section `lora` of a recipe that trains an adapter further."""
    targets = config.get("target_modules") or []
    values = {
        "r": config["r"],
        "alpha": config["lora_alpha"],
        "dropout": config.get("lora_dropout", 0.0),
        "target_modules": sorted(targets) if isinstance(targets, list) else targets,
        "use_rslora": bool(config.get("use_rslora")),
        "use_dora": bool(config.get("use_dora")),
    }
    recipe_values = {name: getattr(lora, name) for name in sorted(lora.model_fields_set & values.keys())}
    if isinstance(recipe_values.get("target_modules"), list):
        recipe_values["target_modules"] = sorted(recipe_values["target_modules"])
    conflicts = [name for name, value in recipe_values.items() if value != values[name] and name != "dropout"]
    if conflicts:
        lines = [f"lora.{name}: the recipe has {recipe_values[name]}, the adapter {values[name]}" for name in conflicts]
        raise RecipeError(
            f"{path}: the recipe contradicts this adapter:\n  "
            + "\n  ".join(lines)
            + "\nRemove these keys to train the adapter further, or set lora.create_new_adapter: true to merge it and "
            "train a new one"
        )
    return values | recipe_values
