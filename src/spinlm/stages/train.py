"""Train: the main player starts from θ_t and learns to tell the real responses from the opponent's."""

import logging
from collections.abc import Callable

from spinlm import team
from spinlm.config import Recipe, at_iteration
from spinlm.evals.guard import signs_of_collapse
from spinlm.files import read_json
from spinlm.model.fit import Fit, Items, Objective, fit
from spinlm.model.players import seat
from spinlm.order import START
from spinlm.rundir import RunDir
from spinlm.seeds import derive_seed
from spinlm.shards import count_shards
from spinlm.stages.curve import Curve
from spinlm.stages.items import PairItems, SftItems, pair_objective, sft_objective
from spinlm.stages.steps import recorder

log = logging.getLogger("spinlm")


def train(recipe: Recipe, run: RunDir, iteration: int) -> None:
    """Train the main player of an iteration and save it as θ_{iteration+1}.

    Raises:
        TrainingError: a loss or gradient was not finite.
    """
    if team.first(run.done, "train", iteration):
        team.first(run.tidy, "train", iteration)
        return
    team.first(run.begin, "train", iteration, run.checkpoints(iteration))
    players = seat(recipe, run)
    players.become(iteration - 1)
    settings = recipe.train
    items, objective = _lesson(recipe, run, iteration)
    if len(items.sizes) == 0:
        log.warning("iteration %d: every synthetic response equals the real one; nothing is left to learn", iteration)
    packing = run.facts("warmup", START)["packing"]
    how = Fit.of(
        settings,
        learning_rate=at_iteration(settings.learning_rate, iteration),
        seed=derive_seed(recipe.seed, "train", iteration),
    )
    curve = Curve(recipe, run, players, iteration, packing)
    watch = _watch(recipe, run, curve, iteration)
    steps = fit(
        players,
        items,
        objective,
        how,
        packing=packing,
        checkpoints=run.checkpoints(iteration),
        what=f"iteration {iteration}: train",
        on_step=recorder(players, run, recipe, "train", iteration),
        on_epoch=watch,
    )
    players.save(iteration)
    facts = {"steps": steps, "pairs": int(items.sizes.sum()), "heldout_nll_by_epoch": curve.values}
    team.first(run.complete, "train", iteration, [run.player(iteration)], **facts)
    team.first(run.tidy, "train", iteration)


def _lesson(recipe: Recipe, run: RunDir, iteration: int) -> tuple[Items, Objective]:
    """What is trained on, and what is minimised."""
    if recipe.objective.name == "sft":  # with as many examples in a step as self-play has prompts
        return SftItems(run.examples("train"), recipe.used(iteration)), sft_objective
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
    team.first(run.require, "evaluate", START)
    start = read_json(run.iteration_metrics(START))

    def sound(epoch: int) -> bool:
        if epoch == epochs:
            return True
        signs = signs_of_collapse(guard, start, {"heldout_nll": curve.measure(epoch)})
        if signs:
            log.warning("iteration %d: collapsing, training ends after epoch %d: %s", iteration, epoch, signs)
        return not signs

    return sound
