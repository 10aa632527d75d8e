"""The training log: one line in train_log.jsonl per optimizer step, and the same numbers for the trackers."""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from spinlm.distributed import processes
from spinlm.errors import MissingPackageError, RecipeError
from spinlm.model.run import Run
from spinlm.rundir.layout import RunDir
from spinlm.utils.atomic import atomic_file


def step_recorder(run: Run, stage: str, t: int) -> Callable[[dict[str, Any]], None]:
    """Return a function that records the measurements of a step.

    If training resumes before the last recorded step, the new lines replace those of the repeated steps.
    """
    if not processes.is_main_process():
        return lambda measured: None
    log_metrics = metrics_logger(run, stage, t)
    lines: int | None = None  # number of lines in the file; None before the lines of repeated steps are removed

    def record(measured: dict[str, Any]) -> None:
        nonlocal lines
        if lines is None:
            lines = _remove_repeated(run.folder, stage, t, int(measured["step"]))
        lines += 1
        line = {"stage": stage, "iteration": t, **measured}
        with run.folder.train_log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        log_metrics({name: value for name, value in measured.items() if name not in ("step", "steps")}, lines)

    return record


def metrics_logger(run: Run, stage: str, t: int) -> Callable[[dict[str, Any], int], None]:
    """Return a function `log_metrics(metrics, step)` that sends metrics to the recipe's trackers.

    Call it in process 0 only. `step` counts the optimizer steps of the whole run.
    """
    if not run.recipe.report_to:
        return lambda measured, step: None
    accelerator = _accelerator(run)

    def log_metrics(measured: dict[str, Any], step: int) -> None:
        numbers = {f"{stage}/{name}": value for name, value in measured.items() if isinstance(value, int | float)}
        accelerator.log({**numbers, "iteration": t}, step=step)

    return log_metrics


def _accelerator(run: Run) -> Any:
    """Return the run's Accelerator with the recipe's trackers. The first call starts them; `Run.close` ends them."""
    if run.accelerator is None:
        from accelerate import Accelerator

        check_trackers(run.recipe.report_to)
        cpu = run.players.device.type == "cpu"
        accelerator = Accelerator(cpu=cpu, log_with=list(run.recipe.report_to), project_dir=run.folder.root)
        name = run.folder.root.absolute().name
        settings = {"wandb": {"name": name, "dir": str(run.folder.root)}, "trackio": {"name": name, "resume": "allow"}}
        accelerator.init_trackers("spinlm", {"recipe": json.dumps(run.recipe.model_dump(mode="json"))}, settings)
        run.accelerator = accelerator
    return run.accelerator


def check_trackers(names: list[str]) -> None:
    """Make sure that Accelerate knows the trackers and that their packages are installed.

    Raises:
        RecipeError: a tracker is unknown.
        MissingPackageError: the package of a tracker is not installed.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = {str(name) for name in LOGGER_TYPE_TO_CLASS}
    available = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in known:
            raise RecipeError(f"report_to: Accelerate knows no tracker {name!r}; known: {', '.join(sorted(known))}")
        if name not in available:
            package = name.replace("_", "-")
            raise MissingPackageError(
                f"report_to: {name} needs a package that is not installed. Run: pip install {package}"
            )


def means_by_epoch(folder: RunDir, stage: str, t: int, name: str) -> list[float]:
    """Return the mean of a measurement over the steps of each epoch, from the lines of a stage in train_log.jsonl.

    Damaged lines are left out.
    """
    values: dict[int, list[float]] = {}
    for _, line in _lines(folder):
        if (line["stage"], line["iteration"]) == (stage, t) and name in line:
            values.setdefault(line["epoch"], []).append(line[name])
    return [sum(epoch) / len(epoch) for epoch in values.values()]


def _remove_repeated(folder: RunDir, stage: str, t: int, step: int) -> int:
    """Remove the stage's lines of this step and later ones, and damaged lines. Return the number of lines left."""
    if not folder.train_log.exists():
        return 0
    kept = [
        text + "\n"
        for text, line in _lines(folder)
        if (line["stage"], line["iteration"]) != (stage, t) or line["step"] < step
    ]
    with atomic_file(folder.train_log, "w") as file:
        file.writelines(kept)
    return len(kept)


def _lines(folder: RunDir) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each line of train_log.jsonl as text and as a value. Damaged lines are left out."""
    if not folder.train_log.exists():
        return
    for text in folder.train_log.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError):  # truncated or damaged
            line = json.loads(text)
            if isinstance(line, dict) and {"stage", "iteration", "step"} <= line.keys():
                yield text, line
