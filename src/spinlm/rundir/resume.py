"""What a resumed run may change: later iterations and a few settings of the recipe, but neither model nor data."""

from typing import Any

from spinlm.errors import RunError
from spinlm.recipe.fingerprint import differences, incompatible_changes
from spinlm.recipe.load import as_yaml
from spinlm.recipe.schema import Recipe
from spinlm.rundir.layout import RunDir
from spinlm.rundir.provenance import read_recipe, recorded_inputs
from spinlm.utils.atomic import read_json, text_digest, write_text


def claim_recipe(folder: RunDir, recipe: Recipe) -> None:
    """Write the recipe of a run. Once a stage is complete, refuse a recipe that would have given other results.

    Raises:
        RunError: the folder belongs to an incompatible recipe (the message lists the changes), or recipe.yaml was
            edited.
    """
    text, recorded = as_yaml(recipe.model_dump(mode="json")), folder.digest_file(folder.recipe)
    same = recorded.exists() and recorded.read_bytes() == text_digest(text).encode()
    if not same and (changes := recipe_changes(folder, recipe)):
        raise RunError(
            f"{folder.root}: was made with a different recipe:\n"
            + "\n".join(f"  {change}" for change in changes)
            + "\nChoose another --run-dir, or start again with --overwrite (this deletes what is there)"
        )
    if not (same and folder.recipe.exists() and folder.is_unchanged(folder.recipe)):
        write_text(folder.recipe, text)
        folder.record_digest(folder.recipe)


def recipe_changes(folder: RunDir, recipe: Recipe) -> list[str]:
    """List the fields that an incompatible recipe changes. Empty before the first stage is complete.

    Raises:
        RunError: the folder's own recipe.yaml was edited.
    """
    if not (folder.is_run() and folder.has_results()):
        return []
    return incompatible_changes(
        read_recipe(folder), recipe.model_dump(mode="json"), recorded_inputs(folder).get("model", {}).get("commit")
    )


def verify_inputs(folder: RunDir, inputs: dict[str, Any]) -> None:
    """Once a stage is complete, check that the digests of model and data are those in provenance.json.

    Raises:
        RunError: model or data have changed. The message lists the changes.
    """
    if not folder.provenance.exists() or not folder.has_results():
        return
    provenance = read_json(folder.provenance)
    if not isinstance(provenance, dict) or "inputs" not in provenance:
        raise RunError(f"{folder.provenance}: damaged: no digests of model and data. Start again with --overwrite")
    changes = differences(provenance["inputs"], inputs)
    if changes:
        raise RunError(
            f"{folder.root}: the model or data has changed since this run began:\n"
            + "\n".join(f"  {line}" for line in changes)
            + "\nRestore the original files, choose another --run-dir, or start again with --overwrite"
        )
