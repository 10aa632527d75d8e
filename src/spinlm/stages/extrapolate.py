"""Extrapolate: make a player from that of another run, in place of training."""

from pathlib import Path
from typing import Any

from spinlm.errors import RunError
from spinlm.model.extrapolate import extrapolate
from spinlm.recipe.fields import value_at
from spinlm.recipe.load import parse_recipe
from spinlm.recipe.objective import Extrapolation
from spinlm.recipe.schema import Recipe
from spinlm.report.compare import last_player
from spinlm.report.summary import player_rows
from spinlm.rundir.layout import RunDir
from spinlm.rundir.provenance import read_recipe
from spinlm.rundir.stage_graph import START
from spinlm.utils.atomic import atomic_path


def extrapolation_recipe(source: RunDir, recipe: Recipe, factor: float, iteration: int | None = None) -> Recipe:
    """Return the recipe of a run whose only iteration extrapolates a player of another run.

    Args:
        source: the other run.
        recipe: the recipe of the other run.
        factor: W. 1 gives the player itself, 0 the start.
        iteration: the iteration that made the player; None means the last one that has not collapsed.

    Raises:
        RunError: the run has no such player, or was itself extrapolated.
        RecipeError: the players are DoRA adapters.
    """
    made_from = recipe.objective
    if isinstance(made_from, Extrapolation):
        raise RunError(
            f"{source.root}: was itself extrapolated from {made_from.run}. Extrapolate that run, with --iteration "
            f"{made_from.iteration} --factor {made_from.factor * factor:g}"
        )
    chosen = last_player(source) if iteration is None else iteration
    if chosen is None or chosen not in {row.iteration for row in player_rows(source)}:
        missing = "iteration" if iteration is None else f"iteration {iteration}"
        raise RunError(f"{source.root}: has no evaluated {missing} to extrapolate. `spinlm status` shows its players")
    values = recipe.model_dump(mode="json")
    values["objective"] = {
        "name": "extrapolate",
        "run": str(source.root.resolve()),
        "iteration": chosen,
        "factor": factor,
    }
    values["selfplay"]["iterations"] = 1
    values["train"]["learning_rate"] = value_at(recipe.train.learning_rate, 0)
    return parse_recipe(values, f"recipe of {source.root}, extrapolated")


def write_extrapolated(folder: RunDir, objective: Extrapolation, t: int) -> dict[str, Any]:
    """Write the extrapolated player as the player of iteration `t`. Return what the marker of the stage says of it.

    Raises:
        RunError: the other run is missing, has another start, or a file of its players has changed.
        ModelError: the weights of the players do not fit together.
    """
    source = RunDir(Path(objective.run))
    read_recipe(source)  # raises if there is no run
    if source.player_digest(START) != folder.player_digest(START):
        raise RunError(f"{folder.root}: has another start than {source.root}. Start it with --start-from {source.root}")
    digest = source.player_digest(objective.iteration)
    with atomic_path(folder.player(t)) as target:
        extrapolate(source.player(START), source.player(objective.iteration), objective.factor, target)
    steps = sum(source.metadata("train", number)["steps"] for number in range(objective.iteration + 1))
    return {"steps": steps, "pairs": 0, "extrapolated_from": objective.model_dump() | {"player": digest}}
