"""What a player is trained on: examples or pairs on disk, a tree for each prompt, and the objective over them."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spinlm.model.prefix_trees import PrefixTree
from spinlm.recipe.schema import Recipe, value_at
from spinlm.rundir.records import Example, RecordFile, read_lines, read_pairs
from spinlm.training import objectives
from spinlm.training.trainer import Item, Total


class SftItems:
    """Examples on disk as trees with one response, weighed by its tokens."""

    def __init__(self, path: Path, size: int = 1):
        """
        Args:
            path: of the examples.
            size: what each counts towards a batch.
        """
        self._records = RecordFile(path, Example)
        self.weights = np.array([len(example.response_ids) for example in read_lines(path, Example)], dtype=np.int64)
        self.sizes = np.full(len(self.weights), size, dtype=np.int64)

    def __getitem__(self, index: int) -> Item:
        example = self._records[index]
        return Item(PrefixTree(example.prompt_ids, (example.response_ids,)))


def sft_objective(logprobs: Tensor, items: Sequence[Item]) -> Total:
    """Negative log-likelihood, summed; per token once it is divided by the items' weights."""
    return Total(-logprobs.sum())


class PairItems:
    """Pairs on disk, grouped into one tree for each prompt. A group larger than a batch is split."""

    def __init__(self, paths: Sequence[Path], batch_size: int):
        self._table = read_pairs(paths)
        names = self._table.column("id").to_numpy()
        starts = np.flatnonzero(np.r_[True, names[1:] != names[:-1]]) if len(names) else np.array([], dtype=np.int64)
        bounds = [
            (begin, min(begin + batch_size, end))
            for start, end in pairwise([*starts, len(names)])
            for begin in range(start, end, batch_size)
        ]
        self._bounds = np.array(bounds, dtype=np.int64).reshape(-1, 2)
        self.sizes = self.weights = self._bounds[:, 1] - self._bounds[:, 0]  # pairs

    def __getitem__(self, index: int) -> Item:
        begin, end = self._bounds[index]
        rows = self._table.slice(begin, end - begin).to_pylist()
        responses = [rows[0]["real_ids"], *(row["synthetic_ids"] for row in rows)]
        initial = tuple(_place(responses, row["initial_ids"]) for row in rows if row.get("initial_ids"))
        opponent = [rows[0]["opponent_real"], *(row["opponent_synthetic"] for row in rows)]
        opponent += [math.nan] * (len(responses) - len(opponent))  # θ_0's responses: nobody asks
        pairs = tuple((0, number + 1) for number in range(len(rows)))
        return Item(PrefixTree(rows[0]["prompt_ids"], tuple(responses)), tuple(opponent), pairs, initial)


def _place(responses: list[list[int]], wanted: list[int]) -> int:
    """Where a response stands among others; it is added to them if it does not."""
    if wanted not in responses:
        responses.append(wanted)
    return responses.index(wanted)


def pair_objective(recipe: Recipe, iteration: int) -> Callable[[Tensor, Sequence[Item]], Total]:
    """The recipe's objective at an iteration, summed over pairs."""
    settings = recipe.objective
    beta = value_at(settings.beta, iteration)

    def objective(logprobs: Tensor, items: Sequence[Item]) -> Total:
        device = logprobs.device
        opponent = torch.tensor([value for item in items for value in item.opponent], device=device)  # [S]
        tokens = torch.tensor([len(response) for item in items for response in item.tree.responses], device=device)
        real, synthetic, initial = pair_indices(items).to(device)  # [B] each
        four = (logprobs[real], logprobs[synthetic], opponent[real], opponent[synthetic])
        match settings.name:
            case "spin":
                lengths = (tokens[real], tokens[synthetic]) if settings.length_normalize else None
                loss = objectives.spin(*four, beta=beta, loss=settings.link, tokens=lengths)
            case "dpo-positive":
                loss = objectives.dpo_positive(*four, beta=beta, penalty=settings.dpop_lambda)
            case "space":
                loss = objectives.space(*four, mu=settings.mu)
            case "t-spin":
                weight = settings.history_weight
                three = (logprobs[real], logprobs[synthetic], logprobs[initial])
                loss = objectives.t_spin(*three, beta=beta, history_weight=weight, loss=settings.link)
            case _:
                raise AssertionError(f"{settings.name} is not an objective over pairs")
        margin = objectives.margin(*four).detach()
        nll = objectives.mean_nll(logprobs[real], tokens[real])  # [B]
        if settings.nll_weight:
            loss = loss + settings.nll_weight * nll
        extra = {
            "margin": margin.sum().item(),
            "accuracy": (margin > 0).sum().item(),
            "real_nll": nll.sum().item(),
        }
        return Total(loss.sum(), extra)

    return objective


def pair_indices(items: Sequence[Item]) -> Tensor:
    """Which of the micro-batch's responses are the real, the synthetic and θ_0's one of each pair: [3, B].

    Where a pair has no response of θ_0 beside it, its synthetic one stands for it.
    """
    indices = []
    before = 0
    for item in items:
        initial = item.initial or [synthetic for _, synthetic in item.pairs]
        indices += [
            (before + real, before + synthetic, before + first)
            for (real, synthetic), first in zip(item.pairs, initial, strict=True)
        ]
        before += len(item.tree.responses)
    return torch.tensor(indices).T
