"""Promote: the main player becomes the next opponent; choose the best player so far; decide whether to go on."""

import logging
import statistics
from dataclasses import dataclass

from spinlm.evals.collapse import detect_collapse
from spinlm.recipe.fingerprint import recipe_fingerprint
from spinlm.recipe.schema import Recipe
from spinlm.report.compare import lead, player_values, select_metric
from spinlm.rundir.layout import RunDir
from spinlm.rundir.stage_graph import START
from spinlm.utils.atomic import read_json, write_json
from spinlm.utils.statistics import significantly_better, standard_error

log = logging.getLogger("spinlm")


@dataclass(frozen=True)
class Comparison:
    """How far a player is ahead of the best so far, on the same held-out prompts."""

    metric: str
    baseline: int  # iteration of the best player so far
    mean_difference: float  # paired, over the held-out prompts; positive is better
    standard_error: float
    better: bool


def promote(recipe: Recipe, run: RunDir, iteration: int) -> bool:
    """Point `best` at the best player so far; returns whether another iteration is worth it.

    A player replaces the best only when it is ahead by more than `select.min_standard_errors` standard errors of the
    paired difference, so the starting player stays best until one is better beyond the noise.
    """
    if run.done("promote", iteration):
        judged = run.metadata("promote", iteration)
        run.set_best(judged["best"])
        return bool(judged["go_on"])
    run.require("evaluate", START)
    run.begin("promote", iteration, recipe_fingerprint(recipe, iteration))
    # The best before this iteration comes from the markers, not the link, so that a rerun decides the same.
    best = run.metadata("promote", iteration - 1)["best"] if iteration > 0 else START
    run.require("evaluate", best)
    comparison = compare(recipe, run, iteration, best)
    measured = (read_json(run.eval_metrics(one)) for one in (START, iteration))
    collapse = detect_collapse(recipe.selfplay.guard, *measured)
    if comparison.better and not collapse:
        best = iteration
    go_on = iteration - best < recipe.selfplay.select.patience and not collapse
    run.set_best(best)
    log.info(
        "iteration %d: %s %s ± %.4f against %s: %s",
        iteration,
        comparison.metric.replace("_", " "),
        f"{comparison.mean_difference:+z.4f}",
        comparison.standard_error,
        "the start" if comparison.baseline == START else f"iteration {comparison.baseline}",
        "better" if comparison.better else "not better beyond the noise",
    )
    if collapse:
        log.warning(
            "iteration %d: collapsed: %s. Stopping; its player becomes neither the best nor the next opponent. "
            "Lower train.learning_rate in another --run-dir",
            iteration,
            collapse,
        )
    elif not go_on and iteration + 1 < recipe.selfplay.iterations:
        log.info("no better player for %d iterations: stopping", iteration - best)
    facts = {
        "best": best,
        "go_on": go_on,
        "metric": comparison.metric,
        "baseline": comparison.baseline,
        "mean_difference": comparison.mean_difference,
        "standard_error": comparison.standard_error,
        "better": comparison.better,
        "collapse": collapse,
    }
    write_json(run.selection(iteration), facts)
    run.complete("promote", iteration, [run.selection(iteration)], **facts)
    return go_on


def compare(recipe: Recipe, run: RunDir, iteration: int, baseline: int) -> Comparison:
    """Compare the players of two iterations on `select.metric`, prompt by prompt."""
    select = recipe.selfplay.select
    metric = select_metric(select.metric, recipe.evaluate.scorer)
    new, old = player_values(run, iteration, metric), player_values(run, baseline, metric)
    ahead = [lead(metric, new[key], old[key]) for key in old]
    better = significantly_better(ahead, select.min_standard_errors)
    return Comparison(metric, baseline, statistics.fmean(ahead), standard_error(ahead), better)
