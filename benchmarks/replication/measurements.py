"""The runs of a replication and what they measured: metrics by arm, player and seed, and paired differences.

Reads run folders only.
"""

import math
import statistics
from dataclasses import dataclass
from functools import cached_property
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from plan import START as START_ARM
from plan import Plan

from spinlm.evals.scorers import get_scorer
from spinlm.report.regimes import IterationRegime, regimes
from spinlm.rundir.layout import RunDir
from spinlm.rundir.provenance import read_recipe
from spinlm.rundir.stage_graph import START
from spinlm.utils.atomic import read_json, read_json_lines

T_95 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t at 97.5% for 1 … 10 degrees of freedom."""

LOWER_IS_BETTER = ("heldout_nll", "truncated_rate", "repeated_4grams", "kl_from_start")


@dataclass(frozen=True)
class Run:
    """A run folder, complete or not."""

    folder: RunDir
    also: tuple[str, ...] = ()  # further scorers of greedy responses

    @cached_property
    def players(self) -> list[int]:
        """The evaluated players, the start first."""
        return list(takewhile(lambda number: self.folder.marker("evaluate", number).exists(), count(START)))

    @cached_property
    def recipe(self) -> dict[str, Any]:
        return read_recipe(self.folder)

    @property
    def ended(self) -> bool:
        """Whether the run has played all iterations of its recipe, or stopped early by its own rule."""
        if not self.players or not self.folder.marker("promote", self.players[-1]).exists():
            return False
        return self.stopped_early or len(self.players) == 1 + self.recipe["selfplay"]["iterations"]

    @property
    def stopped_early(self) -> bool:
        """Whether the run's own rule ended it after its last player."""
        return not read_json(self.folder.marker("promote", self.players[-1]))["go_on"]

    def steps(self, player: int) -> int:
        """Return the optimizer steps from the start to a player."""
        return sum(read_json(self.folder.marker("train", number)).get("steps", 0) for number in range(player + 1))

    def metrics(self, player: int) -> dict[str, float]:
        """Return a player's metrics; `task_score@T` are the task scores at temperature T, and 0 is greedy."""
        values = dict(read_json(self.folder.eval_metrics(player)))
        by_temperature = {
            "0": values.get("task_score"),
            **values.get("task_score_by_temperature", {}),
            "1": values.get("sampled_task_score"),
        }
        scores = {f"task_score@{name}": score for name, score in by_temperature.items() if score is not None}
        return values | scores | self._further_scores(player)

    @cached_property
    def regimes(self) -> dict[int, IterationRegime]:
        """The regime of each iteration that measured one."""
        return {regime.iteration: regime for regime in regimes(self.folder)}

    def _further_scores(self, player: int) -> dict[str, float]:
        if not self.also:
            return {}
        references = {row["id"]: row["response"] for row in read_json_lines(self.folder.examples("heldout"))}
        rows = list(read_json_lines(self.folder.heldout_greedy(player)))
        return {
            name.partition(":")[2]: statistics.fmean(scorer(row["text"], references[row["id"]]) for row in rows)
            for name in self.also
            for scorer in [get_scorer(name)]
        }


@dataclass(frozen=True)
class Difference:
    """Mean difference over seeds. The interval is Student's t over the differences of the seeds."""

    seeds: list[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.seeds)

    @property
    def half_width(self) -> float:
        """Half the width of the 95% interval; infinite for one seed."""
        number = len(self.seeds)
        if number < 2:
            return math.inf
        return T_95[min(number - 1, len(T_95) - 1)] * statistics.stdev(self.seeds) / math.sqrt(number)

    @property
    def is_above_zero(self) -> bool:
        return bool(self.seeds) and self.mean - self.half_width > 0

    def __str__(self) -> str:
        if not self.seeds:
            return "–"
        low, high = self.mean - self.half_width, self.mean + self.half_width
        return f"{self.mean:+.3f}" + (f" [{low:+.3f}, {high:+.3f}]" if len(self.seeds) > 1 else "")


Values = dict[int, float]
"""A metric by seed."""
PlayerValues = dict[tuple[str, int], Values]
"""A metric by arm, player and seed; higher is better."""
Runs = dict[str, dict[int, Run]]
"""The runs that have ended, by arm and seed."""


def difference(values: Values, baseline: Values) -> Difference:
    """Return the difference over the seeds that both have."""
    return Difference([values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())])


def ended_runs(plan: Plan, split: str, folder: Path, arm: str) -> dict[int, Run]:
    """Return the runs of an arm that have ended, by seed."""
    runs = {seed: Run(RunDir(folder / f"seed-{seed}" / arm), plan.also) for seed in plan.seeds[split]}
    return {seed: run for seed, run in runs.items() if run.ended}


def values_by_player(runs: Runs, metric: str) -> PlayerValues:
    """Return a metric of all players by arm and player, with the sign that makes higher better."""
    sign = -1 if metric in LOWER_IS_BETTER else 1
    values: PlayerValues = {}
    for arm, of_arm in runs.items():
        for seed, run in of_arm.items():
            for player in run.players:
                if (value := run.metrics(player).get(metric)) is not None:
                    key = (START_ARM if player == START else arm, player)
                    values.setdefault(key, {})[seed] = sign * value
    return values


def baseline_values(values: PlayerValues, arm: str | None, player: int) -> Values:
    """Return the values of a baseline's player after the same iteration, or of its last player."""
    players = [number for name, number in values if name == arm and number <= player]
    return values[arm, max(players)] if arm and players else {}


def is_ahead(plan: Plan, arm: str, player: int, values: PlayerValues) -> bool:
    """Return whether the intervals of a lead over tuned and over extrapolated fine-tuning are both above 0."""
    return all(
        difference(values[arm, player], baseline_values(values, baseline, player)).is_above_zero
        for baseline in (plan.tuned, plan.extrapolated)
    )
