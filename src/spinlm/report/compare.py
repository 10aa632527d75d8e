"""Two players on the same held-out prompts, by the difference on each of them: within a run, and of two runs.

Reads run folders only; imports no torch.
"""

import json
import statistics
from dataclasses import dataclass
from typing import Any

from spinlm.errors import RunError
from spinlm.report.summary import LIKELIHOOD_ONLY, METRIC_NAMES, format_lead, promotions, rows
from spinlm.rundir.layout import RunDir
from spinlm.rundir.provenance import differences, read_recipe
from spinlm.rundir.stage_graph import START
from spinlm.utils.atomic import read_json_lines
from spinlm.utils.statistics import standard_error


@dataclass(frozen=True)
class RunComparison:
    """How the players of two runs stand against each other after the same iteration. As text, one sentence."""

    run: str
    other: str
    iteration: int
    metric: str
    mean_difference: float  # mean of the paired differences; positive where `run` is better
    standard_error: float
    prompts: int
    standard_errors: float  # how many of them a lead has to exceed
    later: dict[str, int]  # a run that has gone on, to its last iteration

    @property
    def result(self) -> str:
        """`ahead`, `behind`, or `no difference beyond` so many standard errors."""
        if abs(self.mean_difference) > self.standard_errors * self.standard_error:
            return "ahead" if self.mean_difference > 0 else "behind"
        return f"no difference beyond {self.standard_errors:g} standard error{'' if self.standard_errors == 1 else 's'}"

    def __str__(self) -> str:
        later = "".join(f" {name} has gone on to iteration {last}." for name, last in self.later.items())
        return (
            f"{self.run} against {self.other}, both after iteration {self.iteration}: {self.result}; "
            f"{METRIC_NAMES[self.metric]} {format_lead(self.metric, self.mean_difference)} ± {self.standard_error:.3f} (standard "
            f"error of the paired difference on {self.prompts} held-out prompts; another seed may differ)."
            + later
            + ("" if self.metric == "task_score" else LIKELIHOOD_ONLY)
        )


def compare_runs(run: RunDir, other: RunDir) -> RunComparison:
    """Compare a run with another one, say its control, after the last iteration that both have played.

    Not by their best players: these were chosen on the same prompts, and by the run that has more of them more
    favourably. Players that had collapsed are passed over, too.

    Raises:
        RunError: there is no run, or no iteration that both have evaluated; their held-out prompts differ, or answers
            were drawn or scored otherwise; or what they left is damaged.
    """
    ours, theirs = (read_recipe(one) for one in (run, other))
    select = ours["selfplay"]["select"]
    metric = metric_of(select["metric"], ours["evaluate"]["scorer"])
    if metric == "task_score" and (unlike := differences(_measured_by(theirs), _measured_by(ours))):
        raise RunError(
            f"{run.root} and {other.root} cannot be compared, as their answers were measured differently:\n"
            + "\n".join(f"  {line}" for line in unlike)
        )
    iteration = _last_of_both(run, other)
    mine, yours = (_by_example(one, iteration, metric) for one in (run, other))
    both = [example for example in mine if example in yours]
    if len(both) < 2 or 2 * len(both) < min(len(mine), len(yours)):
        raise RunError(
            f"{run.root} and {other.root} cannot be compared: they have {len(both)} held-out examples in common, of "
            f"{len(mine)} and {len(yours)}. Begin one of them with --start-from the other"
        )
    sign = 1 if metric == "task_score" else -1
    leads = [sign * (mine[example] - yours[example]) for example in both]
    roots = [one.root.absolute() for one in (run, other)]
    names = [root.name if roots[0].name != roots[1].name else str(root) for root in roots]
    last = {name: rows(one)[-1].iteration for name, one in zip(names, (run, other), strict=True)}
    return RunComparison(
        run=names[0],
        other=names[1],
        iteration=iteration,
        metric=metric,
        mean_difference=statistics.fmean(leads),
        standard_error=standard_error(leads),
        prompts=len(leads),
        standard_errors=select["min_standard_errors"],
        later={name: reached for name, reached in last.items() if reached > iteration},
    )


def metric_of(chosen: str | None, scorer: str | None) -> str:
    """What players are judged by: the metric that the recipe names, or else task score where there is a scorer."""
    return chosen or ("task_score" if scorer else "heldout_nll")


def values_of(run: RunDir, iteration: int, metric: str) -> dict[str, float]:
    """By held-out example, what a player was measured at."""
    key = "task_score" if metric == "task_score" else "nll"
    return {answer["id"]: float(answer[key] or 0.0) for answer in read_json_lines(run.heldout_greedy(iteration))}


def _measured_by(recipe: dict[str, Any]) -> dict[str, Any]:
    """What the task score of an answer depends on, besides the player."""
    limit = recipe["evaluate"]["max_new_tokens"] or recipe["opponent"]["max_new_tokens"]
    return {"evaluate": recipe["evaluate"] | {"max_new_tokens": limit}}


def _last_of_both(run: RunDir, other: RunDir) -> int:
    played = []
    for one in (run, other):
        collapsed = {judged["iteration"] for judged in promotions(one) if judged.get("collapse")}
        played.append({row.iteration for row in rows(one)} - collapsed - {START})
    if not (both := played[0] & played[1]):
        raise RunError(
            f"{run.root} and {other.root} cannot be compared yet: there is no iteration that both have evaluated and "
            "that has not collapsed"
        )
    return max(both)


def _by_example(run: RunDir, iteration: int, metric: str) -> dict[str, float]:
    """What a player was measured at, by the tokens of the held-out example: ids may be the same in other data."""
    run.require("prepare", START)
    run.require("evaluate", iteration)
    values = values_of(run, iteration, metric)
    return {
        json.dumps([row["prompt_ids"], row["response_ids"], row.get("rejected_ids")]): values[row["id"]]
        for row in read_json_lines(run.examples("heldout"))
    }
