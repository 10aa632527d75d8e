"""Promote: the main player becomes the next opponent; choose the best player; decide whether to continue."""

import logging
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from spinlm.distributed.processes import on_rank_zero
from spinlm.evals.collapse import detect_collapse
from spinlm.model.run import Run
from spinlm.report.compare import improvement, player_values, select_metric
from spinlm.report.summary import collapse_remedy
from spinlm.rundir.stage_graph import START, player_name
from spinlm.utils.atomic import read_json, write_json
from spinlm.utils.statistics import significantly_better, standard_error

log = logging.getLogger("spinlm")


@dataclass(frozen=True)
class Comparison:
    """The difference between a player and the best player before it, on the same held-out prompts."""

    metric: str
    baseline: int  # iteration of the best player before it
    mean_difference: float  # of the paired differences; positive is better
    standard_error: float  # of the mean difference
    better: bool


def promote(run: Run, t: int) -> bool:
    """Point `best` at the best player so far; return whether the run continues.

    A player replaces the best player if the mean of the paired differences exceeds `select.min_standard_errors`
    standard errors. The starting player stays the best until a player is better beyond the noise.
    """
    with run.stage("promote", t) as stage:
        if not stage.done:
            stage.metadata = on_rank_zero(_select, run, t)
            stage.outputs = [run.folder.selection(t)]
    selection = on_rank_zero(run.folder.metadata, "promote", t)
    on_rank_zero(run.folder.set_best, selection["best"])
    return bool(selection["go_on"])


def _select(run: Run, t: int) -> dict[str, Any]:
    """Compare the player with the best one, look for a collapse, and write selection.json."""
    folder, selfplay = run.folder, run.recipe.selfplay
    folder.require("evaluate", START)
    # Read the best player from the marker of the previous iteration, not from the link: a rerun decides the same.
    best = folder.metadata("promote", t - 1)["best"] if t > 0 else START
    folder.require("evaluate", best)
    comparison = compare(run, t, best)
    metrics = (read_json(folder.eval_metrics(iteration)) for iteration in (START, t))
    collapse = detect_collapse(selfplay.guard, *metrics)
    if comparison.better and not collapse:
        best = t
    go_on = t - best < selfplay.select.patience and not collapse
    log.info(
        "iteration %d: %s %s ± %.4f against %s: %s",
        t,
        comparison.metric.replace("_", " "),
        f"{comparison.mean_difference:+z.4f}",
        comparison.standard_error,
        player_name(comparison.baseline),
        "better" if comparison.better else "not better beyond the noise",
    )
    if collapse:
        log.warning(
            "iteration %d: collapse: %s. The run stops; this player becomes neither the best nor the next opponent. %s",
            t,
            collapse,
            collapse_remedy(run.recipe.objective.name),
        )
    elif not go_on and t + 1 < selfplay.iterations:
        log.info("no better player for %d iterations: the run stops", t - best)
    selection = {"best": best, "go_on": go_on, **asdict(comparison), "collapse": collapse}
    write_json(folder.selection(t), selection)
    return selection


def compare(run: Run, t: int, baseline: int) -> Comparison:
    """Compare the players of two iterations on `select.metric`, prompt by prompt."""
    select = run.recipe.selfplay.select
    metric = select_metric(select.metric, run.recipe.evaluate.scorer)
    new, old = player_values(run.folder, t, metric), player_values(run.folder, baseline, metric)
    differences = [improvement(metric, new[key], old[key]) for key in old]
    better = significantly_better(differences, select.min_standard_errors)
    return Comparison(metric, baseline, statistics.fmean(differences), standard_error(differences), better)
