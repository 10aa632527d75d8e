"""What a run folder says about its run, however far that came."""

import contextlib
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

from spinlm.evals.scores import Scores, read_scores, scores_of
from spinlm.report.status import is_step, run_status, stages_of
from spinlm.report.summary import COLUMNS, Row, rows, start_from, text_of, verdict
from spinlm.rundir.layout import RunDir
from spinlm.rundir.provenance import with_defaults
from spinlm.rundir.stage_graph import START, player_name
from spinlm.utils.atomic import read_json, read_json_lines

SHOWN = 20
"""Prompts whose answers are shown side by side."""

EXTREMES = 5
"""Largest wins, and as many losses."""


@dataclass(frozen=True)
class ResponseDiff:
    """A held-out prompt on which a later player did much better or worse than the start."""

    by: float
    prompt: str
    real: str
    before: str
    after: str


@dataclass(frozen=True)
class Comparison:
    """What the players answered to a held-out prompt."""

    prompt: list[dict[str, str]]  # messages
    real: str
    answers: list[tuple[str, str, float | None]]  # player, text, task score


@dataclass(frozen=True)
class Spent:
    """Time by the clock; `at_least`, where a stage went on with what an interruption had left."""

    seconds: float | None  # None where it was not kept
    at_least: bool
    elsewhere: bool = False  # by the run that the start was taken from


@dataclass(frozen=True)
class RunData:
    """A run, read once."""

    run: RunDir
    recipe: dict[str, Any]
    players: list[Row]

    @property
    def name(self) -> str:
        return self.run.root.absolute().name

    @property
    def recipe_text(self) -> str:
        path = self.run.readable_recipe
        return (
            path.read_text(encoding="utf-8", errors="replace") if path.exists() else json.dumps(self.recipe, indent=1)
        )

    @cached_property
    def verdict(self) -> str:
        return verdict(self.run)

    @cached_property
    def provenance(self) -> dict[str, Any]:
        return _read(self.run.provenance, {})

    @cached_property
    def skipped(self) -> dict[str, Any]:
        return _read(self.run.skipped_rows, {})

    @cached_property
    def times(self) -> list[tuple[str, dict[str, "Spent"]]]:
        """What each complete stage took, by player."""
        found: dict[str, dict[str, Spent]] = {}
        source = start_from(self.run)
        for stage, iteration in stages_of(self.run):
            if self.run.marker(stage, iteration).exists():
                noted = self.run.metadata(stage, iteration)
                elsewhere = source is not None and iteration == START
                spent = Spent(noted.get("seconds"), bool(noted.get("resumed")), elsewhere)
                found.setdefault(player_name(iteration), {})[stage] = spent
        return list(found.items())

    @cached_property
    def spent(self) -> "Spent":
        """What all complete stages of this run took."""
        each = [spent for _, stages in self.times for spent in stages.values() if not spent.elsewhere]
        return Spent(sum(one.seconds or 0.0 for one in each), any(one.at_least for one in each))

    @cached_property
    def state(self) -> str:
        """How far the run has come, in a sentence."""
        return str(run_status(self.run))

    @cached_property
    def opponents(self) -> list[tuple[int, dict[str, Any]]]:
        """By iteration, what `score` noted of its opponent's responses."""
        found = []
        for iteration in count(0):
            if not self.run.marker("reference_logprobs", iteration).exists():
                break
            noted = self.run.metadata("reference_logprobs", iteration)
            found.append((iteration, noted.get("train") or noted["heldout"]))
        return found

    @cached_property
    def benchmarks(self) -> list[Scores]:
        """Benchmark scores, a table for each suite."""
        measured = [row.iteration for row in self.players if self.run.benchmarks(row.iteration).exists()]
        suites = dict.fromkeys(suite for iteration in measured for suite in read_scores(self.run, iteration))
        return [scores_of(self.run, measured, suite) for suite in suites]

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """Every optimiser step, as far as its line can be read: the last may still be written."""
        return list(_steps(self.run.train_log))

    @cached_property
    def examples(self) -> list[dict[str, Any]]:
        """The held-out examples."""
        path = self.run.examples("heldout")
        return list(read_json_lines(path)) if path.exists() else []

    @cached_property
    def answers(self) -> dict[int, dict[str, dict[str, Any]]]:
        """By player and prompt, what was answered to the held-out prompts."""
        return {
            row.iteration: {one["id"]: one for one in read_json_lines(self.run.heldout_greedy(row.iteration))}
            for row in self.players
        }

    @property
    def real_tokens(self) -> float | None:
        """Mean length of the real held-out responses."""
        return statistics.fmean(len(one["response_ids"]) for one in self.examples) if self.examples else None

    @property
    def table(self) -> list[tuple[str, str, str]]:
        """Which measures to show for each player: key, title, and the format of a number."""
        columns = (*COLUMNS, ("probe_auc", "probe_auc", "{:.2f}"), ("kl_from_start", "kl_from_start", "{:.3f}"))
        return [column for column in columns if any(column[0] in row.metrics for row in self.players)]

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Answers side by side; prompts on which the first and the last player differ come first."""
        if not self.players:
            return []
        first, last = (self.answers[row.iteration] for row in (self.players[0], self.players[-1]))
        order = sorted(self.examples, key=lambda one: first[one["id"]]["text"] == last[one["id"]]["text"])
        return [
            Comparison(
                one["messages"],
                one["response"],
                [
                    (row.name, text_of(answer), answer["task_score"])
                    for row in self.players
                    for answer in (self.answers[row.iteration][one["id"]],)
                ],
            )
            for one in order[:SHOWN]
        ]

    @property
    def compared(self) -> Row | None:
        """Who is held against the start: the best player, or the last where the start is the best."""
        later = self.players[1:]
        return next((row for row in later if row.best), later[-1] if later else None)

    @property
    def scored(self) -> bool:
        """Whether the recipe names a scorer, so that answers have a task score."""
        return bool(self.recipe["evaluate"]["scorer"])

    @cached_property
    def changes(self) -> tuple[list[ResponseDiff], list[ResponseDiff]]:
        """The largest wins and losses against the start: of task score, or else of the real response's NLL."""
        if self.compared is None:
            return [], []
        start, other = self.answers[START], self.answers[self.compared.iteration]
        found = []
        for one in self.examples:
            before, after = start[one["id"]], other[one["id"]]
            by = after["task_score"] - before["task_score"] if self.scored else before["nll"] - after["nll"]
            found.append(
                ResponseDiff(by, one["messages"][-1]["content"], one["response"], text_of(before), text_of(after))
            )
        found.sort(key=lambda change: change.by)
        losses = [change for change in found[:EXTREMES] if change.by < 0]
        wins = [change for change in found[::-1][:EXTREMES] if change.by > 0]
        return wins, losses


def facts(run: RunDir) -> RunData:
    """Read a run folder."""
    return RunData(run, with_defaults(read_json(run.recipe)), rows(run))


def _read(path: Path, otherwise: Any) -> Any:
    return read_json(path) if path.exists() else otherwise


def _steps(path: Path) -> Iterator[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    for line in lines:
        with contextlib.suppress(ValueError):
            step = json.loads(line)
            if is_step(step):
                yield step
