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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spinlm.errors import ModelError

TREE_ATTENTION = "spinlm_tree"
"""Name of the tree attention in transformers' `AttentionInterface`."""


@dataclass(frozen=True, slots=True)
class Tree:
    """A prompt and the responses to it, as token ids. Neither the prompt nor a response is empty."""

    prompt: Sequence[int]
    responses: tuple[Sequence[int], ...]

    def __len__(self) -> int:
        """Tokens the tree takes in a row."""
        return len(self.prompt) + sum(len(response) - 1 for response in self.responses)


@dataclass(frozen=True, slots=True)
class Span:
    """Where one tree lies in its row: the prompt first, then the branches (start, length), which may be empty."""

    start: int
    prompt: int
    branches: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Layout:
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
    spans: tuple[Span, ...] | None  # of the one row in the tree layout; None in the pair layout

    def to(self, device: torch.device) -> "Layout":
        """The same layout on another device."""
        names = ("input_ids", "position_ids", "predict", "targets", "response")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def lay_out(trees: Sequence[Tree], packing: str) -> Layout:
    """Lay a micro-batch out as `tree` or `pair`."""
    return _one_row(trees) if packing == "tree" else _row_per_response(trees)


def _one_row(trees: Sequence[Tree]) -> Layout:
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
        spans.append(Span(start, prompt, tuple(branches)))
    row = torch.tensor([ids]), torch.tensor([positions])
    flat = torch.tensor(predict), torch.tensor(targets), torch.tensor(response_of)
    return Layout(*row, *flat, responses=number, spans=tuple(spans))


def _row_per_response(trees: Sequence[Tree]) -> Layout:
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
    return Layout(input_ids, position_ids, *flat, responses=len(responses), spans=None)


def micro_batches(trees: Sequence[Tree], budget: int, packing: str = "tree") -> list[list[int]]:
    """Split trees into micro-batches of at most `budget` tokens (a longer tree is alone), as lists of indices.

    Padding of the pair layout counts; trees of similar length come together, so that there is little of it.
    """
    widths = [len(tree.prompt) + max(map(len, tree.responses)) - 1 for tree in trees]  # of a row in the pair layout
    lengths = [len(tree) for tree in trees] if packing == "tree" else widths
    batches: list[list[int]] = []
    room = width = 0
    for index in sorted(range(len(trees)), key=lambda index: (-lengths[index], index)):
        cost = lengths[index] if packing == "tree" else width * len(trees[index].responses)
        if cost > room or not batches:
            batches.append([])
            room, width = budget, widths[index]
            cost = lengths[index] if packing == "tree" else width * len(trees[index].responses)
        batches[-1].append(index)
        room -= cost
    return batches


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    spans: tuple[Span, ...] = (),
    ends: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention over one row of trees that never computes a block between branches or between trees.

    Or, with `ends`, of one new token in each of many rows that have been computed before; K is their longest.

    Args:
        module: the attention layer that calls.
        query: [1, heads, L, head size].
        key: [1, key heads, L, head size].
        value: as key.
        attention_mask: unused; the layout says who sees whom.
        scaling: multiplies query · key; None is 1/√(head size).
        dropout: unused; players are trained without attention dropout.
        softcap: scores become softcap · tanh(score / softcap), as in Gemma 2.
        sliding_window: a token sees this many positions, itself included.
        spans: where the trees lie.
        ends: [rows] the position of each row's new token. Then query is [rows, heads, 1, head size], and key and value
            are [rows, key heads, K, head size].

    Returns:
        [1, L, heads, head size] or [rows, 1, heads, head size], and None for the attention weights.

    Raises:
        ModelError: the model has not passed the spans on.
    """
    attend = _Attend(scaling, softcap, sliding_window)
    if ends is not None:
        return attend.last(query, key, value, ends).transpose(1, 2), None
    if not spans:
        raise ModelError(f"{type(module).__name__}: does not hand the layout of prompt trees down to its attention")
    out = []
    for span in spans:
        first = span.branches[0][1] if span.branches else 0
        # Prompt and first branch are adjacent and plainly causal.
        trunk = slice(span.start, span.start + span.prompt + first)
        out.append(attend(query[:, :, trunk], key[:, :, trunk], value[:, :, trunk]))
        prompt = slice(span.start, span.start + span.prompt)
        for start, length in span.branches[1:]:
            if length == 0:
                continue
            branch = slice(start, start + length)
            keys = torch.cat([key[:, :, prompt], key[:, :, branch]], dim=2)
            values = torch.cat([value[:, :, prompt], value[:, :, branch]], dim=2)
            out.append(attend(query[:, :, branch], keys, values))
    return torch.cat(out, dim=2).transpose(1, 2), None


@dataclass(frozen=True, slots=True)
class _Attend:
    """Causal attention of the last Q of K positions over all K."""

    scaling: float | None
    softcap: float | None
    window: int | None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[1, H, Q, D], [1, G, K, D], [1, G, K, D] → [1, H, Q, D]."""
        q, k = query.shape[2], key.shape[2]
        windowed = self.window is not None and k > self.window
        if self.softcap is None:
            grouped = query.shape[1] != key.shape[1]
            if q == k and not windowed:
                return F.scaled_dot_product_attention(
                    query, key, value, is_causal=True, scale=self.scaling, enable_gqa=grouped
                )
            mask = self._mask(q, k, query.device)
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=self.scaling, enable_gqa=grouped
            )
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        return self._explicit(query, key, value, self._mask(q, k, query.device))

    def last(self, query: Tensor, key: Tensor, value: Tensor, ends: Tensor) -> Tensor:
        """The query of one token in each row, at its position `ends`: [B, H, 1, D], [B, G, K, D] → [B, H, 1, D].

        Heads that share a key go together as the rows of one product, so that keys are read once, where they are.
        """
        rows, heads, _, size = query.shape
        behind = ends[:, None] - torch.arange(key.shape[2], device=query.device)  # [B, K]
        mask = behind >= 0 if self.window is None else (behind >= 0) & (behind < self.window)
        grouped = query.view(rows, key.shape[1], heads // key.shape[1], size)
        return self._explicit(grouped, key, value, mask[:, None, None]).reshape(rows, heads, 1, -1)

    def _explicit(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """By its formula: [B, G, Q, D], [B, G, K, D], [B, G, K, D] → [B, G, Q, D]."""
        scores = query @ key.transpose(2, 3) * (self.scaling or query.shape[-1] ** -0.5)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        scores = scores.masked_fill(~mask, float("-inf"))
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value

    def _mask(self, q: int, k: int, device: torch.device) -> Tensor:
        behind = torch.arange(k - q, k, device=device)[:, None] - torch.arange(k, device=device)[None, :]
        mask = behind >= 0
        return mask if self.window is None else mask & (behind < self.window)


def register_tree_attention() -> None:
    """Make `tree_attention` known to transformers; the models' own mask code then builds no mask for it."""
    from transformers import AttentionInterface

    AttentionInterface.register(TREE_ATTENTION, tree_attention)
