"""Attention over prompt trees and over responses that grow, for any model of transformers.

Registered through transformers' `AttentionInterface`. The layout comes down as a keyword, and no mask is built for a
block that nobody looks at.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spinlm.errors import ModelError
from spinlm.model.trees import Span

TREE_ATTENTION = "spinlm_tree"
"""Name of the tree attention in transformers' `AttentionInterface`."""


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
        if query.dtype != torch.float32 and self.softcap is None:  # the kernels of scoring, which round once
            allowed = mask[:, None, None]
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=allowed, scale=self.scaling, enable_gqa=heads != key.shape[1]
            )
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
