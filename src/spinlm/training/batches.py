"""The data that a player trains on: examples or pairs on disk, grouped by prompt; and the loss of a micro-batch.

Shapes: B pairs, R rows without contrast, S responses in a micro-batch.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from spinlm.model.prefix_trees import PrefixTree
from spinlm.recipe.fields import value_at
from spinlm.recipe.objective import Control, DpoPositive, LogRatioObjective, Objective, Space, Spin, TSpin
from spinlm.recipe.schema import Recipe
from spinlm.rundir.records import Example, RecordFile, read_lines, read_pairs
from spinlm.training import objectives


@dataclass(frozen=True, slots=True)
class PromptGroup:
    """A prompt and the responses to train on, as a tree, and the pairs of these responses. SFT has no pairs.

    Both indices of a pair are the same if its responses are equal.
    """

    tree: PrefixTree
    reference_logprobs: tuple[float, ...] = ()  # log p_θt of each response; empty if the loss needs none
    pairs: tuple[tuple[int, int], ...] = ()  # for each pair: indices of the real and the synthetic response
    initial: tuple[int, ...] = ()  # for each pair: index of θ_0's response; empty if the loss needs none
    start_logprobs: tuple[float, ...] = ()  # log p_θ0 of each response, if the reference is a mixture with θ_0
    nll_only: int = 0  # further rows, in which only the NLL term of the first response, the real one, counts


class TrainDataset(Protocol):
    """Random access to groups on disk."""

    batch_cost: np.ndarray  # [groups] share of each group in `train.batch_size`
    loss_weight: np.ndarray  # [groups] weight of each group in the mean of the loss: its rows or tokens
    num_pairs: int  # that the loss contrasts; SFT has none

    def __getitem__(self, index: int) -> PromptGroup: ...


@dataclass(frozen=True)
class LossOutput:
    """Sums over a micro-batch: the loss with its graph, and metrics as numbers."""

    loss: Tensor
    metrics: dict[str, float] = field(default_factory=dict)
    metric_rows: dict[str, int] = field(default_factory=dict)
    """Number of rows in the sum of a metric, for metrics that are not summed over all rows. All micro-batches have the
    same keys."""


class SftDataset:
    """Examples on disk, one group per example. The loss weight of an example is its number of response tokens."""

    num_pairs = 0

    def __init__(self, path: Path, batch_cost: int = 1):
        """
        Args:
            path: file with the examples.
            batch_cost: share of each example in the batch size.
        """
        self._records = RecordFile(path, Example)
        self.loss_weight = np.array(
            [len(example.response_ids) for example in read_lines(path, Example)], dtype=np.int64
        )
        self.batch_cost = np.full(len(self.loss_weight), batch_cost, dtype=np.int64)

    def __getitem__(self, index: int) -> PromptGroup:
        example = self._records[index]
        return PromptGroup(PrefixTree(example.prompt_ids, (example.response_ids,)))


def sft_loss(logprobs: Tensor, groups: Sequence[PromptGroup]) -> LossOutput:
    """Compute the negative log-likelihood of the responses, summed over tokens."""
    return LossOutput(-logprobs.sum())


class PairDataset:
    """Rows of pair files, one group per prompt. A prompt with more than `batch_size` rows makes several groups."""

    def __init__(self, paths: Sequence[Path], batch_size: int):
        """
        Args:
            paths: pair files.
            batch_size: maximum number of rows in a group.
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
        self.batch_cost = self.loss_weight = self._bounds[:, 1] - self._bounds[:, 0]  # rows
        self.num_pairs = int(np.sum(self._table.column("contrast").to_numpy()))

    @property
    def ids(self) -> list[str]:
        """The id of each group's example."""
        ids: list[str] = self._table.column("id").take(self._bounds[:, 0]).to_pylist()
        return ids

    def __getitem__(self, index: int) -> PromptGroup:
        begin, end = self._bounds[index]
        rows = self._table.slice(begin, end - begin).to_pylist()
        contrasts = [row for row in rows if row["contrast"]]
        first = (contrasts or rows)[0]
        responses, logprobs, pairs = [first["real_ids"]], [(first["opponent_real"], first["start_real"])], []
        for row in contrasts:
            synthetic = _index_of(row["synthetic_ids"], responses)
            if synthetic == len(logprobs):
                logprobs.append((row["opponent_synthetic"], row["start_synthetic"]))
            pairs.append((0, synthetic))
        initial = tuple(_index_of(row["initial_ids"], responses) for row in contrasts if row["initial_ids"])
        logprobs += [(math.nan, None)] * (len(responses) - len(logprobs))  # θ_0's responses, which need no reference
        reference, start = zip(*logprobs, strict=True)
        return PromptGroup(
            tree=PrefixTree(first["prompt_ids"], tuple(responses)),
            reference_logprobs=reference,
            pairs=tuple(pairs),
            initial=initial,
            start_logprobs=() if start[0] is None else start,
            nll_only=len(rows) - len(contrasts),
        )


def _index_of(response: list[int], responses: list[list[int]]) -> int:
    """Return the index of a response in a list. Append the response if it is not in the list."""
    if response not in responses:
        responses.append(response)
    return responses.index(response)


def pair_loss(recipe: Recipe, t: int) -> Callable[[Tensor, Sequence[PromptGroup]], LossOutput]:
    """Return the loss function of the recipe's objective at iteration `t`. Its loss is a sum over rows.

    The metrics `margin` and `accuracy` are sums over the pairs whose responses differ, as in the held-out metrics.
    """
    settings = recipe.objective
    assert not isinstance(settings, Control), "the control has no pairs"

    def loss_fn(logprobs: Tensor, groups: Sequence[PromptGroup]) -> LossOutput:
        device = logprobs.device
        opponent = torch.tensor([value for group in groups for value in group.reference_logprobs], device=device)  # [S]
        reference = _mix_start(opponent, groups, settings)  # [S]
        lengths = torch.tensor([len(ids) for group in groups for ids in group.tree.responses], device=device)  # [S]
        real, synthetic, initial = pair_indices(groups).to(device)  # [B] each
        pair_logprobs = (logprobs[real], logprobs[synthetic], reference[real], reference[synthetic])  # [B] each
        match settings:
            case Spin():
                tokens = (lengths[real], lengths[synthetic]) if settings.length_normalize else None
                beta = value_at(settings.beta, t)
                smoothing = settings.label_smoothing
                loss = objectives.spin(
                    *pair_logprobs, beta=beta, link=settings.link, label_smoothing=smoothing, tokens=tokens
                )
            case DpoPositive():
                beta = value_at(settings.beta, t)
                loss = objectives.dpo_positive(*pair_logprobs, beta=beta, dpop_lambda=settings.dpop_lambda)
            case Space():
                loss = objectives.space(*pair_logprobs, mu=settings.mu)
            case TSpin():
                beta, weight = value_at(settings.beta, t), settings.history_weight
                logprobs_without_reference = (logprobs[real], logprobs[synthetic], logprobs[initial])
                loss = objectives.t_spin(
                    *logprobs_without_reference, beta=beta, history_weight=weight, link=settings.link
                )
        margin = objectives.margin(*pair_logprobs[:2], opponent[real], opponent[synthetic]).detach()
        nll = objectives.mean_nll(logprobs[real], lengths[real])  # [B]
        if settings.nll_weight:
            loss = loss + settings.nll_weight * nll
        repeats = torch.tensor([group.nll_only for group in groups])
        alone = torch.tensor(_first_responses(groups)).repeat_interleave(repeats).to(device)  # [R]
        alone_nll = objectives.mean_nll(logprobs[alone], lengths[alone])  # [R]
        differing = real != synthetic  # [B]
        metrics = {
            "margin": margin[differing].sum().item(),
            "accuracy": (margin[differing] > 0).sum().item(),
            "real_nll": nll.sum().item() + alone_nll.sum().item(),
        }
        rows = int(differing.sum().item())
        total = loss.sum() + settings.nll_weight * alone_nll.sum()
        return LossOutput(total, metrics, {"margin": rows, "accuracy": rows})

    return loss_fn


def _mix_start(opponent: Tensor, groups: Sequence[PromptGroup], settings: Objective) -> Tensor:
    """Return the reference log-probabilities: the opponent's, mixed with θ_0's if the groups hold them: [S]."""
    if not any(group.start_logprobs for group in groups):
        return opponent
    assert isinstance(settings, LogRatioObjective)
    start = [value for group in groups for value in group.start_logprobs or group.reference_logprobs]
    return objectives.mix_reference(opponent, torch.tensor(start, device=opponent.device), settings.reference_mix)


def pair_indices(groups: Sequence[PromptGroup]) -> Tensor:
    """Return the indices of the real, the synthetic and θ_0's response of each pair among all responses: [3, B].

    If the loss needs no response of θ_0, the third row repeats the second.
    """
    indices = []
    for first, group in zip(_first_responses(groups), groups, strict=True):
        initial = group.initial or [synthetic for _, synthetic in group.pairs]
        indices += [
            (first + real, first + synthetic, first + start)
            for (real, synthetic), start in zip(group.pairs, initial, strict=True)
        ]
    return torch.tensor(indices, dtype=torch.long).reshape(-1, 3).T


def _first_responses(groups: Sequence[PromptGroup]) -> list[int]:
    """Return the index of each group's first response, the real one, among all responses."""
    return [0, *accumulate(len(group.tree.responses) for group in groups[:-1])]


def plan_steps(batch_cost: np.ndarray, batch_size: int, epochs: int, seed: int) -> list[tuple[int, np.ndarray]]:
    """Assign the groups to optimizer steps: every group once per epoch, in a random order.

    Args:
        batch_cost: [groups] share of each group in the batch size.
        batch_size: maximum cost of a step. A group with a larger cost is alone in its step.
        epochs: number of epochs.
        seed: decides the order.

    Returns:
        The epoch and the group indices of each step.
    """
    steps = []
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(batch_cost))
        for chosen in _fill_batches(order, batch_cost, batch_size):
            steps.append((epoch, chosen))
    return steps


def _fill_batches(order: np.ndarray, batch_cost: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    begin = filled = 0
    for place, index in enumerate(order):
        if place > begin and filled + batch_cost[index] > batch_size:
            yield order[begin:place]
            begin, filled = place, 0
        filled += batch_cost[index]
    if begin < len(order):
        yield order[begin:]
