"""What is measured, as it is measured: a line in train_log.jsonl for each optimiser step, and a call to the trackers for
it and for each player."""

import json
from collections.abc import Callable
from typing import Any

from spinlm.distributed import processes
from spinlm.model.players import Players
from spinlm.recipe.schema import Recipe
from spinlm.rundir.layout import RunDir
from spinlm.utils.atomic import atomic_file


def step_recorder(
    players: Players, run: RunDir, recipe: Recipe, stage: str, iteration: int
) -> Callable[[dict[str, Any]], None]:
    """A function that records the measurements of a step. Lines of steps that are done again are replaced."""
    if not processes.is_main_process():
        return lambda measured: None
    track = tracker(players, run, recipe, stage, iteration)
    lines: int | None = None  # in the file, once its old lines are gone

    def record(measured: dict[str, Any]) -> None:
        nonlocal lines
        if lines is None:
            lines = _forget(run, stage, iteration, int(measured["step"]))
        lines += 1
        line = {"stage": stage, "iteration": iteration, **measured}
        with run.train_log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        track({name: value for name, value in measured.items() if name not in ("step", "steps")}, lines)

    return record


def tracker(
    players: Players, run: RunDir, recipe: Recipe, stage: str, iteration: int
) -> Callable[[dict[str, Any], int], None]:
    """A function that gives the recipe's trackers what was measured in a stage, and after which optimiser step of the
    run. Called in the first process alone."""
    if not recipe.report_to:
        return lambda measured, step: None
    accelerator = players.accelerator
    if not accelerator.trackers:
        name = run.root.absolute().name
        own = {"wandb": {"name": name, "dir": str(run.root)}, "trackio": {"name": name, "resume": "allow"}}
        accelerator.init_trackers("spinlm", {"recipe": json.dumps(recipe.model_dump(mode="json"))}, own)

    def track(measured: dict[str, Any], step: int) -> None:
        numbers = {f"{stage}/{name}": value for name, value in measured.items() if isinstance(value, int | float)}
        accelerator.log({**numbers, "iteration": iteration}, step=step)

    return track


def _forget(run: RunDir, stage: str, iteration: int, step: int) -> int:
    """Remove the lines of this stage from a step on, and what is no line of ours; returns how many are left."""
    if not run.train_log.exists():
        return 0
    kept = []
    for text in run.train_log.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            line = json.loads(text)
            again = (line["stage"], line["iteration"]) == (stage, iteration) and line["step"] >= step
        except (ValueError, KeyError, TypeError):  # cut off, or damaged
            continue
        if not again:
            kept.append(text + "\n")
    with atomic_file(run.train_log, "w") as file:
        file.writelines(kept)
    return len(kept)
