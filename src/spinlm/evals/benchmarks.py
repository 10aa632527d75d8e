"""Benchmark scores: where they are kept, and the table they make. Imports no torch."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from spinlm.files import read_json, write_json
from spinlm.rundir import START, RunDir

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Score:
    """What a player reached on one task."""

    value: float  # in the benchmark's own unit: a share from 0 to 1, or points
    standard_error: float | None
    metric: str  # as the benchmark calls it
    examples: int  # how many were asked
    settings: dict[str, Any]  # few-shots, limit, versions: two scores are comparable where these are equal


def read_scores(run: RunDir, iteration: int) -> dict[str, dict[str, Score]]:
    """The scores of an iteration's player, by suite and task; empty where none was measured."""
    path = run.benchmarks(iteration)
    if not path.exists():
        return {}
    return {suite: {task: Score(**score) for task, score in tasks.items()} for suite, tasks in read_json(path).items()}


def add_scores(run: RunDir, iteration: int, suite: str, scores: dict[str, Score], *, anew: bool = False) -> None:
    """Keep scores beside those that are there; a task measured again gets its new score.

    With `anew` the suite was measured as a whole, so that its older scores go.
    """
    kept = read_scores(run, iteration)
    kept[suite] = scores if anew else kept.get(suite, {}) | scores
    write_json(
        run.benchmarks(iteration),
        {name: {task: asdict(score) for task, score in tasks.items()} for name, tasks in kept.items()},
    )


def table(run: RunDir, iterations: Sequence[int], suite: str) -> "Table":
    """A rich table with a row for each task of a suite and a column for each player, value ± standard error."""
    from rich.box import SIMPLE
    from rich.table import Table

    measured = {iteration: read_scores(run, iteration).get(suite, {}) for iteration in iterations}
    grid = Table(box=SIMPLE, pad_edge=False, padding=(0, 1))
    for title in (suite, "metric"):
        grid.add_column(title, no_wrap=True)
    for iteration in iterations:
        grid.add_column("start" if iteration == START else f"iteration {iteration}", justify="right", no_wrap=True)
    for task in dict.fromkeys(task for scores in measured.values() for task in scores):
        metric = next(scores[task].metric for scores in measured.values() if task in scores)
        grid.add_row(task, metric, *(_cell(scores.get(task)) for scores in measured.values()))
    return grid


def _cell(score: Score | None) -> str:
    if score is None:
        return "–"
    return f"{score.value:.3f}" + ("" if score.standard_error is None else f" ± {score.standard_error:.3f}")
