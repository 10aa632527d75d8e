"""Everything the report shows of a run, read from its folder; the run may be unfinished."""

import contextlib
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

from spinlm.evals.scores import ScoreTable, read_scores, score_table
from spinlm.recipe.fingerprint import with_defaults
from spinlm.report.regimes import IterationRegime, regimes
from spinlm.report.status import is_step, own_stages, run_status
from spinlm.report.summary import COLUMNS, PlayerRow, compared_player, display_text, player_rows, verdict
from spinlm.rundir.layout import RunDir
from spinlm.rundir.provenance import read_recipe
from spinlm.rundir.stage_graph import START, player_name
from spinlm.utils.atomic import read_json, read_json_lines

REPORT_COLUMNS = (*COLUMNS, ("probe_auc", "probe AUC", "{:.2f}"), ("kl_from_start", "KL from start", "{:.3f}"))
"""Columns of the report's table of players: metric, title, number format."""

SIDE_BY_SIDE = 20
"""Prompts whose responses the report shows side by side."""


@dataclass(frozen=True)
class PromptResponses:
    """A held-out prompt with the real response and the players' responses."""

    gain: float  # of the compared player over the start; positive is better
    messages: list[dict[str, str]]  # the prompt
    real: str
    responses: list[tuple[str, str, float | None]]  # player, text, task score


@dataclass(frozen=True)
class StageTime:
    """Wall-clock time of one stage or of several."""

    seconds: float | None  # None where it was not recorded
    lower_bound: bool  # an interrupted stage was resumed; time before the interruption is not included


@dataclass(frozen=True)
class RunData:
    """The contents of a run folder; each file is read once."""

    folder: RunDir
    recipe: dict[str, Any]
    players: list[PlayerRow]

    @property
    def name(self) -> str:
        return self.folder.root.absolute().name

    @property
    def recipe_text(self) -> str:
        return self.folder.recipe.read_text(encoding="utf-8")

    @cached_property
    def verdict(self) -> str:
        return verdict(self.folder)

    @cached_property
    def status(self) -> str:
        return str(run_status(self.folder))

    @cached_property
    def provenance(self) -> dict[str, Any]:
        return _read_if_present(self.folder.provenance)

    @cached_property
    def skipped(self) -> dict[str, Any]:
        """Counts of rows that `prepare` skipped, by reason."""
        return _read_if_present(self.folder.skipped_rows)

    @cached_property
    def times(self) -> list[tuple[str, dict[str, StageTime]]]:
        """The time of each stage that this run completed itself, by player."""
        times: dict[str, dict[str, StageTime]] = {}
        for stage, iteration in own_stages(self.folder):
            metadata = self.folder.metadata(stage, iteration)
            time = StageTime(metadata.get("seconds"), bool(metadata.get("resumed")))
            times.setdefault(player_name(iteration), {})[stage] = time
        return list(times.items())

    @cached_property
    def total_time(self) -> StageTime:
        own = [time for _, stages in self.times for time in stages.values()]
        return StageTime(sum(time.seconds or 0.0 for time in own), any(time.lower_bound for time in own))

    @cached_property
    def opponents(self) -> list[tuple[int, dict[str, Any]]]:
        """What `reference_logprobs` recorded of the opponent's responses, by iteration."""
        recorded = []
        for iteration in count(0):
            if not self.folder.marker("reference_logprobs", iteration).exists():
                break
            metadata = self.folder.metadata("reference_logprobs", iteration)
            recorded.append((iteration, metadata.get("train") or metadata["heldout"]))
        return recorded

    @cached_property
    def regimes(self) -> list[IterationRegime]:
        """The regime of each iteration in which it was measured."""
        return regimes(self.folder)

    @cached_property
    def benchmarks(self) -> list[ScoreTable]:
        """Benchmark scores, one table per suite."""
        measured = [row.iteration for row in self.players if self.folder.benchmarks(row.iteration).exists()]
        suites = dict.fromkeys(suite for iteration in measured for suite in read_scores(self.folder, iteration))
        return [score_table(self.folder, measured, suite) for suite in suites]

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """The log entries of all optimizer steps. A damaged or half-written line is skipped."""
        return list(_steps(self.folder.train_log))

    @cached_property
    def examples(self) -> list[dict[str, Any]]:
        """The held-out examples."""
        if not self.folder.marker("prepare", START).exists():
            return []
        path = self.folder.examples("heldout")
        self.folder.check_outputs("prepare", START, path)
        return list(read_json_lines(path))

    @cached_property
    def responses(self) -> dict[int, dict[str, dict[str, Any]]]:
        """The greedy responses to the held-out prompts, by iteration and example id."""
        responses = {}
        for t in (player.iteration for player in self.players):
            path = self.folder.heldout_greedy(t)
            self.folder.check_outputs("evaluate", t, path)
            responses[t] = {row["id"]: row for row in read_json_lines(path)}
        return responses

    @property
    def real_tokens(self) -> float | None:
        """Mean number of tokens of the real held-out responses."""
        return statistics.fmean(len(row["response_ids"]) for row in self.examples) if self.examples else None

    @property
    def columns(self) -> list[tuple[str, str, str]]:
        """Columns of the table of players, without metrics that no player has."""
        return [column for column in REPORT_COLUMNS if any(column[0] in player.metrics for player in self.players)]

    @property
    def compared(self) -> PlayerRow | None:
        return compared_player(self.players)

    def side_by_side(self, prompts: int = SIDE_BY_SIDE, *, all_players: bool = True) -> list[PromptResponses]:
        """Return the responses to some held-out prompts.

        Prompts on which the start and the compared player differ come first, the largest gains and losses before all:
        in task score, or without a scorer in the NLL of the real response.

        Args:
            prompts: most prompts to return.
            all_players: whether to include every player, or only the start and the player compared with it.
        """
        if not self.players:
            return []
        first, second = self.players[0], self.compared or self.players[0]
        shown = [player for player in self.players if all_players or player in (first, second)]
        rows = []
        for example in self.examples:
            old, new = (self.responses[player.iteration][example["id"]] for player in (first, second))
            gain = new["task_score"] - old["task_score"] if self.scored else old["nll"] - new["nll"]
            rows.append((old["text"] == new["text"], -abs(gain), gain, example))
        rows.sort(key=lambda row: row[:2])
        return [
            PromptResponses(
                gain,
                example["messages"],
                example["response"],
                [
                    (player.name, _response_text(response), response["task_score"])
                    for player in shown
                    for response in (self.responses[player.iteration][example["id"]],)
                ],
            )
            for _, _, gain, example in rows[:prompts]
        ]

    @property
    def temperatures(self) -> list[str]:
        """The temperatures of `evaluate.temperatures`, as in the metrics."""
        return list(self.players[0].metrics.get("task_score_by_temperature", {})) if self.players else []

    @property
    def scored(self) -> bool:
        """Whether the recipe has a scorer, so that responses have a task score."""
        return bool(self.recipe["evaluate"]["scorer"])

    @property
    def system_prompt(self) -> str | None:
        """The system prompt of the first held-out example, if it has one."""
        if not self.examples:
            return None
        first = self.examples[0]["messages"][0]
        return str(first["content"]) if first["role"] == "system" else None


def run_data(folder: RunDir) -> RunData:
    """Open a run folder for reading."""
    return RunData(folder, with_defaults(read_recipe(folder)), player_rows(folder))


def _response_text(response: dict[str, Any]) -> str:
    return display_text(response["text"], response["finished"], len(response["token_ids"]))


def _read_if_present(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _steps(path: Path) -> Iterator[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    for line in lines:
        with contextlib.suppress(ValueError):
            step = json.loads(line)
            if is_step(step):
                yield step
