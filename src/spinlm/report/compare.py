"""Compare two players, or two runs, by the paired difference on each held-out prompt. Imports no torch."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spinlm.errors import RunError
from spinlm.recipe.fingerprint import differences
from spinlm.report.summary import (
    METRIC_NAMES,
    NLL_CAVEAT,
    count_standard_errors,
    format_improvement,
    player_rows,
    promotions,
)
from spinlm.rundir.layout import RunDir
from spinlm.rundir.provenance import read_recipe
from spinlm.rundir.stage_graph import START
from spinlm.utils.atomic import read_json_lines
from spinlm.utils.statistics import standard_error

NORMAL_95 = statistics.NormalDist().inv_cdf(0.975)
"""Standard errors on each side of a mean that a 95% interval has."""


@dataclass(frozen=True)
class Difference:
    """The mean paired difference of two players over the held-out prompts; positive where the first is better."""

    mean: float
    standard_error: float

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval, by the normal approximation."""
        half = NORMAL_95 * self.standard_error
        return self.mean - half, self.mean + half

    def __str__(self) -> str:
        return f"{self.mean:+z.3f} [{self.interval[0]:+z.3f}, {self.interval[1]:+z.3f}]"


@dataclass(frozen=True)
class RunComparison:
    """The difference between the players of two runs after the same iteration. `str()` gives it in sentences."""

    run: str
    baseline: str
    iteration: int
    metric: str
    mean_difference: float  # over the held-out prompts; positive where `run` is better
    standard_error: float  # of the mean difference
    prompts: int
    min_standard_errors: float  # a difference below this many standard errors counts as none

    @property
    def result(self) -> str:
        """`ahead`, `behind`, or `no difference beyond N standard errors`."""
        if abs(self.mean_difference) > self.min_standard_errors * self.standard_error:
            return "ahead" if self.mean_difference > 0 else "behind"
        return f"no difference beyond {count_standard_errors(self.min_standard_errors)}"

    def __str__(self) -> str:
        title = METRIC_NAMES[self.metric]
        size = f"{format_improvement(self.metric, self.mean_difference)} ± {self.standard_error:.3f}"
        sentences = [
            f"{self.run} vs {self.baseline} after iteration {self.iteration}: {self.result}.",
            f"{title[:1].upper()}{title[1:]} {size} (mean paired difference ± standard error on "
            f"{self.prompts} held-out prompts).",
            "Another seed may differ.",
            *([] if self.metric == "task_score" else [NLL_CAVEAT]),
        ]
        return " ".join(sentences)


def compare_runs(run: RunDir, baseline: RunDir) -> RunComparison:
    """Compare a run with a baseline, such as its control, after the last iteration that both have evaluated.

    The best players are not compared: each was selected on these prompts, and a run with more iterations has more
    players to select from. Collapsed players are skipped.

    Raises:
        RunError: a folder holds no run; the runs have no evaluated iteration in common; their held-out prompts or their
            evaluation differ; or a file is damaged.
    """
    recipe = read_recipe(run)
    read_recipe(baseline)  # raises if there is no run
    select = recipe["selfplay"]["select"]
    metric = select_metric(select["metric"], recipe["evaluate"]["scorer"])
    if metric == "task_score":
        check_same_scoring(run, baseline)
    iteration = _last_common_iteration(run, baseline)
    values, baseline_values = (_values_by_example(folder, iteration, metric) for folder in (run, baseline))
    shared = len(values.keys() & baseline_values.keys())
    if shared < 2 or 2 * shared < min(len(values), len(baseline_values)):
        raise RunError(
            f"{run.root} and {baseline.root} cannot be compared: they share {shared} held-out examples, of "
            f"{len(values)} and {len(baseline_values)}. Start one of them with --start-from the other"
        )
    difference = paired_difference(metric, values, baseline_values)
    names = run_names([run, baseline])
    return RunComparison(
        run=names[0],
        baseline=names[1],
        iteration=iteration,
        metric=metric,
        mean_difference=difference.mean,
        standard_error=difference.standard_error,
        prompts=shared,
        min_standard_errors=select["min_standard_errors"],
    )


def select_metric(metric: str | None, scorer: str | None) -> str:
    """Return the metric that decides which player is better: the recipe's, else by whether it has a scorer."""
    return metric or ("task_score" if scorer else "heldout_nll")


def player_values(folder: RunDir, iteration: int, metric: str) -> dict[str, float]:
    """Return a player's values of a metric on each held-out example, by the example's id.

    The metric is heldout_nll, task_score, sampled_task_score, or task_score_at_ and one of `evaluate.temperatures`.
    """
    temperature = metric.removeprefix("task_score_at_")
    if temperature != metric:
        rows = read_json_lines(folder.heldout_temperatures(iteration))
        return {row["id"]: float(row["task_score"]) for row in rows if f"{row['temperature']:g}" == temperature}
    is_sampled, key = metric == "sampled_task_score", "nll" if metric == "heldout_nll" else "task_score"
    path = folder.heldout_sampled(iteration) if is_sampled else folder.heldout_greedy(iteration)
    return {row["id"]: float(row[key] or 0.0) for row in read_json_lines(path)}


def paired_difference(metric: str, values: Mapping[str, float], baseline: Mapping[str, float]) -> Difference:
    """Return how much better a player is than the baseline, over the examples that both have."""
    improvements = [improvement(metric, value, baseline[key]) for key, value in values.items() if key in baseline]
    return Difference(statistics.fmean(improvements), standard_error(improvements))


def improvement(metric: str, value: float, baseline: float) -> float:
    """Return how much better a value is than the baseline's; negative if it is worse. A lower NLL is better."""
    return baseline - value if metric == "heldout_nll" else value - baseline


def run_names(runs: Sequence[RunDir]) -> list[str]:
    """Return the names of runs: their folders' names, or whole paths where two names are equal."""
    paths = [run.root.absolute() for run in runs]
    names = [path.name for path in paths]
    return names if len({*names}) == len(names) else [str(path) for path in paths]


def check_same_scoring(run: RunDir, baseline: RunDir) -> None:
    """Make sure that the task scores of two runs were measured alike.

    Raises:
        RunError: the scorer or the length limit of the responses differs.
    """
    changes = differences(_scoring_settings(read_recipe(baseline)), _scoring_settings(read_recipe(run)))
    if changes:
        raise RunError(
            f"{run.root} and {baseline.root} cannot be compared: their task scores were measured differently:\n"
            + "\n".join(f"  {line}" for line in changes)
        )


def _scoring_settings(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that a task score depends on, apart from the player."""
    limit = recipe["evaluate"]["max_new_tokens"] or recipe["opponent"]["max_new_tokens"]
    return {"evaluate": {"scorer": recipe["evaluate"]["scorer"], "max_new_tokens": limit}}


def collapsed_iterations(folder: RunDir) -> set[int]:
    """Return the iterations whose player has collapsed."""
    return {item["iteration"] for item in promotions(folder) if item.get("collapse")}


def last_player(folder: RunDir) -> int | None:
    """Return the last evaluated iteration that has not collapsed; the last one if all have; None before the first."""
    later = [row.iteration for row in player_rows(folder) if row.iteration != START]
    kept = [t for t in later if t not in collapsed_iterations(folder)]
    return next(reversed(kept or later), None)


def _last_common_iteration(run: RunDir, baseline: RunDir) -> int:
    """Return the last iteration that both runs have evaluated and that collapsed in neither."""
    evaluated = []
    for folder in (run, baseline):
        evaluated.append({row.iteration for row in player_rows(folder)} - collapsed_iterations(folder) - {START})
    common = evaluated[0] & evaluated[1]
    if not common:
        raise RunError(
            f"{run.root} and {baseline.root} cannot be compared yet: they have no evaluated iteration in common that "
            "has not collapsed"
        )
    return max(common)


def _values_by_example(folder: RunDir, iteration: int, metric: str) -> dict[str, float]:
    """Return a player's values by the tokens of the held-out example: two data sets may use the same ids."""
    folder.require("prepare", START)
    folder.require("evaluate", iteration)
    values = player_values(folder, iteration, metric)
    return {
        json.dumps([row["prompt_ids"], row["response_ids"], row.get("rejected_ids")]): values[row["id"]]
        for row in read_json_lines(folder.examples("heldout"))
    }
