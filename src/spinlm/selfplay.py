"""The loop.

SPIN (arXiv 2401.01335, algorithm 1): for t = 0 … T−1, the opponent θ_t responds to the prompts, the main player learns
to tell the real responses from the opponent's, and becomes θ_{t+1}.
"""

from pathlib import Path

from spinlm.model.run import Run, open_run
from spinlm.recipe.schema import Recipe
from spinlm.rundir.layout import RunDir
from spinlm.rundir.stage_graph import START
from spinlm.stages.evaluate import evaluate
from spinlm.stages.generate import generate
from spinlm.stages.prepare import prepare
from spinlm.stages.promote import promote
from spinlm.stages.reference_logprobs import reference_logprobs
from spinlm.stages.regime import regime
from spinlm.stages.sft import sft
from spinlm.stages.train import train


def run(recipe: Recipe, run_dir: Path, *, overwrite: bool = False, start_from: Path | None = None) -> RunDir:
    """Play a recipe to its end, or continue an interrupted run.

    Args:
        recipe: the recipe.
        run_dir: the run folder; it is created if it does not exist.
        overwrite: delete the results of an earlier run in the folder.
        start_from: the folder of another run; its start is copied, and with equal settings its first responses.

    Raises:
        SpinError: what went wrong, where, and what to do. Completed work is kept.
    """
    source = None if start_from is None else RunDir(start_from)
    with open_run(recipe, RunDir(run_dir), overwrite=overwrite, start_from=source) as opened:
        play(opened)
    return opened.folder


def play(run: Run) -> None:
    """Play the stages of a run in order. A complete stage does nothing."""
    prepare(run)
    sft(run)
    evaluate(run, START)
    for t in range(run.recipe.selfplay.iterations):
        generate(run, t)  # the opponent θ_t responds to every prompt
        reference_logprobs(run, t)  # log p_θt of the real and the synthetic responses
        regime(run, t)  # is the gradient another one than that of fine-tuning?
        train(run, t)  # the main player becomes θ_{t+1}
        evaluate(run, t)
        if not promote(run, t):
            break
