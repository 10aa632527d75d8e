"""What a run folder belongs to: one recipe, one model, one data set. Whoever comes with another is refused."""

import contextlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spinlm.errors import RecipeError, RunError
from spinlm.utils.atomic import read_json, short_digest, write_json, write_text

if TYPE_CHECKING:
    from spinlm.rundir.layout import RunDir


def claim_recipe(run: "RunDir", recipe: dict[str, Any], mutable_fields: Collection[str]) -> None:
    """Tie a run folder to a recipe, or once a stage is complete, check that it is still the same one.

    Args:
        run: the folder, held by this process.
        recipe: the whole recipe as plain data.
        mutable_fields: names of fields (section.key) that may change while a run is under way.

    Raises:
        RunError: the folder belongs to a different recipe; the message lists what changed.
    """
    from spinlm.recipe.load import as_yaml

    if not (run.recipe.exists() and run.is_unchanged(run.recipe)) or read_json(run.recipe) != recipe:
        if run.recipe.exists() and run.has_results() and (changed := incompatible_changes(run, recipe, mutable_fields)):
            raise RunError(
                f"{run.root}: was made with a different recipe:\n"
                + "\n".join(f"  {line}" for line in changed)
                + "\nChoose another --run-dir, or start again with --overwrite (this deletes what is there)"
            )
        write_json(run.recipe, recipe)
        run.record_digest(run.recipe)
    # By itself, as an end between the two would leave the recipe for people behind.
    readable, text = run.readable_recipe, as_yaml(recipe)
    if not readable.exists() or readable.read_text(encoding="utf-8", errors="replace") != text:
        write_text(readable, text)


def incompatible_changes(run: "RunDir", recipe: dict[str, Any], mutable_fields: Collection[str]) -> list[str]:
    """What differs between a recipe and the one a run folder belongs to, but for fields that may change.

    More iterations may be asked for, too: they continue the run, with values of their own where a field has one for
    each iteration. And a model of the hub may be pinned to what it was.
    """
    from spinlm.recipe.schema import PER_ITERATION_FIELDS, get_path, value_at

    old = with_defaults(_known_recipe(run))
    found = [line for line in differences(old, recipe) if line != _pinned(run)]
    allowed, played = set(mutable_fields), range(old["selfplay"]["iterations"])
    if recipe["selfplay"]["iterations"] >= len(played):
        allowed.add("selfplay.iterations")
        for name in PER_ITERATION_FIELDS:
            before, now = (get_path(one, name) for one in (old, recipe))
            if None not in (before, now) and all(value_at(before, n) == value_at(now, n) for n in played):
                allowed.add(name)
    return [line for line in found if not any(line.startswith((f"{name}:", f"{name}.")) for name in allowed)]


def verify_inputs(run: "RunDir", inputs: dict[str, Any]) -> None:
    """Check, once a stage is complete, that model and data are those the run folder began with.

    Raises:
        RunError: with what changed.
    """
    if not run.provenance.exists() or not run.has_results():
        return
    noted = read_json(run.provenance)
    if not isinstance(noted, dict) or "inputs" not in noted:
        raise RunError(f"{run.provenance}: damaged: it says nothing of model and data. Start again with --overwrite")
    unknown = 'model.commit: was null, is "', "model.commit: was "  # where the hub could not be asked
    changed = [
        line
        for line in differences(noted["inputs"], inputs)
        if not line.startswith(unknown[0]) and not (line.startswith(unknown[1]) and line.endswith(", is null"))
    ]
    if changed:
        commit = _commit(run)
        remedy = f"Set model.revision={commit}" if commit and "model.commit: " in changed[0] else "Put the old one back"
        raise RunError(
            f"{run.root}: the model or data has changed since this run began:\n"
            + "\n".join(f"  {line}" for line in changed)
            + f"\n{remedy}, choose another --run-dir, or start again with --overwrite"
        )


def _commit(run: "RunDir") -> str | None:
    """The commit of the hub's model that a run began with, if it is one and that is known."""
    noted = read_json(run.provenance) if run.provenance.exists() else {}
    model = noted.get("inputs", {}).get("model", {}) if isinstance(noted, dict) else {}
    return model.get("commit")


def _pinned(run: "RunDir") -> str:
    """How `differences` tells that a model has been pinned to the commit that the run began with."""
    return f"model.revision: was null, is {json.dumps(_commit(run))}"


def read_recipe(run: "RunDir") -> Any:
    """The recipe of a run, as plain data.

    Raises:
        RunError: there is none, or it is not as it was written.
    """
    if not run.recipe.exists():
        raise RunError(f"{run.root}: no run here. `spinlm run RECIPE` makes one")
    if not run.is_unchanged(run.recipe):
        raise RunError(
            f"{run.recipe}: has changed since it was written. `spinlm run` with the run's recipe writes it anew"
        )
    return read_json(run.recipe)


def _known_recipe(run: "RunDir") -> Any:
    """The recipe of a run; where its file has changed, as the one for people has it.

    Raises:
        RunError: that is of no use, either.
    """
    from spinlm.recipe.load import load_recipe

    if run.is_unchanged(run.recipe):
        return read_json(run.recipe)
    try:
        return load_recipe(run.readable_recipe).model_dump(mode="json")
    except RecipeError as error:
        raise RunError(f"{run.recipe}: damaged, and so is {error}. Start again with --overwrite") from error


def recipe_fingerprint(path: Path, iteration: int) -> str | None:
    """What the recipe of a run, at its path, is known by in an iteration, but for what may change while the run is
    under way: later iterations may be added, with values of their own."""
    from pydantic import ValidationError

    from spinlm.recipe.schema import MUTABLE_FIELDS, PER_ITERATION_FIELDS, Recipe, get_path, value_at

    if not path.exists():
        return None
    recipe = read_json(path)
    with contextlib.suppress(ValidationError):  # of another version, whose settings are no longer
        whole = Recipe.model_validate(recipe)
        recipe = whole.model_dump(mode="json", exclude_defaults=True)  # so new settings do no harm
        for name in PER_ITERATION_FIELDS:
            recipe[name] = [value_at(get_path(whole, name), played) for played in range(iteration + 1)]
    for name in (*MUTABLE_FIELDS, *PER_ITERATION_FIELDS, "selfplay.iterations"):
        *sections, last = name.split(".")
        section = recipe
        for one in sections:
            section = (section or {}).get(one)
        if section:
            section.pop(last, None)
        if sections and recipe.get(sections[0]) == {}:  # as if it had not been written
            del recipe[sections[0]]
    return short_digest(recipe)


def with_defaults(recipe: dict[str, Any]) -> dict[str, Any]:
    """A stored recipe with the defaults of settings that are newer than it, so that it compares with today's."""
    from pydantic import ValidationError

    from spinlm.recipe.schema import Recipe

    try:
        return Recipe.model_validate(recipe).model_dump(mode="json")
    except ValidationError:  # a setting that is no longer: it shows up as a difference
        return recipe


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """What changed between two JSON values, a line for each get_path."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted(old.keys() | new.keys()):
            lines += differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
        return lines
    return [] if old == new else [f"{where}: was {json.dumps(old)}, is {json.dumps(new)}"]
