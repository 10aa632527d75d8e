"""Train: the main player starts from θ_t and learns to tell the real responses from the opponent's."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spinlm.config import Recipe, at_iteration
from spinlm.model.fit import Fit, Item, Total, fit
from spinlm.model.objectives import mean_nll, spin
from spinlm.model.players import seat
from spinlm.model.trees import Tree
from spinlm.records import read_pairs
from spinlm.rundir import START, RunDir
from spinlm.seeds import derive_seed
from spinlm.shards import count_shards
from spinlm.stages.steps import recorder

log = logging.getLogger("spinlm")


class PairItems:
    """Pairs on disk, grouped into one tree for each prompt. A group larger than a batch is split."""

    def __init__(self, paths: Sequence[Path], batch_size: int):
        self._table = read_pairs(paths)
        names = self._table.column("id").to_numpy()
        starts = np.flatnonzero(np.r_[True, names[1:] != names[:-1]]) if len(names) else np.array([], dtype=np.int64)
        bounds = [
            (begin, min(begin + batch_size, end))
            for start, end in zip(starts, [*starts[1:], len(names)], strict=True)
            for begin in range(start, end, batch_size)
        ]
        self._bounds = np.array(bounds, dtype=np.int64).reshape(-1, 2)
        self.sizes = self.weights = self._bounds[:, 1] - self._bounds[:, 0]  # pairs

    def __getitem__(self, index: int) -> Item:
        begin, end = self._bounds[index]
        rows = self._table.slice(begin, end - begin).to_pylist()
        tree = Tree(rows[0]["prompt_ids"], (rows[0]["real_ids"], *(row["synthetic_ids"] for row in rows)))
        opponent = (rows[0]["opponent_real"], *(row["opponent_synthetic"] for row in rows))
        return Item(tree, opponent, tuple((0, number + 1) for number in range(len(rows))))


def spin_objective(recipe: Recipe, iteration: int) -> Callable[[Tensor, Sequence[Item]], Total]:
    """The recipe's objective at an iteration, summed over pairs."""
    settings = recipe.objective
    beta = at_iteration(settings.beta, iteration)

    def objective(logprobs: Tensor, items: Sequence[Item]) -> Total:
        device = logprobs.device
        opponent = torch.tensor([value for item in items for value in item.opponent], device=device)  # [S]
        real, synthetic = pair_indices(items).to(device)  # [B], [B]
        result = spin(
            logprobs[real],
            logprobs[synthetic],
            opponent[real],
            opponent[synthetic],
            beta=beta,
            loss=settings.loss,
        )
        lengths = torch.tensor([len(r) for item in items for r in item.tree.responses], device=device)
        nll = mean_nll(logprobs[real], lengths[real])  # [B]
        loss = result.loss + settings.nll_weight * nll if settings.nll_weight else result.loss
        extra = {
            "margin": result.margin.sum().item(),
            "accuracy": (result.margin > 0).sum().item(),
            "real_nll": nll.sum().item(),
        }
        return Total(loss.sum(), extra)

    return objective


def pair_indices(items: Sequence[Item]) -> Tensor:
    """Which of the micro-batch's responses are the real [B] and the synthetic [B] ones of its pairs: [2, B]."""
    indices = []
    before = 0
    for item in items:
        indices += [(before + real, before + synthetic) for real, synthetic in item.pairs]
        before += len(item.tree.responses)
    return torch.tensor(indices).T


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
    files = count_shards(run.examples("train"), recipe.opponent.shard_size)
    items = PairItems([run.pairs(iteration, "train", shard) for shard in range(files)], settings.batch_size)
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
        spin_objective(recipe, iteration),
        how,
        packing=run.facts("warmup", START)["packing"],
        checkpoints=run.checkpoints(iteration),
        what=f"iteration {iteration}: train",
        on_step=recorder(players, run, recipe, "train", iteration),
    )
    players.save(iteration)
    run.complete("train", iteration, [run.player(iteration)], steps=steps, pairs=int(items.sizes.sum()))
