"""Packing: how prompts and responses are laid out for one forward pass.

A tree is a prompt with all responses to it. In the tree layout the trees of a micro-batch lie in one row, unpadded,

    [prompt | response 1 | response 2 | … | prompt | response 1 | …]

where positions restart after the prompt for each response and a token sees its own tree's prompt and, causally, its own
response. So the prompt is computed once instead of once per response, and the real response once instead of once per
pair. In the pair layout, for models whose attention cannot take that, each response has a padded row of its own.

Either way nobody's last token is fed in, since nothing is predicted from it, and the last prompt position predicts the
first token of every response.

Shapes: N rows, L tokens in a row, M predicted tokens, S responses in the micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spinlm.model.kernels import BLOCK


@dataclass(frozen=True, slots=True)
class PrefixTree:
    """A prompt and the responses to it, as token ids. Neither the prompt nor a response is empty."""

    prompt: Sequence[int]
    responses: tuple[Sequence[int], ...]

    def __len__(self) -> int:
        """Tokens the tree takes in a row."""
        return len(self.prompt) + sum(len(response) - 1 for response in self.responses)


@dataclass(frozen=True, slots=True)
class TreeSpan:
    """Where one tree lies in its row: the prompt first, then the branches (start, length), which may be empty."""

    start: int
    prompt: int
    branches: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return self.prompt + sum(length for _, length in self.branches)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """A micro-batch as tensors.

    `predict[m]` is the place in the flattened [N·L] row whose output predicts `targets[m]`, a token of response
    `response[m]`; responses are numbered through the trees in order.
    """

    input_ids: Tensor  # [N, L]
    position_ids: Tensor  # [N, L]
    predict: Tensor  # [M]
    targets: Tensor  # [M]
    response: Tensor  # [M]
    responses: int  # S
    spans: tuple[TreeSpan, ...] | None  # of the one row in the tree layout; None in the pair layout

    def to(self, device: torch.device) -> "PackedBatch":
        """The same layout on another device."""
        names = ("input_ids", "position_ids", "predict", "targets", "response")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def pack_batch(trees: Sequence[PrefixTree], prefix_sharing: bool) -> PackedBatch:
    """Lay a micro-batch out as `tree` or `pair`."""
    return _one_row(trees) if prefix_sharing else _row_per_response(trees)


def _one_row(trees: Sequence[PrefixTree]) -> PackedBatch:
    ids: list[int] = []
    positions: list[int] = []
    predict: list[int] = []
    targets: list[int] = []
    response_of: list[int] = []
    spans = []
    number = 0
    for tree in trees:
        start, prompt = len(ids), len(tree.prompt)
        ids += tree.prompt
        positions += range(prompt)
        branches = []
        for response in tree.responses:
            here, fed = len(ids), len(response) - 1
            ids += response[:-1]
            positions += range(prompt, prompt + fed)
            predict += [start + prompt - 1, *range(here, here + fed)]
            targets += response
            response_of += [number] * len(response)
            branches.append((here, fed))
            number += 1
        spans.append(TreeSpan(start, prompt, tuple(branches)))
    padding = -len(ids) % BLOCK if len(ids) > BLOCK else 0  # once, instead of in every product
    ids += [0] * padding
    positions += [0] * padding
    row = torch.tensor([ids]), torch.tensor([positions])
    flat = torch.tensor(predict), torch.tensor(targets), torch.tensor(response_of)
    return PackedBatch(*row, *flat, responses=number, spans=tuple(spans))


def _row_per_response(trees: Sequence[PrefixTree]) -> PackedBatch:
    rows = [([*tree.prompt, *response[:-1]], len(tree.prompt)) for tree in trees for response in tree.responses]
    responses = [response for tree in trees for response in tree.responses]
    width = max(len(ids) for ids, _ in rows)
    # Padding is on the right, where causal attention never looks back from: any token will do.
    input_ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    position_ids = torch.arange(width).expand(len(rows), width)
    predict = [
        number * width + prompt - 1 + offset
        for number, (_, prompt) in enumerate(rows)
        for offset in range(len(responses[number]))
    ]
    targets = [token for response in responses for token in response]
    response_of = [number for number, response in enumerate(responses) for _ in response]
    flat = torch.tensor(predict), torch.tensor(targets), torch.tensor(response_of)
    return PackedBatch(input_ids, position_ids, *flat, responses=len(responses), spans=None)


def micro_batches(trees: Sequence[PrefixTree], budget: int, prefix_sharing: bool = True) -> list[list[int]]:
    """Split trees into micro-batches of at most `budget` tokens (a longer tree is alone), as lists of indices.

    Padding of the pair layout counts; trees of similar length come together, so that there is little of it.
    """
    widths = [len(tree.prompt) + max(map(len, tree.responses)) - 1 for tree in trees]  # of a row in the pair layout
    lengths = [len(tree) for tree in trees] if prefix_sharing else widths
    batches: list[list[int]] = []
    room = width = 0
    for index in sorted(range(len(trees)), key=lambda index: (-lengths[index], index)):
        cost = lengths[index] if prefix_sharing else width * len(trees[index].responses)
        if cost > room or not batches:
            batches.append([])
            room, width = budget, widths[index]
            cost = lengths[index] if prefix_sharing else width * len(trees[index].responses)
        batches[-1].append(index)
        room -= cost
    return batches
