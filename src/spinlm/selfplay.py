"""The loop.

SPIN (arXiv 2401.01335, algorithm 1): for t = 0 … T−1, the opponent θ_t answers the prompts, the main player learns to
tell the real responses from the opponent's, and becomes θ_{t+1}.
"""

import contextlib
from pathlib import Path

from spinlm.branch import branch, check_source
from spinlm.config import EXECUTION_ONLY, Recipe
from spinlm.interrupt import gentle_stop
from spinlm.model.players import stand_up
from spinlm.rundir import START, RunDir
from spinlm.stages.evaluate import evaluate
from spinlm.stages.generate import generate
from spinlm.stages.prepare import prepare
from spinlm.stages.promote import promote
from spinlm.stages.score import score
from spinlm.stages.train import train
from spinlm.stages.warmup import warmup
from spinlm.team import first, joined


def run(recipe: Recipe, run_dir: Path, *, fresh: bool = False, start_from: Path | None = None) -> RunDir:
    """Play a recipe to its end, or on from where it stopped.

    Args:
        recipe: what to do.
        run_dir: the run folder; made if it is not there.
        fresh: delete what an earlier run left in the folder.
        start_from: another run's folder, to take the examples and the starting player from.

    Raises:
        SpinError: with what went wrong, where, and what to do. What was done so far is kept.
    """
    folder = RunDir(run_dir)
    source = None if start_from is None else RunDir(start_from)
    stand_up()  # an earlier run in this process has trained the model it loaded
    with gentle_stop(), joined(), contextlib.ExitStack() as held:
        if source is not None:
            first(check_source, recipe, folder, source)  # before anything is deleted
        first(held.enter_context, folder.locked())
        first(_lay_out, recipe, folder, source, fresh)
        try:
            play(recipe, folder)
        finally:
            stand_up()
    return folder


def _lay_out(recipe: Recipe, folder: RunDir, source: RunDir | None, fresh: bool) -> None:
    if fresh:
        folder.clear()
    folder.bind(recipe.model_dump(mode="json"), EXECUTION_ONLY)
    if source is not None:
        branch(recipe, folder, source)


def play(recipe: Recipe, folder: RunDir) -> None:
    """The stages of a run in order. A stage that is complete does nothing."""
    first(prepare, recipe, folder)
    warmup(recipe, folder)
    evaluate(recipe, folder, START)
    for iteration in range(recipe.selfplay.iterations):
        generate(recipe, folder, iteration)
        score(recipe, folder, iteration)
        train(recipe, folder, iteration)
        evaluate(recipe, folder, iteration)
        if not first(promote, recipe, folder, iteration):
            break
