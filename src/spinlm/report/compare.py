"""Compare two players, or two runs, by the paired difference on each held-out prompt. Imports no torch."""

import json
import statistics
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
    recipe, baseline_recipe = read_recipe(run), read_recipe(baseline)
    select = recipe["selfplay"]["select"]
    metric = select_metric(select["metric"], recipe["evaluate"]["scorer"])
    changes = differences(_scoring_settings(baseline_recipe), _scoring_settings(recipe))
    if metric == "task_score" and changes:
        raise RunError(
            f"{run.root} and {baseline.root} cannot be compared: their task scores were measured differently:\n"
            + "\n".join(f"  {line}" for line in changes)
        )
    iteration = _last_common_iteration(run, baseline)
    values, baseline_values = (_values_by_example(folder, iteration, metric) for folder in (run, baseline))
    shared = [example for example in values if example in baseline_values]
    if len(shared) < 2 or 2 * len(shared) < min(len(values), len(baseline_values)):
        raise RunError(
            f"{run.root} and {baseline.root} cannot be compared: they share {len(shared)} held-out examples, of "
            f"{len(values)} and {len(baseline_values)}. Start one of them with --start-from the other"
        )
    improvements = [improvement(metric, values[example], baseline_values[example]) for example in shared]
    names = _names(run, baseline)
    return RunComparison(
        run=names[0],
        baseline=names[1],
        iteration=iteration,
        metric=metric,
        mean_difference=statistics.fmean(improvements),
        standard_error=standard_error(improvements),
        prompts=len(improvements),
        min_standard_errors=select["min_standard_errors"],
    )


def select_metric(metric: str | None, scorer: str | None) -> str:
    """Return the metric that decides which player is better: the recipe's, else by whether it has a scorer."""
    return metric or ("task_score" if scorer else "heldout_nll")


def player_values(folder: RunDir, iteration: int, metric: str) -> dict[str, float]:
    """Return a player's task score or NLL on each held-out example, by the example's id."""
    key = "task_score" if metric == "task_score" else "nll"
    return {row["id"]: float(row[key] or 0.0) for row in read_json_lines(folder.heldout_greedy(iteration))}


def improvement(metric: str, value: float, baseline: float) -> float:
    """Return how much better a value is than the baseline's; negative if it is worse. A lower NLL is better."""
    return value - baseline if metric == "task_score" else baseline - value


def _names(run: RunDir, baseline: RunDir) -> tuple[str, str]:
    """Return the names of two runs: their folders' names, or whole paths where those names are equal."""
    first, second = run.root.absolute(), baseline.root.absolute()
    return (first.name, second.name) if first.name != second.name else (str(first), str(second))


def _scoring_settings(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that a task score depends on, apart from the player."""
    limit = recipe["evaluate"]["max_new_tokens"] or recipe["opponent"]["max_new_tokens"]
    return {"evaluate": recipe["evaluate"] | {"max_new_tokens": limit}}


def _last_common_iteration(run: RunDir, baseline: RunDir) -> int:
    """Return the last iteration that both runs have evaluated and that collapsed in neither."""
    evaluated = []
    for folder in (run, baseline):
        collapsed = {item["iteration"] for item in promotions(folder) if item.get("collapse")}
        evaluated.append({row.iteration for row in player_rows(folder)} - collapsed - {START})
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
