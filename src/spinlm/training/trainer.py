"""The optimisation loop: minimise an objective over trees, one optimiser step after the other.

A step is a set of items, fixed by the seed alone, and its gradient is the same however it is split into micro-batches
and over processes. A checkpoint holds all that the next step depends on, so a run that is killed and continued ends, on
a CPU, in the same weights to the bit.
"""

import gc
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from spinlm.distributed import processes
from spinlm.distributed.progress import track
from spinlm.errors import StoppedError, TrainingError, is_out_of_memory
from spinlm.model.players import Players
from spinlm.model.prefix_trees import PrefixTree, micro_batches, pack_batch
from spinlm.recipe.schema import Train
from spinlm.training.checkpoints import newest, resume, save_checkpoint
from spinlm.training.optimizers import make_optimizer
from spinlm.training.parallel import Parallel, share, totals
from spinlm.utils.seeds import derive_seed
from spinlm.utils.signals import check_interrupt, defer_interrupts, interrupt_requested

log = logging.getLogger("spinlm")

SHOWN = ("loss", "margin")  # while a fit is under way


@dataclass(frozen=True, slots=True)
class Item:
    """A tree, and what the opponent said of its responses (empty where the objective needs no opponent)."""

    tree: PrefixTree
    opponent: tuple[float, ...] = ()  # log p_θt of each response
    pairs: tuple[tuple[int, int], ...] = ()  # which responses are a real and a synthetic one of a pair
    initial: tuple[int, ...] = ()  # which is θ_0's, for each pair; empty where the objective needs none


class Items(Protocol):
    """Random access to what an objective is trained on, without holding it in memory."""

    sizes: np.ndarray  # [items] what each counts towards a batch
    weights: np.ndarray  # [items] what each counts towards the mean

    def __getitem__(self, index: int) -> Item: ...


@dataclass(frozen=True)
class Total:
    """Sums over a micro-batch. `loss` carries the gradient; `extra` are sums of further things to show."""

    loss: Tensor
    extra: dict[str, float] = field(default_factory=dict)


Objective = Callable[[Tensor, Sequence[Item]], Total]
"""From the responses' log-probabilities [S], in the order of the items' responses, to sums."""


@dataclass(frozen=True)
class Fit:
    """How an objective is minimised: the fields of the recipe's `train`, at one iteration, and a seed."""

    epochs: int
    batch_size: int
    learning_rate: float
    optimizer: str
    warmup_ratio: float
    lr_scheduler: str
    weight_decay: float
    max_grad_norm: float
    tokens_per_micro_batch: int
    save_steps: int
    seed: int

    @classmethod
    def of(cls, train: Train, **own: Any) -> "Fit":
        """The recipe's settings, and what is the caller's own: at least `learning_rate` and `seed`."""
        shared = {field.name: getattr(train, field.name) for field in fields(cls) if hasattr(train, field.name)}
        return cls(**(shared | own))


def fit(
    players: Players,
    items: Items,
    objective: Objective,
    how: Fit,
    *,
    prefix_sharing: bool,
    checkpoints: Path,
    what: str,
    on_step: Callable[[dict[str, float]], None],
    on_epoch: Callable[[int], bool] = lambda epoch: True,
) -> int:
    """Minimise the mean of an objective; the weights of `players` change in place. Returns the number of steps done.

    Args:
        players: in the weights to start from.
        items: what to train on.
        objective: what to minimise, as sums over items; the mean is over `items.weights`.
        how: the recipe's settings.
        prefix_sharing: whether all responses to a prompt share one row.
        checkpoints: folder to resume from and to save to; the newest checkpoint in it wins.
        what: for the progress display.
        on_step: called after each optimiser step with what was measured.
        on_epoch: called after each epoch with its number, the checkpoint saved, and once more where a run goes on from
            there; returns whether to go on.

    Raises:
        TrainingError: a loss or gradient was not finite. The last checkpoint is untouched.
        StoppedError: the user asked to stop. The state of the last complete step has been saved.
    """
    steps = plan_steps(items.sizes, how.batch_size, how.epochs, how.seed)
    players.make_room(prefix_sharing)
    players.changed()  # first, as one that is damaged may be loaded in part
    begin, state = resume(checkpoints, players)
    parallel = players.parallel()
    trained = (parameter for _, parameter in players.parameters())
    optimizer = make_optimizer(how.optimizer, trained, how.learning_rate, how.weight_decay)
    parallel.begin(optimizer, how.max_grad_norm, state)
    parallel.module.train()
    stop, budget = False, how.tokens_per_micro_batch
    with track(what, len(steps), already=begin) as advance:
        for step in range(begin, len(steps)):
            epoch, chosen = steps[step]
            if step > 0 and steps[step - 1][0] < epoch:
                if not on_epoch(epoch):
                    return step
                parallel.module.train()  # whatever was measured there
            began = time.perf_counter()
            rate = set_learning_rate(optimizer, learning_rate_at(step, len(steps), how))
            batch = [items[index] for index in chosen]
            backward = _Backward(parallel, objective, prefix_sharing, weight=float(items.weights[chosen].sum()))
            try:
                if stop:
                    raise StoppedError("stopped as asked; run the same command again to continue")
                while (measured := backward.if_it_fits(batch, budget, derive_seed(how.seed, step))) is None:
                    optimizer.zero_grad()
                    budget = min(budget, sum(len(item.tree) for item in batch)) // 2
                    log.warning("%s: out of memory; going on with %d tokens in a micro-batch", what, budget)
            except StoppedError:
                if step > begin:
                    with defer_interrupts():
                        save_checkpoint(checkpoints, players, step)
                raise
            stop = measured.pop("stop") > 0
            sound = math.isfinite(measured["loss"])
            norm = parallel.step(sound)
            if not sound or not math.isfinite(norm):
                raise TrainingError(_not_finite(what, step, measured["loss"], norm, checkpoints))
            tokens = sum(len(item.tree) for item in batch)
            speed = {"tokens_per_second": tokens / (time.perf_counter() - began)}
            place = {"step": step + 1, "steps": len(steps), "epoch": epoch + 1}
            on_step({**place, **measured, "learning_rate": rate, "grad_norm": norm, **speed})
            advance(1, tokens, ", ".join(f"{name} {measured[name]:.4f}" for name in SHOWN if name in measured))
            ends = step + 1 == len(steps) or steps[step + 1][0] > epoch  # before anything is measured there
            if ends or (step + 1) % how.save_steps == 0:
                save_checkpoint(checkpoints, players, step + 1)
    if steps:
        on_epoch(how.epochs)
    return len(steps)


@dataclass(frozen=True)
class _Backward:
    """Forward and backward over one step's items, a micro-batch at a time; each process takes a share of them."""

    parallel: Parallel
    objective: Objective
    prefix_sharing: bool
    weight: float  # of the items together: sums are divided by it

    def if_it_fits(self, batch: list[Item], tokens: int, seed: int) -> dict[str, float] | None:
        """As a call; None where memory does not suffice, but may for micro-batches of fewer tokens. One of several
        processes cannot try again by itself, as the others wait for it elsewhere."""
        try:
            return self(batch, tokens, seed)
        except (RuntimeError, MemoryError) as error:
            largest = micro_batches([item.tree for item in batch], tokens, self.prefix_sharing)
            if not is_out_of_memory(error) or processes.world_size() > 1 or max(map(len, largest)) == 1:
                raise
        gc.collect()  # now that the error is gone, and with it what it held on to
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def __call__(self, batch: list[Item], tokens: int, seed: int) -> dict[str, float]:
        """Add to the gradients of the parameters.

        Returns:
            Means over the step, and how many processes have been asked to `stop`.
        """
        trees = [item.tree for item in batch]
        plans = [
            [
                [part[index] for index in chosen]
                for chosen in micro_batches([trees[one] for one in part], tokens, self.prefix_sharing)
            ]
            for part in share(trees, processes.world_size())
        ]
        mine = plans[processes.rank()]
        # Where anything is divided, all processes run equally often; and each takes part in the exchange of gradients.
        most = max(1, *(len(plan) for plan in plans))
        rounds = most if self.parallel.divided else max(1, len(mine))
        device = next(self.parallel.module.parameters()).device
        sums: dict[str, float] = {}
        for number in range(rounds):
            if processes.world_size() == 1:
                check_interrupt()
            torch.manual_seed(derive_seed(seed, processes.rank() * most + number))  # the adapter's dropout
            idle = number >= len(mine)
            part = [min(batch, key=lambda item: len(item.tree))] if idle else [batch[index] for index in mine[number]]
            with self.parallel.micro_batch(last=number + 1 == rounds):
                logprobs = self.parallel.module(
                    pack_batch([item.tree for item in part], self.prefix_sharing).to(device)
                )
                total = self.objective(logprobs, part)
                self.parallel.backward(
                    total.loss * (0 if idle else processes.world_size()) / self.weight
                )  # they are averaged
            for name, value in {"loss": total.loss.item(), **total.extra}.items():
                sums[name] = sums.get(name, 0.0) + (0.0 if idle else value / self.weight)
        return totals({**sums, "stop": float(processes.world_size() > 1 and interrupt_requested())})


def _not_finite(what: str, step: int, loss: float, norm: float, checkpoints: Path) -> str:
    kept = newest(checkpoints)
    return (
        f"{what}, step {step + 1}: the loss is {loss} and the gradient's norm {norm}. Stopped before this step; "
        + (f"the last good checkpoint is {kept}" if kept else "no checkpoint had been made yet")
        + ". Lower train.learning_rate, or compute in model.dtype: float32, and run in another --run-dir"
    )


def plan_steps(sizes: np.ndarray, batch_size: int, epochs: int, seed: int) -> list[tuple[int, np.ndarray]]:
    """Which items each optimiser step takes: (epoch, indices), every item once an epoch, in an order the seed gives.

    Args:
        sizes: [items] what each counts towards a batch.
        batch_size: a step takes items while they fit; an item larger than that is alone.
    """
    steps = []
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(sizes))
        for chosen in _groups(order, sizes, batch_size):
            steps.append((epoch, chosen))
    return steps


def _groups(order: np.ndarray, sizes: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    begin = filled = 0
    for place, index in enumerate(order):
        if place > begin and filled + sizes[index] > batch_size:
            yield order[begin:place]
            begin, filled = place, 0
        filled += sizes[index]
    if begin < len(order):
        yield order[begin:]


def learning_rate_at(step: int, steps: int, how: Fit) -> float:
    """The learning rate of a step (from 0): a linear rise to the peak, then the schedule's way down to 0."""
    rise = math.ceil(how.warmup_ratio * steps)
    if step < rise:
        return how.learning_rate * ((step + 1) / rise)  # the other way round it may pass the peak
    left = (steps - step) / max(steps - rise, 1)  # 1 after the rise, towards 0 at the end
    match how.lr_scheduler:
        case "linear":
            return how.learning_rate * left
        case "cosine":
            return how.learning_rate * 0.5 * (1 - math.cos(math.pi * left))
        case _:
            return how.learning_rate


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> float:
    """Set it for every parameter, and return it."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate
