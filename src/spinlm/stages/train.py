"""Train: the main player starts from θ_t and learns to tell the real responses from the opponent's."""

import logging

from spinlm.config import Recipe, at_iteration
from spinlm.model.fit import Fit, Items, Objective, fit
from spinlm.model.players import seat
from spinlm.rundir import START, RunDir
from spinlm.seeds import derive_seed
from spinlm.shards import count_shards
from spinlm.stages.items import PairItems, SftItems, pair_objective, sft_objective
from spinlm.stages.steps import recorder

log = logging.getLogger("spinlm")


def train(recipe: Recipe, run: RunDir, iteration: int) -> None:
    """Train the main player of an iteration and save it as θ_{iteration+1}.

    Raises:
        TrainingError: a loss or gradient was not finite.
    """
    if run.done("train", iteration):
        return
    run.begin("train", iteration, run.checkpoints(iteration))
    players = seat(recipe, run)
    players.become(iteration - 1)
    settings = recipe.train
    items, objective = _lesson(recipe, run, iteration)
    if len(items.sizes) == 0:
        log.warning("iteration %d: every synthetic response equals the real one; nothing is left to learn", iteration)
    how = Fit.of(
        settings,
        learning_rate=at_iteration(settings.learning_rate, iteration),
        seed=derive_seed(recipe.seed, "train", iteration),
    )
    steps = fit(
        players,
        items,
        objective,
        how,
        packing=run.facts("warmup", START)["packing"],
        checkpoints=run.checkpoints(iteration),
        what=f"iteration {iteration}: train",
        on_step=recorder(players, run, recipe, "train", iteration),
    )
    players.save(iteration)
    run.complete("train", iteration, [run.player(iteration)], steps=steps, pairs=int(items.sizes.sum()))


def _lesson(recipe: Recipe, run: RunDir, iteration: int) -> tuple[Items, Objective]:
    """What is trained on, and what is minimised."""
    if recipe.objective.name == "sft":  # with as many examples in a step as self-play has prompts
        return SftItems(run.examples("train"), recipe.used(iteration)), sft_objective
    files = count_shards(run.examples("train"), recipe.opponent.shard_size)
    paths = [run.pairs(iteration, "train", shard) for shard in range(files)]
    return PairItems(paths, recipe.train.batch_size), pair_objective(recipe, iteration)
