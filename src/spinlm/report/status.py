"""The state of a run, for people and programs. Reads the run folder only; imports no torch."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spinlm.errors import SpinError
from spinlm.report.regimes import regimes
from spinlm.report.summary import is_control, outcome, player_rows, promotions, start_from, verdict
from spinlm.rundir.layout import RunDir
from spinlm.rundir.provenance import read_recipe
from spinlm.rundir.records import response_splits
from spinlm.rundir.stage_graph import START, StageKey, stage_label, stages
from spinlm.utils.atomic import finite

TAIL_BYTES = 1 << 16  # read from the end of train_log.jsonl to find its last line


@dataclass(frozen=True)
class RunStatus:
    """The state of a run. `str()` gives it in a sentence."""

    stage: str | None  # the first incomplete stage; None where the run is finished
    iteration: int | None  # the stage's iteration; START for the stages before iteration 0
    in_use: bool  # whether a process holds the run folder

    @property
    def state(self) -> str:
        """`finished`, `running` or `stopped`."""
        return "finished" if self.stage is None else "running" if self.in_use else "stopped"

    def __str__(self) -> str:
        if self.stage is None:
            return "The run is finished."
        label = stage_label((self.stage, START if self.iteration is None else self.iteration))
        if self.in_use:
            return f"The run is in progress: {label}."
        return f"The run is not finished: {label} is not complete. Run the same command to continue."


def run_status(folder: RunDir) -> RunStatus:
    """Return the state of a run."""
    missing = next((stage for stage in stages_of(folder) if not folder.marker(*stage).exists()), None)
    judged = promotions(folder)
    if missing is None or (judged and not judged[-1]["go_on"]):
        return RunStatus(None, None, folder.in_use())
    return RunStatus(*missing, folder.in_use())


def status_json(folder: RunDir) -> dict[str, Any]:
    """Return everything known about a run as JSON values."""
    status = run_status(folder)
    values = {
        "run": str(folder.root),
        "state": status.state,
        "stage": status.stage,
        "iteration": status.iteration,
        "seconds": sum(folder.metadata(*stage).get("seconds") or 0.0 for stage in own_stages(folder)),
        "error": last_error(folder),
        "last_step": last_step(folder),
        "best": folder.best(),
        "verdict": verdict(folder),
        "outcome": outcome(folder),
        "regimes": [regime.as_json() for regime in regimes(folder)],
        "players": [
            {"iteration": player.iteration, "name": player.name, **player.metrics} for player in player_rows(folder)
        ],
    }
    return dict(finite(values))


def stage_progress(folder: RunDir, status: RunStatus) -> str | None:
    """Return the progress of the current stage; None where its files do not show it."""
    if status.stage is None or status.iteration is None:
        return None
    if status.stage in ("generate", "reference_logprobs") and folder.marker("prepare", START).exists():
        prompts = folder.metadata("prepare", START)["counts"]
        shard_size = read_recipe(folder)["opponent"]["shard_size"]
        splits = response_splits(is_control=is_control(folder))
        shards = [shard for shard in folder.shards_on_disk(status.stage, status.iteration) if shard[0] in splits]
        done = sum(max(0, min(shard_size, prompts[split] - number * shard_size)) for split, number in shards)
        return f"{done}/{sum(prompts[split] for split in splits)} prompts done (shard size {shard_size})."
    step = last_step(folder)
    if step is None or (step["stage"], step["iteration"]) != (status.stage, status.iteration):
        return None
    measures = "".join(f", {name} {step[name]:.4f}" for name in ("loss", "margin") if name in step)
    return f"Last step: {step['step']}/{step['steps']}{measures}."


def last_error(folder: RunDir) -> str | None:
    """Return the error that ended the last attempt; None where it succeeded or is in progress."""
    if folder.in_use() or not folder.error_file.exists():
        return None
    return folder.error_file.read_text(encoding="utf-8", errors="replace").strip()


def last_step(folder: RunDir) -> dict[str, Any] | None:
    """Return the log entry of the last optimizer step; None before the first, or where the line is damaged."""
    if not folder.train_log.exists():
        return None
    with folder.train_log.open("rb") as file:
        file.seek(max(0, folder.train_log.stat().st_size - TAIL_BYTES))
        lines = file.read().split(b"\n")[:-1]  # text after the last line feed is still being written
    try:
        step: dict[str, Any] | None = json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
    return step if is_step(step) else None


def is_step(line: Any) -> bool:
    """Return whether a value from train_log.jsonl is the entry of an optimizer step."""
    return isinstance(line, dict) and {"stage", "iteration", "step", "steps"} <= line.keys()


def list_status_json(folders: list[RunDir]) -> list[dict[str, Any]]:
    """Return `status_json` of each run. A run that cannot be read has the error as its verdict."""

    def status_or_error(folder: RunDir) -> dict[str, Any]:
        try:
            return status_json(folder)
        except (SpinError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            message = str(error) if isinstance(error, SpinError) else f"{type(error).__name__}: {error}"
            unknown = dict.fromkeys(("stage", "iteration", "seconds", "error", "last_step", "best", "outcome"))
            return {"run": str(folder.root), "state": "damaged", **unknown, "players": [], "verdict": message}

    return [status_or_error(folder) for folder in folders]


def find_runs(parent: Path) -> list[RunDir]:
    """Return the runs in a folder, sorted by name."""
    return [run for path in sorted(parent.glob("*")) if (run := RunDir(path)).is_run()]


def stages_of(folder: RunDir) -> Iterator[StageKey]:
    """Return the stages of a run in order."""
    return stages(read_recipe(folder)["selfplay"]["iterations"])


def own_stages(folder: RunDir) -> Iterator[StageKey]:
    """Yield the stages that this run completed itself, not those of a start taken from another run."""
    taken = start_from(folder) is not None
    own = (stage for stage in stages_of(folder) if not (taken and stage[1] == START))
    return (stage for stage in own if folder.marker(*stage).exists())
