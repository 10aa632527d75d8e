"""Benchmark scores: where they are kept, and the table they make. Imports no torch."""

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


AVERAGED = {
    "open-llm-leaderboard": ("arc_challenge", "truthfulqa_mc2", "winogrande", "gsm8k", "hellaswag", "mmlu"),
}
"""Suites whose mean over these tasks is a number of its own, as in the paper."""


@dataclass(frozen=True)
class Score:
    """What a player reached on one task."""

    value: float  # in the benchmark's own unit: a share from 0 to 1, or points
    standard_error: float | None
    metric: str  # as the benchmark calls it
    examples: int  # how many were asked
    settings: dict[str, Any]  # few-shots, limit, versions: two scores are comparable where these are equal
    counts: dict[str, Any] = field(default_factory=dict)  # what it is made from, and what it leaves out


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


def average(scores: dict[str, Score], tasks: Sequence[str]) -> Score | None:
    """The mean of several tasks, each counting the same; None unless all were measured.

    The tasks share no examples, so the variances of their scores add up: the standard error is √(Σ se²) / n. Without
    one of them there is none.
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
class Scores:
    """What players scored in a suite, as text: a row for each task, and a column for each player."""

    titles: list[str]  # of the columns; the first two hold text, the others numbers
    rows: list[list[str]]
    caption: str


def table(run: RunDir, iterations: Sequence[int], suite: str) -> "Table":
    """`scores_of` as a rich table."""
    from rich.box import SIMPLE
    from rich.table import Table

    scores = scores_of(run, iterations, suite)
    grid = Table(box=SIMPLE, pad_edge=False, padding=(0, 1), caption_justify="left", caption=scores.caption or None)
    for number, title in enumerate(scores.titles):
        grid.add_column(title, justify="left" if number < 2 else "right", no_wrap=True)
    for row in scores.rows:
        grid.add_row(*map(printable, row))
    return grid


def scores_of(run: RunDir, iterations: Sequence[int], suite: str) -> Scores:
    """What players scored in a suite, value ± standard error.

    A score that was measured in another way than the first one of its row is marked: the two cannot be compared.
    """
    measured = {iteration: read_scores(run, iteration).get(suite, {}) for iteration in iterations}
    for scores in measured.values():
        if suite in AVERAGED and (mean := average(scores, AVERAGED[suite])):
            scores["average"] = mean
    marked, rows = False, []
    for task in dict.fromkeys(task for scores in measured.values() for task in scores):
        row = [scores.get(task) for scores in measured.values()]
        first = next(score for score in row if score is not None)
        odd = [score is not None and not comparable(score, first) for score in row]
        marked = marked or any(odd)
        cells = (_cell(score) + " *" * differs for score, differs in zip(row, odd, strict=True))
        rows.append([task.removesuffix(f" {first.metric}"), first.metric, str(first.examples), *cells])
    titles = [suite, "metric", "examples", *map(player_name, iterations)]
    caption = "* measured with other settings than the first score of its row: do not compare the two" if marked else ""
    return Scores(titles, rows, caption)


def comparable(one: Score, other: Score) -> bool:
    """Whether two scores of a task were measured in the same way."""
    return (one.metric, one.settings) == (other.metric, other.settings)


def _cell(score: Score | None) -> str:
    if score is None:
        return "–"
    return f"{score.value:.3f}" + ("" if score.standard_error is None else f" ± {score.standard_error:.3f}")
