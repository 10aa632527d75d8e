"""What a player trains on: examples or pairs on disk, one tree per prompt, and the loss over them.

Shapes: B pairs, S responses in a micro-batch.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from spinlm.model.prefix_trees import PrefixTree
from spinlm.recipe.fields import value_at
from spinlm.recipe.objective import Control, DpoPositive, Space, Spin, TSpin
from spinlm.recipe.schema import Recipe
from spinlm.rundir.records import Example, RecordFile, read_lines, read_pairs
from spinlm.training import objectives


@dataclass(frozen=True, slots=True)
class PairGroup:
    """The pairs that share a prompt: a tree of the prompt's responses, and which responses form the pairs."""

    tree: PrefixTree
    reference_logprobs: tuple[float, ...] = ()  # log p_θt of each response; empty if the loss needs none
    pairs: tuple[tuple[int, int], ...] = ()  # of each pair: numbers of the real and of the synthetic response
    initial: tuple[int, ...] = ()  # of each pair: number of θ_0's response; empty if the loss needs none


class TrainDataset(Protocol):
    """Random access to groups on disk."""

    batch_cost: np.ndarray  # [groups] what each counts toward `train.batch_size`
    loss_weight: np.ndarray  # [groups] what each counts toward the mean of the loss

    def __getitem__(self, index: int) -> PairGroup: ...


@dataclass(frozen=True)
class LossOutput:
    """Sums over a micro-batch: the loss, which carries the gradient, and further metrics."""

    loss: Tensor
    extra: dict[str, float] = field(default_factory=dict)


class SftDataset:
    """Examples on disk as trees with one response. The weight of an example is its number of response tokens."""

    def __init__(self, path: Path, batch_cost: int = 1):
        """
        Args:
            path: the examples.
            batch_cost: what each example counts toward the batch size.
        """
        self._records = RecordFile(path, Example)
        self.loss_weight = np.array(
            [len(example.response_ids) for example in read_lines(path, Example)], dtype=np.int64
        )
        self.batch_cost = np.full(len(self.loss_weight), batch_cost, dtype=np.int64)

    def __getitem__(self, index: int) -> PairGroup:
        example = self._records[index]
        return PairGroup(PrefixTree(example.prompt_ids, (example.response_ids,)))


def sft_loss(logprobs: Tensor, groups: Sequence[PairGroup]) -> LossOutput:
    """Negative log-likelihood of the responses, summed over tokens."""
    return LossOutput(-logprobs.sum())


class PairDataset:
    """Pairs on disk, one group per prompt. A prompt with more pairs than a batch holds makes several groups."""

    def __init__(self, paths: Sequence[Path], batch_size: int):
        """
        Args:
            paths: pair files.
            batch_size: the most pairs in a group.
        """
        self._table = read_pairs(paths)
        ids = self._table.column("id").to_numpy()
        starts = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]]) if len(ids) else np.array([], dtype=np.int64)
        bounds = [
            (begin, min(begin + batch_size, end))
            for start, end in pairwise([*starts, len(ids)])
            for begin in range(start, end, batch_size)
        ]
        self._bounds = np.array(bounds, dtype=np.int64).reshape(-1, 2)
        self.batch_cost = self.loss_weight = self._bounds[:, 1] - self._bounds[:, 0]  # pairs

    def __getitem__(self, index: int) -> PairGroup:
        begin, end = self._bounds[index]
        rows = self._table.slice(begin, end - begin).to_pylist()
        responses = [rows[0]["real_ids"], *(row["synthetic_ids"] for row in rows)]
        initial = tuple(_index_of(row["initial_ids"], responses) for row in rows if row.get("initial_ids"))
        reference = [rows[0]["opponent_real"], *(row["opponent_synthetic"] for row in rows)]
        reference += [math.nan] * (len(responses) - len(reference))  # the loss does not read θ_0's
        pairs = tuple((0, number + 1) for number in range(len(rows)))
        return PairGroup(PrefixTree(rows[0]["prompt_ids"], tuple(responses)), tuple(reference), pairs, initial)


def _index_of(response: list[int], responses: list[list[int]]) -> int:
    """The index of a response; it is appended if it is not in the list."""
    if response not in responses:
        responses.append(response)
    return responses.index(response)


def pair_loss(recipe: Recipe, t: int) -> Callable[[Tensor, Sequence[PairGroup]], LossOutput]:
    """Make the loss function of the recipe's objective at iteration `t`, a sum over pairs."""
    settings = recipe.objective
    assert not isinstance(settings, Control), "the control has no pairs"

    def loss_fn(logprobs: Tensor, groups: Sequence[PairGroup]) -> LossOutput:
        device = logprobs.device
        reference = torch.tensor(
            [value for group in groups for value in group.reference_logprobs], device=device
        )  # [S]
        lengths = torch.tensor([len(ids) for group in groups for ids in group.tree.responses], device=device)  # [S]
        real, synthetic, initial = pair_indices(groups).to(device)  # [B] each
        four = (logprobs[real], logprobs[synthetic], reference[real], reference[synthetic])
        match settings:
            case Spin():
                tokens = (lengths[real], lengths[synthetic]) if settings.length_normalize else None
                beta = value_at(settings.beta, t)
                loss = objectives.spin(*four, beta=beta, link=settings.link, tokens=tokens)
            case DpoPositive():
                beta = value_at(settings.beta, t)
                loss = objectives.dpo_positive(*four, beta=beta, dpop_lambda=settings.dpop_lambda)
            case Space():
                loss = objectives.space(*four, mu=settings.mu)
            case TSpin():
                three = (logprobs[real], logprobs[synthetic], logprobs[initial])
                beta, weight = value_at(settings.beta, t), settings.history_weight
                loss = objectives.t_spin(*three, beta=beta, history_weight=weight, link=settings.link)
        margin = objectives.margin(*four).detach()
        nll = objectives.mean_nll(logprobs[real], lengths[real])  # [B]
        if settings.nll_weight:
            loss = loss + settings.nll_weight * nll
        extra = {
            "margin": margin.sum().item(),
            "accuracy": (margin > 0).sum().item(),
            "real_nll": nll.sum().item(),
        }
        return LossOutput(loss.sum(), extra)

    return loss_fn


def pair_indices(groups: Sequence[PairGroup]) -> Tensor:
    """The numbers of the real, the synthetic and θ_0's response of each pair in the micro-batch: [3, B].

    For a pair without a response of θ_0, the synthetic response takes its place.
    """
    indices = []
    offset = 0
    for group in groups:
        initial = group.initial or [synthetic for _, synthetic in group.pairs]
        indices += [
            (offset + real, offset + synthetic, offset + first)
            for (real, synthetic), first in zip(group.pairs, initial, strict=True)
        ]
        offset += len(group.tree.responses)
    return torch.tensor(indices).T


def plan_steps(batch_cost: np.ndarray, batch_size: int, epochs: int, seed: int) -> list[tuple[int, np.ndarray]]:
    """Decide which groups each optimizer step takes: every group once per epoch, in an order that the seed gives.

    Args:
        batch_cost: [groups] what each group counts toward a batch.
        batch_size: the most that a step takes; a group that exceeds it is alone in its step.
        epochs: number of epochs.
        seed: decides the order.

    Returns:
        The epoch and the group indices of each step.
    """
    steps = []
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(batch_cost))
        for chosen in _split(order, batch_cost, batch_size):
            steps.append((epoch, chosen))
    return steps


def _split(order: np.ndarray, batch_cost: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    begin = filled = 0
    for place, index in enumerate(order):
        if place > begin and filled + batch_cost[index] > batch_size:
            yield order[begin:place]
            begin, filled = place, 0
        filled += batch_cost[index]
    if begin < len(order):
        yield order[begin:]
