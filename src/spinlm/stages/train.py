"""Train: the main player starts from θ_t and learns to tell the real responses from the opponent's."""

import logging
from collections.abc import Callable

from spinlm.distributed import processes
from spinlm.evals.collapse import detect_collapse
from spinlm.evals.heldout_nll import Curve
from spinlm.model.players import seat
from spinlm.recipe.fingerprint import recipe_fingerprint
from spinlm.recipe.schema import Recipe, value_at
from spinlm.rundir.layout import RunDir
from spinlm.rundir.records import count_shards
from spinlm.rundir.stage_graph import START
from spinlm.training.batches import PairItems, SftItems, pair_objective, sft_objective
from spinlm.training.step_log import step_recorder
from spinlm.training.trainer import Fit, Items, Objective, fit
from spinlm.utils.atomic import read_json
from spinlm.utils.seeds import derive_seed

log = logging.getLogger("spinlm")


def train(recipe: Recipe, run: RunDir, iteration: int) -> None:
    """Train the main player of an iteration and save it as θ_{iteration+1}.

    Raises:
        TrainingError: a loss or gradient was not finite.
    """
    if processes.on_rank_zero(run.done, "train", iteration):
        processes.on_rank_zero(run.remove_checkpoints, "train", iteration)
        return
    processes.on_rank_zero(run.begin, "train", iteration, recipe_fingerprint(recipe, iteration))
    players = seat(recipe, run)
    players.become(iteration - 1)
    settings = recipe.train
    items, objective = _lesson(recipe, run, iteration)
    if len(items.sizes) == 0:
        log.warning("iteration %d: every synthetic response equals the real one; nothing is left to learn", iteration)
    prefix_sharing = run.metadata("sft", START)["prefix_sharing"]
    how = Fit.of(
        settings,
        learning_rate=value_at(settings.learning_rate, iteration),
        seed=derive_seed(recipe.seed, "train", iteration),
    )
    curve = Curve(recipe, run, players, iteration, prefix_sharing)
    watch = _watch(recipe, run, curve, iteration)
    steps = fit(
        players,
        items,
        objective,
        how,
        prefix_sharing=prefix_sharing,
        checkpoints=run.checkpoints(iteration),
        what=f"iteration {iteration}: train",
        on_step=step_recorder(players, run, recipe, "train", iteration),
        on_epoch=watch,
    )
    players.save(iteration)
    facts = {"steps": steps, "pairs": int(items.sizes.sum()), "heldout_nll_by_epoch": curve.values}
    processes.on_rank_zero(run.complete, "train", iteration, [run.player(iteration)], **facts)
    processes.on_rank_zero(run.remove_checkpoints, "train", iteration)


def _lesson(recipe: Recipe, run: RunDir, iteration: int) -> tuple[Items, Objective]:
    """What is trained on, and what is minimised."""
    if recipe.is_control:  # with as many examples in a step as self-play has prompts
        return SftItems(run.examples("train"), recipe.num_synthetic(iteration)), sft_objective
    files = count_shards(run.examples("train"), recipe.opponent.shard_size)
    paths = [run.pairs(iteration, "train", shard) for shard in range(files)]
    return PairItems(paths, recipe.train.batch_size), pair_objective(recipe, iteration)


def _watch(recipe: Recipe, run: RunDir, curve: Curve, iteration: int) -> Callable[[int], bool]:
    """Looks after each epoch whether the real held-out responses have become too unlikely; training then ends there.

    The player is saved as it is, evaluated, and shown; `promote` stops the run. The last epoch is left to evaluation,
    which looks closer.
    """
    guard, epochs = recipe.selfplay.guard, recipe.train.epochs
    if guard is None or epochs == 1:
        return lambda epoch: True
    processes.on_rank_zero(run.require, "evaluate", START)
    start = read_json(run.eval_metrics(START))

    def sound(epoch: int) -> bool:
        if epoch == epochs:
            return True
        signs = detect_collapse(guard, start, {"heldout_nll": curve.measure(epoch)})
        if signs:
            log.warning("iteration %d: collapsing, training ends after epoch %d: %s", iteration, epoch, signs)
        return not signs

    return sound
