"""Compare recipes: what differs, what a resumed run may change, and a fingerprint of what an iteration depends on."""

import json
from typing import Any

from pydantic import ValidationError

from spinlm.recipe.fields import get_path, value_at
from spinlm.recipe.schema import MUTABLE_FIELDS, PER_ITERATION_FIELDS, Recipe
from spinlm.utils.atomic import short_digest


def recipe_fingerprint(recipe: Recipe, t: int) -> str:
    """Digest of the settings that results up to iteration t depend on.

    Settings with their default values, settings that a resumed run may change, and values of later iterations do not
    count.
    """
    values = recipe.model_dump(mode="json", exclude_defaults=True)
    for name in (*MUTABLE_FIELDS, *PER_ITERATION_FIELDS, "selfplay.iterations"):
        *sections, key = name.split(".")
        section = values
        for part in sections:
            section = section.get(part) or {}
        section.pop(key, None)
        if sections and values.get(sections[0]) == {}:
            del values[sections[0]]
    for name in PER_ITERATION_FIELDS:
        values[name] = [value_at(get_path(recipe, name), iteration) for iteration in range(t + 1)]
    return short_digest(values)


def with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Add the defaults of settings that are newer than a stored recipe. An invalid recipe is returned unchanged."""
    try:
        return Recipe.model_validate(values).model_dump(mode="json")
    except ValidationError:  # a setting that no longer exists: `differences` will list it
        return values


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """List what changed between two JSON values, a line for each field."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted(old.keys() | new.keys()):
            lines += differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        return lines
    return [] if old == new else [f"{path}: was {json.dumps(old)}, is {json.dumps(new)}"]


def incompatible_changes(old: dict[str, Any], new: dict[str, Any], hub_commit: str | None = None) -> list[str]:
    """List the differences between a run's recipe and a new one that a resumed run may not have.

    Allowed are changes of `MUTABLE_FIELDS`, more iterations, values for the added iterations, and pinning the model to
    the commit that the run began with.

    Args:
        old: the run's recipe as plain data.
        new: the new recipe as plain data.
        hub_commit: commit of the Hugging Face model that the run began with, if known.
    """
    old = with_defaults(old)
    pinned = f"model.revision: was null, is {json.dumps(hub_commit)}"
    allowed, played = set(MUTABLE_FIELDS), range(old["selfplay"]["iterations"])
    if new["selfplay"]["iterations"] >= len(played):
        allowed.add("selfplay.iterations")
        for name in PER_ITERATION_FIELDS:
            before, after = get_path(old, name), get_path(new, name)
            if None not in (before, after) and all(value_at(before, t) == value_at(after, t) for t in played):
                allowed.add(name)
    changes = [line for line in differences(old, new) if line != pinned]
    return [line for line in changes if not line.startswith(tuple(f"{name}{end}" for name in allowed for end in ":."))]
