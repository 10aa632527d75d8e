"""The training loop: minimize a loss over prefix trees, one optimizer step at a time.

Only the seed decides which groups a step takes. Micro-batches and processes do not change the gradient of a step. A
checkpoint holds everything that the next step depends on: on a CPU, a run that was killed and resumed ends with
bit-identical weights.

Shapes: S responses in a micro-batch.
"""

import contextlib
import gc
import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spinlm.distributed import processes
from spinlm.distributed.progress import track
from spinlm.errors import StoppedError, TrainingError, is_out_of_memory
from spinlm.model.players import Players
from spinlm.model.prefix_trees import PackedBatch, micro_batches, pack_batch
from spinlm.recipe.schema import Train
from spinlm.training.activation_checkpointing import set_activation_checkpointing
from spinlm.training.batches import LossOutput, PromptGroup, TrainDataset, plan_steps
from spinlm.training.checkpoints import load_checkpoint, newest_checkpoint, save_checkpoint
from spinlm.training.optimizers import make_optimizer
from spinlm.training.parallel import all_reduce_sum, balance_by_tokens, make_strategy
from spinlm.training.schedule import learning_rate_at, set_learning_rate
from spinlm.utils.seeds import derive_seed
from spinlm.utils.signals import check_interrupt, defer_interrupts, interrupt_requested

log = logging.getLogger("spinlm")

PROGRESS_METRICS = ("loss", "margin")

LossFunction = Callable[[Tensor, Sequence[PromptGroup]], LossOutput]
"""`loss_fn(logprobs, groups)`: computes the sums from log p(y|x) of each response [S], in the order of the groups."""


@dataclass(frozen=True)
class TrainConfig:
    """The fields of the recipe's `train` at one iteration, and a seed."""

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
    def from_recipe(cls, train: Train, **overrides: Any) -> "TrainConfig":
        """Take the recipe's fields, and `overrides`: at least `learning_rate` and `seed`."""
        shared = {field.name: getattr(train, field.name) for field in fields(cls) if hasattr(train, field.name)}
        return cls(**(shared | overrides))


class Trainer:
    """Train the model of `players` in place."""

    def __init__(self, players: Players, config: TrainConfig, *, checkpoints: Path, label: str):
        """
        Args:
            players: the players, with the weights to start from.
            config: the settings.
            checkpoints: folder of the checkpoints; training resumes from the newest one.
            label: name of the training, for progress and messages.
        """
        self.players, self.config = players, config
        self.checkpoints, self.label = checkpoints, label
        self.token_budget = config.tokens_per_micro_batch

    def fit(
        self,
        dataset: TrainDataset,
        loss_fn: LossFunction,
        *,
        on_step: Callable[[dict[str, float]], None],
        on_epoch: Callable[[int], bool] = lambda epoch: True,
    ) -> int:
        """Minimize the mean of a loss over the dataset.

        Args:
            dataset: the groups to train on.
            loss_fn: the loss, as a sum over groups; the mean is over `dataset.loss_weight`.
            on_step: called with the measurements of each optimizer step.
            on_epoch: called with the number of each finished epoch, after the checkpoint of the epoch. If training
                resumes from that checkpoint, it is called again. Training ends if it returns False.

        Returns:
            The number of optimizer steps taken.

        Raises:
            TrainingError: a loss or gradient is not finite. The last checkpoint is kept.
            StoppedError: the user asked to stop. The state after the last complete step is saved.
        """
        with contextlib.closing(self._steps(dataset, on_step, on_epoch)) as steps:
            for step in steps:
                for batch in step:
                    output = None
                    try:
                        with self.strategy.micro_batch(last=batch.is_last):
                            output = loss_fn(self.strategy.module(batch.packed), batch.groups)
                            (output.loss * batch.loss_scale / step.loss_weight).backward()
                        step.add(output, batch)
                    except (RuntimeError, MemoryError) as error:
                        output = None  # frees the graph
                        step.retry_smaller(error)  # `step` then yields its micro-batches again
        return self.steps_done

    def save_player(self, t: int) -> None:
        """Save the trained weights as the player of iteration `t`."""
        if self.strategy.is_sharded:
            self.players.save(t, self.strategy.full_tensors(self.players.weights()))
            self.players.unload()  # the model holds shards
        else:
            self.players.save(t)

    def _steps(
        self, dataset: TrainDataset, on_step: Callable[[dict[str, float]], None], on_epoch: Callable[[int], bool]
    ) -> Generator["_Step", None, None]:
        """Yield each step, then take it, report it, and save checkpoints. In between, `fit` accumulates gradients."""
        config = self.config
        steps = plan_steps(dataset.batch_cost, config.batch_size, config.epochs, config.seed)
        self.steps_done = start = self._set_up()
        with track(self.label, len(steps), completed=start) as advance:
            for number in range(start, len(steps)):
                epoch, indices = steps[number]
                if number > 0 and steps[number - 1][0] < epoch and not on_epoch(epoch):
                    return
                rate = self._learning_rate(number, len(steps))
                set_learning_rate(self.optimizer, rate)
                groups = [dataset[index] for index in indices]
                step = _Step(self, number, groups, float(dataset.loss_weight[indices].sum()))
                yield step
                position = {"step": number + 1, "steps": len(steps), "epoch": epoch + 1}
                measured = step.take()
                speed = {"tokens_per_second": step.tokens / (time.perf_counter() - step.started)}
                on_step({**position, **measured, "learning_rate": rate, "grad_norm": step.grad_norm, **speed})
                advance(1, step.tokens, ", ".join(f"{k} {measured[k]:.4f}" for k in PROGRESS_METRICS if k in measured))
                self.steps_done = number + 1
                epoch_ends = number + 1 == len(steps) or steps[number + 1][0] > epoch
                if epoch_ends or (number + 1) % config.save_steps == 0:
                    self._save_checkpoint()
        if steps:
            on_epoch(config.epochs)

    def _set_up(self) -> int:
        """Make strategy and optimizer, restore the newest checkpoint, and return the number of completed steps."""
        players, config = self.players, self.config
        set_activation_checkpointing(players.logprobs, players.recipe, players.prefix_sharing)
        players.mark_modified()  # before loading, because a damaged checkpoint may be loaded partly
        steps_done, state = load_checkpoint(self.checkpoints, players)
        self.strategy = make_strategy(players.logprobs, players.recipe.train.fsdp)
        trained = (parameter for _, parameter in players.parameters())
        self.optimizer = make_optimizer(config.optimizer, trained, config.learning_rate, config.weight_decay)
        self.strategy.set_up(self.optimizer, config.max_grad_norm, state)
        self.restored_steps = steps_done
        self.stop_requested = False
        return steps_done

    def _learning_rate(self, step: int, steps: int) -> float:
        config = self.config
        return learning_rate_at(
            step, steps, peak=config.learning_rate, warmup_ratio=config.warmup_ratio, lr_scheduler=config.lr_scheduler
        )

    def _save_checkpoint(self) -> None:
        save_checkpoint(self.checkpoints, self.players, self.strategy, self.steps_done)

    def check_stop(self) -> None:
        """Save a checkpoint and raise if the user asked to stop. Several processes stop together after a step.

        Raises:
            StoppedError: the user asked to stop.
        """
        try:
            if self.stop_requested:
                raise StoppedError("stopped as requested; run the same command again to continue")
            if processes.world_size() == 1:
                check_interrupt()
        except StoppedError:
            if self.steps_done > self.restored_steps:
                with defer_interrupts():
                    self._save_checkpoint()
            raise


@dataclass(frozen=True)
class _MicroBatch:
    """The input of one forward and backward pass."""

    groups: list[PromptGroup]
    packed: PackedBatch
    loss_scale: int  # world size, because DDP and FSDP average the gradients; 0 in a pass that only the others need
    is_last: bool  # in the step


class _Step:
    """One optimizer step: iterate over its micro-batches, `add` the output of each, then `take` the step."""

    def __init__(self, trainer: Trainer, number: int, groups: list[PromptGroup], loss_weight: float):
        """
        Args:
            trainer: the trainer.
            number: number of the step, from 0.
            groups: the groups of the step. Each process computes its share.
            loss_weight: total weight of the groups. Sums are divided by it.
        """
        self.trainer, self.groups, self.loss_weight = trainer, groups, loss_weight
        self.seed = derive_seed(trainer.config.seed, number)
        self.tokens = sum(len(group.tree) for group in groups)
        self.started = time.perf_counter()
        self.grad_norm = math.nan
        self._number = number
        self._retry = False

    def __iter__(self) -> Iterator[_MicroBatch]:
        """Yield the micro-batches of this process; yield all of them again, smaller, after `retry_smaller`."""
        self.trainer.strategy.module.train()  # `on_epoch` may have evaluated
        while True:
            self._retry, self._sums, self._rows = False, dict[str, float](), dict[str, int]()
            for batch in self._micro_batches():
                yield batch
                if self._retry:
                    break
            if not self._retry:
                return
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.trainer.optimizer.zero_grad()

    def _micro_batches(self) -> Iterator[_MicroBatch]:
        trainer, rank, world_size = self.trainer, processes.rank(), processes.world_size()
        sharing, device = trainer.players.prefix_sharing, trainer.players.device
        trees = [group.tree for group in self.groups]
        plans = [
            [
                [part[index] for index in chosen]
                for chosen in micro_batches([trees[i] for i in part], trainer.token_budget, sharing)
            ]
            for part in balance_by_tokens(trees, world_size)
        ]
        plan, longest = plans[rank], max(1, *(len(plan) for plan in plans))
        # DDP exchanges gradients in the last pass of a process, so every process needs one pass. FSDP gathers weights
        # in every pass, so all processes need equally many. An idle pass computes the shortest group, scaled by 0.
        num_passes = longest if trainer.strategy.is_sharded else max(1, len(plan))
        for number in range(num_passes):
            trainer.check_stop()
            torch.manual_seed(derive_seed(self.seed, rank * longest + number))  # the adapter's dropout
            is_idle = number >= len(plan)
            shortest = [min(self.groups, key=lambda group: len(group.tree))]
            groups = shortest if is_idle else [self.groups[index] for index in plan[number]]
            packed = pack_batch([group.tree for group in groups], sharing).to(device)
            yield _MicroBatch(groups, packed, 0 if is_idle else world_size, is_last=number + 1 == num_passes)

    def add(self, output: LossOutput, batch: _MicroBatch) -> None:
        """Add the sums of a micro-batch to those of the step."""
        for name, value in {"loss": output.loss.item(), **output.metrics}.items():
            self._sums[name] = self._sums.get(name, 0.0) + (value / self.loss_weight if batch.loss_scale else 0.0)
        for name, rows in output.metric_rows.items():
            self._rows[name] = self._rows.get(name, 0) + (rows if batch.loss_scale else 0)

    def retry_smaller(self, error: Exception) -> None:
        """Repeat the step with half the tokens per micro-batch if memory ran out; otherwise raise the error again.

        With several processes the error is raised, because one process cannot repeat a step alone.
        """
        trainer = self.trainer
        trees = [group.tree for group in self.groups]
        batches = micro_batches(trees, trainer.token_budget, trainer.players.prefix_sharing)
        if not is_out_of_memory(error) or processes.world_size() > 1 or max(map(len, batches)) == 1:
            raise error
        trainer.token_budget = min(trainer.token_budget, self.tokens) // 2
        log.warning("%s: out of memory; continuing with %d tokens per micro-batch", trainer.label, trainer.token_budget)
        self._retry = True

    def take(self) -> dict[str, float]:
        """Take the optimizer step. Return the means of loss and metrics over the groups of all processes.

        A metric that no row of the step has is absent.

        Raises:
            TrainingError: the loss or the norm of the gradients is not finite.
        """
        trainer = self.trainer
        stop = float(processes.world_size() > 1 and interrupt_requested())
        rows = {f"rows of {name}": float(number) for name, number in self._rows.items()}
        measured = all_reduce_sum({**self._sums, **rows, "stop": stop})
        for name in self._rows:
            number = measured.pop(f"rows of {name}")
            if number:
                measured[name] *= self.loss_weight / number
            else:
                del measured[name]
        trainer.stop_requested = measured.pop("stop") > 0
        is_finite = math.isfinite(measured["loss"])
        self.grad_norm = trainer.strategy.step(is_finite=is_finite)
        if not is_finite or not math.isfinite(self.grad_norm):
            raise TrainingError(self._not_finite(measured["loss"]))
        return measured

    def _not_finite(self, loss: float) -> str:
        kept = newest_checkpoint(self.trainer.checkpoints)
        return (
            f"{self.trainer.label}, step {self._number + 1}: the loss is {loss} and the norm of the gradients "
            f"{self.grad_norm}. Training stopped before this step; "
            + (f"the last good checkpoint is {kept}" if kept else "there is no checkpoint yet")
            + ". Lower train.learning_rate, or compute in model.dtype: float32, and run in another --run-dir"
        )
