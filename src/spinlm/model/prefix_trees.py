"""Pack prompts and responses into the tensors of one forward pass.

A prefix tree is one prompt with all responses to it. With prefix sharing, the trees of a micro-batch are packed into
one row without padding,

    [prompt | response 1 | response 2 | … | prompt | response 1 | …]

The position ids of every response continue those of its prompt. A token attends to its tree's prompt and, causally, to
its own response. The prompt is computed once instead of once per response, and the real response once instead of once
per pair. Without prefix sharing, for models whose attention cannot be replaced, every response has its own padded row.

The last token of a response is not fed in, because nothing is predicted from it. The last token of the prompt predicts
the first token of every response.

Shapes: N rows, L tokens in a row, M predicted tokens, S responses.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spinlm.model.kernels import ROW_BLOCK


@dataclass(frozen=True, slots=True)
class PrefixTree:
    """A prompt and its responses as token ids. Neither the prompt nor a response is empty."""

    prompt: Sequence[int]
    responses: tuple[Sequence[int], ...]

    def __len__(self) -> int:
        """Number of tokens fed in with prefix sharing."""
        return len(self.prompt) + sum(len(response) - 1 for response in self.responses)


@dataclass(frozen=True, slots=True)
class TreeSpan:
    """The place of a tree in a row."""

    start: int  # of the prompt
    prompt_length: int
    branches: tuple[tuple[int, int], ...]  # (start, length) of each response without its last token; length may be 0

    def __len__(self) -> int:
        return self.prompt_length + sum(length for _, length in self.branches)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """A micro-batch as tensors.

    Hidden state number `logits_indices[m]` of the flattened [N·L] batch predicts `targets[m]`, a token of response
    number `response_indices[m]`. Responses are numbered in the order of the trees.
    """

    input_ids: Tensor  # [N, L]
    position_ids: Tensor  # [N, L]
    logits_indices: Tensor  # [M]
    targets: Tensor  # [M]
    response_indices: Tensor  # [M]
    num_responses: int  # S
    spans: tuple[TreeSpan, ...] | None  # the trees in the one row; None without prefix sharing

    def to(self, device: torch.device) -> "PackedBatch":
        """Copy the tensors to a device."""
        names = ("input_ids", "position_ids", "logits_indices", "targets", "response_indices")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def pack_batch(trees: Sequence[PrefixTree], prefix_sharing: bool) -> PackedBatch:
    """Pack trees into one row, or without prefix sharing into one row per response."""
    return _pack_one_row(trees) if prefix_sharing else _pack_row_per_response(trees)


def _pack_one_row(trees: Sequence[PrefixTree]) -> PackedBatch:
    ids: list[int] = []
    positions: list[int] = []
    logits_indices: list[int] = []
    spans = []
    for tree in trees:
        start, prompt_length = len(ids), len(tree.prompt)
        ids += tree.prompt
        positions += range(prompt_length)
        branches = []
        for response in tree.responses:
            branch, length = len(ids), len(response) - 1
            ids += response[:-1]
            positions += range(prompt_length, prompt_length + length)
            logits_indices += [start + prompt_length - 1, *range(branch, branch + length)]
            branches.append((branch, length))
        spans.append(TreeSpan(start, prompt_length, tuple(branches)))
    padding = (
        -len(ids) % ROW_BLOCK if len(ids) > ROW_BLOCK else 0
    )  # padded once here, and not in every `kernels.linear`
    input_ids, position_ids = torch.tensor([ids + [0] * padding]), torch.tensor([positions + [0] * padding])
    return PackedBatch(input_ids, position_ids, torch.tensor(logits_indices), *_targets(trees), tuple(spans))


def _pack_row_per_response(trees: Sequence[PrefixTree]) -> PackedBatch:
    pairs = [(tree.prompt, response) for tree in trees for response in tree.responses]
    length = max(len(prompt) + len(response) - 1 for prompt, response in pairs)
    rows = [[*prompt, *response[:-1]] for prompt, response in pairs]
    # Padding is on the right, where causal attention never looks, so any token id will do.
    input_ids = torch.tensor([ids + [0] * (length - len(ids)) for ids in rows])
    position_ids = torch.arange(length).expand(len(rows), length)
    logits_indices = [
        row * length + len(prompt) - 1 + offset
        for row, (prompt, response) in enumerate(pairs)
        for offset in range(len(response))
    ]
    return PackedBatch(input_ids, position_ids, torch.tensor(logits_indices), *_targets(trees), spans=None)


def _targets(trees: Sequence[PrefixTree]) -> tuple[Tensor, Tensor, int]:
    """Return `targets` [M], `response_indices` [M] and `num_responses` of a batch."""
    responses = [response for tree in trees for response in tree.responses]
    targets = [token for response in responses for token in response]
    indices = [index for index, response in enumerate(responses) for _ in response]
    return torch.tensor(targets), torch.tensor(indices), len(responses)


def micro_batches(trees: Sequence[PrefixTree], budget: int, prefix_sharing: bool = True) -> list[list[int]]:
    """Split trees into micro-batches of at most `budget` tokens, padding included, as lists of indices.

    A tree longer than the budget is alone in a micro-batch. Trees are taken from the longest to the shortest, so that
    padded rows have little padding.
    """
    row_lengths = [len(tree.prompt) + max(map(len, tree.responses)) - 1 for tree in trees]  # without prefix sharing
    lengths = [len(tree) for tree in trees] if prefix_sharing else row_lengths

    def cost(index: int, row_length: int) -> int:
        return lengths[index] if prefix_sharing else row_length * len(trees[index].responses)

    batches: list[list[int]] = []
    free = row_length = 0
    for index in sorted(range(len(trees)), key=lambda index: (-lengths[index], index)):
        if not batches or cost(index, row_length) > free:
            batches.append([])
            free, row_length = budget, row_lengths[index]
        batches[-1].append(index)
        free -= cost(index, row_length)
    return batches
