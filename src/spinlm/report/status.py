"""How far a run has come. Reads the run folder only; imports no torch."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spinlm.errors import SpinError
from spinlm.report.summary import is_control, outcome, promotions, rows, start_from, verdict
from spinlm.rundir.layout import RunDir
from spinlm.rundir.stage_graph import START, Stage, stage_label, stages
from spinlm.utils.atomic import finite, read_json

TAIL = 1 << 16  # bytes in which the last line of a file of steps is looked for


@dataclass(frozen=True)
class RunStatus:
    """Where a run is."""

    stage: str | None  # the first that is not complete; None where the run is finished
    iteration: int | None  # the stage's; START before the first
    under_way: bool  # whether a process holds the run folder

    @property
    def state(self) -> str:
        """finished, under way, or stopped."""
        return "finished" if self.stage is None else "under way" if self.under_way else "stopped"

    def __str__(self) -> str:
        if self.stage is None:
            return "The run is finished."
        where = stage_label((self.stage, START if self.iteration is None else self.iteration))
        if self.under_way:
            return f"The run is under way, in {where}."
        return f"The run is not finished: {where} is not complete. The same command goes on there."


def run_status(run: RunDir) -> RunStatus:
    """Where a run is."""
    missing = next((one for one in stages_of(run) if not run.marker(*one).exists()), None)
    judged = promotions(run)
    if missing is None or (judged and not judged[-1]["go_on"]):
        return RunStatus(None, None, run.in_use())
    return RunStatus(*missing, run.in_use())


def status(run: RunDir) -> dict[str, Any]:
    """All that is known about a run, for programs."""
    where = run_status(run)
    players = rows(run)
    told = {
        "run": str(run.root),
        "state": where.state,
        "stage": where.stage,
        "iteration": where.iteration,
        "seconds": sum(read_json(marker).get("seconds") or 0.0 for marker in _markers(run)),
        "failure": failure(run),
        "last_step": last_step(run),
        "best": run.best(),
        "verdict": verdict(run),
        "outcome": outcome(run),
        "players": [{"iteration": row.iteration, "name": row.name, **row.metrics} for row in players],
    }
    return dict(finite(told))


def stage_progress(run: RunDir, where: RunStatus) -> str | None:
    """How far the stage is in which a run stands, as far as its files tell; None where they do not."""
    if where.stage is None or where.iteration is None:
        return None
    if where.stage in ("generate", "reference_logprobs") and run.marker("prepare", START).exists():
        counts, size = run.metadata("prepare", START)["counts"], read_json(run.recipe)["opponent"]["shard_size"]
        of = {split: counts[split] for split in (("heldout",) if is_control(run) else ("train", "heldout"))}
        shards = [shard for shard in run.shards_on_disk(where.stage, where.iteration) if shard[0] in of]
        done = sum(max(0, min(size, of[split] - shard * size)) for split, shard in shards)
        return f"{done} of {sum(of.values())} prompts are through, in shards of up to {size}."
    step = last_step(run)
    if step is None or (step["stage"], step["iteration"]) != (where.stage, where.iteration):
        return None
    told = "".join(f", {name} {step[name]:.4f}" for name in ("loss", "margin") if name in step)
    return f"Last step: {step['step']} of {step['steps']}{told}."


def failure(run: RunDir) -> str | None:
    """How the last attempt at a run has failed; None where it has not, or is still under way."""
    if run.in_use() or not run.error_file.exists():
        return None
    return run.error_file.read_text(encoding="utf-8", errors="replace").strip()


def last_step(run: RunDir) -> dict[str, Any] | None:
    """What the last optimiser step measured; None before the first."""
    if not run.train_log.exists():
        return None
    with run.train_log.open("rb") as file:
        file.seek(max(0, run.train_log.stat().st_size - TAIL))
        lines = file.read().split(b"\n")[:-1]  # what follows the last line's end is still being written
    try:
        step: dict[str, Any] | None = json.loads(lines[-1]) if lines else None
    except ValueError:  # damaged
        return None
    return step if is_step(step) else None


def is_step(line: Any) -> bool:
    """Whether a line of train_log.jsonl is what a step has left, and not damaged."""
    return isinstance(line, dict) and {"stage", "iteration", "step", "steps"} <= line.keys()


def status_of_all(found: list[RunDir]) -> list[dict[str, Any]]:
    """As `status`, of each run; one that cannot be read says why in the place of its verdict."""

    def one(run: RunDir) -> dict[str, Any]:
        try:
            return status(run)
        except (SpinError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            why = str(error) if isinstance(error, SpinError) else f"{type(error).__name__}: {error}"
            unknown = dict.fromkeys(("stage", "iteration", "seconds", "failure", "last_step", "best", "outcome")) | {
                "players": []
            }
            return {"run": str(run.root), "state": "damaged", **unknown, "verdict": why}

    return [one(run) for run in found]


def find_runs(folder: Path) -> list[RunDir]:
    """The runs in a folder, by name."""
    found = sorted(path.parent for path in folder.glob(f"*/{RunDir(folder).recipe.name}"))
    return [RunDir(path) for path in found]


def stages_of(run: RunDir) -> Iterator[Stage]:
    """The stages of a run in order, as its recipe has them."""
    return stages(read_json(run.recipe)["selfplay"]["iterations"])


def _markers(run: RunDir) -> Iterator[Path]:
    """Of the stages that this run has done itself."""
    taken = start_from(run) is not None
    own = (one for one in stages_of(run) if not (taken and one[1] == START))
    return (marker for one in own if (marker := run.marker(*one)).exists())
