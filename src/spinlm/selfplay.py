"""The loop.

SPIN (arXiv 2401.01335, algorithm 1): for t = 0 … T−1, the opponent θ_t answers the prompts, the main player learns to
tell the real responses from the opponent's, and becomes θ_{t+1}.
"""

import contextlib
import socket
import time
from pathlib import Path

from spinlm.distributed.processes import all_gather, is_main_process, on_rank_zero, process_group, world_size
from spinlm.errors import PeerError, RecipeError, RunError, SpinError, StoppedError
from spinlm.model.loading import prepare_base_model
from spinlm.model.players import stand_up
from spinlm.recipe.fingerprint import differences
from spinlm.recipe.schema import Recipe
from spinlm.rundir.fork import check_source, fork_from
from spinlm.rundir.layout import RunDir
from spinlm.rundir.resume import claim_recipe
from spinlm.rundir.stage_graph import START
from spinlm.stages.evaluate import evaluate
from spinlm.stages.generate import generate
from spinlm.stages.prepare import prepare
from spinlm.stages.promote import promote
from spinlm.stages.reference_logprobs import score
from spinlm.stages.sft import warmup
from spinlm.stages.train import train
from spinlm.utils.signals import graceful_shutdown

VISIBLE = 10.0  # seconds until what one machine has written is seen by another


def run(recipe: Recipe, run_dir: Path, *, overwrite: bool = False, start_from: Path | None = None) -> RunDir:
    """Play a recipe to its end, or on from where it stopped.

    Args:
        recipe: what to do.
        run_dir: the run folder; made if it is not there.
        overwrite: delete the results of an earlier run in the folder first.
        start_from: another run's folder, to take the examples and the starting player from.

    Raises:
        SpinError: with what went wrong, where, and what to do. What was done so far is kept.
    """
    folder = RunDir(run_dir)
    source = None if start_from is None else RunDir(start_from)
    stand_up()  # an earlier run in this process has trained the model it loaded
    with graceful_shutdown(), process_group(), contextlib.ExitStack() as held:
        _agree(recipe)
        if source is not None:
            on_rank_zero(check_source, recipe, folder, source)  # before anything is deleted
        on_rank_zero(held.enter_context, folder.locked())
        on_rank_zero(_lay_out, recipe, folder, source, overwrite)
        _see(folder)
        on_rank_zero(folder.error_file.unlink, missing_ok=True)
        try:
            play(recipe, folder)
        except Exception as error:  # to be noted; it is raised again, whatever it is
            its_own = isinstance(error, SpinError) or world_size() == 1  # and no echo of what another process met
            if is_main_process() and its_own and not isinstance(error, StoppedError | PeerError):
                folder.write_error(error)
            raise
        finally:
            stand_up()
    return folder


def _agree(recipe: Recipe) -> None:
    """Make sure that all processes were given the same recipe.

    Raises:
        RecipeError: one was given another.
    """
    theirs = all_gather((socket.gethostname(), recipe.model_dump(mode="json")))
    (host, expected), *others = theirs
    for number, (other, found) in enumerate(others, start=1):
        if differing := differences(expected, found):
            raise RecipeError(
                f"process {number} on {other} was given another recipe than process 0 on {host}:\n  "
                + "\n  ".join(differing)
                + "\nStart all processes with the same command"
            )


def _see(folder: RunDir) -> None:
    """Make sure that all processes see the first one's run folder, on a network file system after a while.

    Raises:
        RunError: one does not.
    """
    expected = on_rank_zero(folder.lock_owner)
    deadline = time.monotonic() + VISIBLE
    while (seen := folder.lock_owner()) != expected and time.monotonic() < deadline:
        time.sleep(0.5)
    for number, (host, same) in enumerate(all_gather((socket.gethostname(), seen == expected))):
        if not same:
            raise RunError(
                f"{folder.root.absolute()}: process {number} on {host} does not see the folder that the first process "
                "writes to. It has to be on a file system that all machines share: choose another --run-dir"
            )


def _lay_out(recipe: Recipe, folder: RunDir, source: RunDir | None, overwrite: bool) -> None:
    if overwrite:
        folder.clear()
    claim_recipe(folder, recipe)
    if source is not None:
        fork_from(recipe, folder, source)


def play(recipe: Recipe, folder: RunDir) -> None:
    """The stages of a run in order. A stage that is complete does nothing."""
    on_rank_zero(prepare, recipe, folder)
    on_rank_zero(prepare_base_model, recipe.model, folder)
    warmup(recipe, folder)
    evaluate(recipe, folder, START)
    for iteration in range(recipe.selfplay.iterations):
        generate(recipe, folder, iteration)
        score(recipe, folder, iteration)
        train(recipe, folder, iteration)
        evaluate(recipe, folder, iteration)
        if not on_rank_zero(promote, recipe, folder, iteration):
            break
