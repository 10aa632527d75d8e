"""Write the model card of a player: how it was made, how to load it, and its results. Imports no torch."""

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from spinlm.data.sources import names_a_file
from spinlm.errors import ModelError
from spinlm.plan.model_shape import UnknownShapeError, find_config
from spinlm.recipe.model import Model
from spinlm.recipe.schema import Recipe
from spinlm.report.run_data import run_data
from spinlm.report.summary import table_cells
from spinlm.rundir.layout import RunDir
from spinlm.rundir.stage_graph import START, player_name
from spinlm.utils.atomic import read_json
from spinlm.utils.model_path import existing_path, install_command, parse_package_uri, resolve_model

CARD = "README.md"
TEMPLATE = Path(__file__).with_name("model_card.md.jinja")

License = dict[str, Any]
"""The license fields of a card's metadata."""

LICENSE_FIELDS = ("license", "license_name", "license_link")


def render_card(recipe: Recipe, folder: RunDir, iteration: int, *, merged: bool, license: str | None = None) -> str:
    """Return the card of a player to export: its origin, code to load it, its data and its results.

    Args:
        recipe: the recipe of the run.
        folder: the run folder.
        iteration: the iteration of the player.
        merged: whether the adapter is merged into the base model.
        license: license of the player, an SPDX name; None uses the base model's, where its files state one.
    """
    from huggingface_hub import ModelCard, ModelCardData

    run, player = run_data(folder), player_name(iteration)
    commit = run.provenance.get("commit")
    adapter = recipe.lora is not None and not merged
    base_model, first = recipe.model.base_model, public_name(recipe.model.path) if recipe.model.base else None
    base = public_name(base_model.path) + (f" at revision {base_model.revision}" if base_model.revision else "")
    if recipe.merges_adapter:
        base += f" with the adapter {first} merged"
    weights = f"a whole model, trained from {base}"
    if recipe.lora is not None:
        weights = f"a LoRA adapter {'merged into' if merged else 'over'} the base model {base}"
    if recipe.continues_adapter:
        weights += f". Its training began with the adapter {first}"
    fields: License = {"license": license} if license else base_license(base_model)
    titles, body = table_cells(run.players)
    card = ModelCard.from_template(
        ModelCardData(**fields, **_metadata(recipe, iteration, adapter)),
        template_path=str(TEMPLATE),
        title=f"{player.capitalize()} of {run.name}",
        origin=_origin(recipe, iteration),
        version=run.provenance.get("spinlm", metadata.version("spinlm")) + (f" ({commit})" if commit else ""),
        weights=weights,
        adapter=adapter,
        auto_class=_auto_class(base_model),
        four_bit=recipe.model.load_in_4bit,
        results=run,
        table=[titles, ["---", *("---:" for _ in titles[1:])], *body] if body else [],
        player=player,
        data=", ".join(map(public_name, recipe.data.paths)),
        counts=folder.metadata("prepare", START)["counts"],
        max_new_tokens=recipe.evaluate.max_new_tokens or recipe.opponent.max_new_tokens,
        stop_ids=read_json(folder.player(iteration) / "generation_config.json")["eos_token_id"],
        recipe=yaml.safe_dump(_public_recipe(recipe), sort_keys=False, allow_unicode=True).rstrip(),
        license_name=fields.get("license_name") or fields.get("license", ""),
        own_license=license is not None,
        first_adapter=_first_adapter(recipe.model) if recipe.merges_adapter else None,
        **_base_arguments(base_model, _base_commit(run.provenance)),
    )
    return f"{card}\n"


def _metadata(recipe: Recipe, iteration: int, adapter: bool) -> dict[str, Any]:
    """Return the metadata of a card, without the license. Local paths are left out."""
    values: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
    if _on_hub(base := recipe.model.base_model.path):
        values |= {"base_model": base, "base_model_relation": "adapter" if adapter else "finetune"}
    trained = iteration != START or recipe.sft is not None
    if trained and not any(names_a_file(path) or not _on_hub(path) for path in recipe.data.paths):
        values["datasets"] = recipe.data.paths
    if iteration != START and not recipe.is_control:
        values["tags"] = ["dpo"] if recipe.preferences else ["spin", "self-play"]
    return values


def _base_commit(provenance: dict[str, Any]) -> str | None:
    """Return the commit of a base model on the hub that the run began with."""
    model = provenance.get("inputs", {}).get("model", {})
    commit: str | None = model.get("base", model).get("commit")
    return commit


def _first_adapter(model: Model) -> str:
    """Return the argument that loads the adapter in `model.path`, as Python code."""
    if _is_local(model.path):
        return _quote(f"FOLDER OF {Path(model.path).name}")
    return _quote(model.path) + (f", revision={_quote(model.revision)}" if model.revision else "")


def _base_arguments(model: Model, commit: str | None) -> dict[str, Any]:
    """Return the arguments that load the base model, as Python code. The reader replaces the words in capitals."""
    revision = model.revision or commit
    base, package = _quote(model.path), None
    if model.path.startswith("package://"):
        package, file = parse_package_uri(model.path)
        parent = file.rpartition("/")[0]
        base = f"find_spec({_quote(package)}).submodule_search_locations[0]"
        base += f" + {_quote('/' + parent)}" if parent else ""
    elif _is_local(model.path):
        base = _quote(f"FOLDER OF {Path(model.path).name}")
    elif revision:
        base += f", revision={_quote(revision)}"
    return {
        "base": base,
        "package": package,
        "install": install_command(package or ""),
        "gguf": _quote(Path(model.path).name) if model.path.endswith(".gguf") else None,
        "trust": ", trust_remote_code=True" if model.trust_remote_code else "",
    }


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def base_license(model: Model) -> License:
    """Return the license that a base model's own files state; empty where they state none or are missing.

    The files are its card, in the model's folder or the hub cache, or the header of its .gguf file.
    """
    try:
        path = resolve_model(model.path)
    except ModelError:
        return {}
    if path is None:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model.path, CARD, revision=model.revision)
        return _card_license(Path(cached)) if isinstance(cached, str) else {}
    if path.is_dir():
        return _card_license(path / CARD)
    from gguf import GGUFReader

    field = GGUFReader(path).get_field("general.license")
    return {} if field is None else {"license": str(field.contents())}


def _card_license(card: Path) -> License:
    """Return the license in the metadata of a card; empty where the card is missing or malformed."""
    from huggingface_hub import metadata_load

    try:
        values = metadata_load(card) or {}
        return {name: values[name] for name in LICENSE_FIELDS if isinstance(values.get(name), str) and values[name]}
    except Exception:  # another author's file: PyYAML raises even IndexError on a malformed one
        return {}


def _origin(recipe: Recipe, iteration: int) -> str:
    method = "self-play fine-tuning (SPIN, arXiv 2401.01335)"
    if recipe.extrapolates:
        method = "extrapolating the weights of a trained model (ExPO, arXiv 2404.16792)"
    elif recipe.is_control:
        method = "more supervised fine-tuning"
    elif recipe.preferences:
        method = "training on preferences"
    if iteration != START:
        return f"Made in iteration {iteration} of {method}"
    if recipe.sft:
        return f"Made by supervised fine-tuning, as the start of {method},"
    return f"The unchanged base model, the start of {method}"


def _on_hub(path: str) -> bool:
    return not _is_local(path) and path.count("/") < 2 and not path.endswith(".gguf")


def _is_local(path: str) -> bool:
    """Return whether a path names a file or folder of this or another machine, or is a URI."""
    return path.startswith(("/", ".", "~")) or "://" in path or existing_path(path) is not None


def public_name(path: str) -> str:
    """Return a local path without its parent folders. Hub ids and package:// URIs stay whole."""
    return path if path.startswith("package://") or not _is_local(path) else Path(path).name


def _auto_class(model: Model) -> str:
    """Return the name of the class of transformers that loads a model or its merged players."""
    try:
        config, _ = find_config(model)
    except UnknownShapeError:
        config = {}
    if "vision_config" in config:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        if config.get("model_type") not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            return "AutoModelForImageTextToText"
    return "AutoModelForCausalLM"


def _public_recipe(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe without local folders, addresses and commands."""
    values = recipe.model_dump(mode="json", exclude_defaults=True)
    values["model"]["path"] = public_name(recipe.model.path)
    if recipe.model.base is not None:
        values["model"]["base"] = public_name(recipe.model.base)
    names = [public_name(path) for path in recipe.data.paths]
    values["data"]["path"] = names[0] if isinstance(recipe.data.path, str) else names
    template = values["data"].get("chat_template")
    if template and existing_path(template) is not None:
        values["data"]["chat_template"] = public_name(template)
    for name in ("server", "vllm"):
        values.get("opponent", {}).pop(name, None)
    values.pop("report_to", None)
    return values
