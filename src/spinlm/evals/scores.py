"""Benchmark scores of players: read them, write them, and make tables of them. Imports no torch."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from spinlm.rundir.layout import RunDir
from spinlm.rundir.stage_graph import player_name
from spinlm.utils.atomic import read_json, write_json
from spinlm.utils.console import printable

if TYPE_CHECKING:
    from rich.table import Table


AVERAGED_TASKS = {
    "open-llm-leaderboard": ("arc_challenge", "truthfulqa_mc2", "winogrande", "gsm8k", "hellaswag", "mmlu"),
}
"""Suites that get a row with the mean of these tasks, as in the paper."""

NOTES = {
    "leaderboard-v2": "Raw scores of lm-eval. The leaderboard's pages show them rescaled: chance is 0.",
}
"""Notes below the table of a suite."""


@dataclass(frozen=True)
class Score:
    """The score of a player on one task."""

    value: float  # in the benchmark's unit: a fraction from 0 to 1, or points
    standard_error: float | None
    metric: str  # the benchmark's name for it
    examples: int
    settings: dict[str, Any]  # few-shot number, limit, versions: scores with equal settings are comparable
    counts: dict[str, Any] = field(default_factory=dict)  # what was measured, and what was left out


def read_scores(folder: RunDir, iteration: int) -> dict[str, dict[str, Score]]:
    """Return the scores of a player by suite and task. The dict is empty if nothing was measured."""
    path = folder.benchmarks(iteration)
    if not path.exists():
        return {}
    return {suite: {task: Score(**score) for task, score in tasks.items()} for suite, tasks in read_json(path).items()}


def add_scores(folder: RunDir, iteration: int, suite: str, scores: dict[str, Score], *, replace: bool = False) -> None:
    """Add scores, by task, to those of a player in a suite; with `replace`, remove the other scores of the suite."""
    kept = read_scores(folder, iteration)
    kept[suite] = scores if replace else kept.get(suite, {}) | scores
    write_json(
        folder.benchmarks(iteration),
        {name: {task: asdict(score) for task, score in tasks.items()} for name, tasks in kept.items()},
    )


def average(scores: dict[str, Score], tasks: Sequence[str]) -> Score | None:
    """Return the unweighted mean of several tasks, or None if a task was not measured.

    The tasks share no examples, so the standard error is √(Σ se²) / n. It is None if a task has none.
    """
    if not all(task in scores for task in tasks):
        return None
    parts = [scores[task] for task in tasks]
    errors = [part.standard_error for part in parts if part.standard_error is not None]
    return Score(
        value=sum(part.value for part in parts) / len(parts),
        standard_error=math.hypot(*errors) / len(parts) if len(errors) == len(parts) else None,
        metric="mean",
        examples=sum(part.examples for part in parts),
        settings={task: scores[task].settings for task in tasks},
    )


@dataclass(frozen=True)
class ScoreTable:
    """The scores of players in one suite as text: a row per task, a column per player."""

    titles: list[str]  # of the columns: the suite, metric, examples, and the players
    rows: list[list[str]]
    caption: str


def rich_table(folder: RunDir, iterations: Sequence[int], suite: str) -> "Table":
    """Return the table of a suite for the terminal."""
    from rich.box import SIMPLE
    from rich.table import Table

    scores = score_table(folder, iterations, suite)
    grid = Table(box=SIMPLE, pad_edge=False, padding=(0, 1), caption_justify="left", caption=scores.caption or None)
    for number, title in enumerate(scores.titles):
        grid.add_column(title, justify="left" if number < 2 else "right", no_wrap=True)
    for row in scores.rows:
        grid.add_row(*map(printable, row))
    return grid


def score_table(folder: RunDir, iterations: Sequence[int], suite: str) -> ScoreTable:
    """Return the scores of players in a suite, as value ± standard error.

    A `*` marks a score whose settings differ from those of the first score in its row: the two are not comparable.
    """
    measured = {iteration: read_scores(folder, iteration).get(suite, {}) for iteration in iterations}
    for scores in measured.values():
        if suite in AVERAGED_TASKS and (mean := average(scores, AVERAGED_TASKS[suite])):
            scores["average"] = mean
    any_marked, rows = False, []
    for task in dict.fromkeys(task for scores in measured.values() for task in scores):
        row = [scores.get(task) for scores in measured.values()]
        first = next(score for score in row if score is not None)
        marks = [score is not None and not comparable(score, first) for score in row]
        any_marked = any_marked or any(marks)
        cells = (_cell(score) + " *" * marked for score, marked in zip(row, marks, strict=True))
        rows.append([task.removesuffix(f" {first.metric}"), first.metric, str(first.examples), *cells])
    titles = [suite, "metric", "examples", *map(player_name, iterations)]
    warning = "* has other settings than the first score of its row: do not compare the two" if any_marked else ""
    return ScoreTable(titles, rows, " ".join(filter(None, (NOTES.get(suite), warning))))


def comparable(first: Score, second: Score) -> bool:
    """Whether two scores of a task have the same metric and settings."""
    return (first.metric, first.settings) == (second.metric, second.settings)


def _cell(score: Score | None) -> str:
    if score is None:
        return "–"
    return f"{score.value:.3f}" + ("" if score.standard_error is None else f" ± {score.standard_error:.3f}")
