"""Attention over prompt trees and over responses that grow, for any model of transformers.

Registered through transformers' `AttentionInterface`. The layout comes down as a keyword, and no block that nobody
looks at is computed: on a CPU a row is cut into pieces that are plainly causal, on a GPU FlexAttention computes all of
it at once under a block mask.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spinlm.errors import ModelError
from spinlm.model.prefix_trees import PrefixTree, TreeSpan, pack_batch

log = logging.getLogger("spinlm")

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
    spans: tuple[TreeSpan, ...] = (),
    masks: "BlockMasks | None" = None,
    behind: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention over one row of trees that never computes a block between branches or between trees.

    Or, with `behind`, of one new token in each of many rows that have been computed before; K is their longest.

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
        masks: of the same row, to compute it by FlexAttention.
        behind: [rows, K] how far each key's position is behind that of its row's new token; negative where there is no
            key. Then query is [rows, heads, 1, head size], and key and value are [rows, key heads, K, head size].

    Returns:
        [1, L, heads, head size] or [rows, 1, heads, head size], and None for the attention weights.

    Raises:
        ModelError: the model has not passed the spans on.
    """
    attend = _Attend(scaling, softcap, sliding_window)
    if behind is not None:
        return attend.last(query, key, value, behind).transpose(1, 2), None
    if not spans:
        raise ModelError(f"{type(module).__name__}: does not hand the layout of prompt trees down to its attention")
    if masks is not None:
        return attend.blocks(query, key, value, masks).transpose(1, 2), None
    pieces = _pieces(spans, query.shape[2])
    queries, keys, values = (states.split([length for length, *_ in pieces], dim=2) for states in (query, key, value))
    out = []
    for number, (_length, trunk, prompt) in enumerate(pieces):
        if trunk is None:
            out.append(value.new_zeros(*queries[number].shape[:3], value.shape[3]))
        elif trunk == number:
            out.append(attend(queries[number], keys[number], values[number]))
        else:
            before = (of[trunk][:, :, :prompt] for of in (keys, values))
            seen = [torch.cat([one, of[number]], dim=2) for one, of in zip(before, (keys, values), strict=True)]
            out.append(attend(queries[number], seen[0], seen[1]))
    return torch.cat([one.transpose(1, 2) for one in out], dim=1), None


def _pieces(spans: Sequence[TreeSpan], total: int) -> list[tuple[int, int | None, int]]:
    """A row cut up: for each piece its length, the piece that begins with its prompt, and the prompt's length.

    A prompt and its first branch are adjacent and plainly causal: they are one piece, whose prompt is its own. What is
    left of the row is padding, without a prompt.
    """
    pieces: list[tuple[int, int | None, int]] = []
    for span in spans:
        first, *others = [length for _, length in span.branches] or [0]
        trunk = len(pieces)
        pieces.append((span.prompt + first, trunk, span.prompt))
        pieces += [(length, trunk, span.prompt) for length in others if length]
    padding = total - sum(length for length, *_ in pieces)
    return [*pieces, (padding, None, 0)] if padding else pieces


class BlockMasks:
    """Who sees whom in a row of trees, as FlexAttention takes it: a block mask for each sliding window in the model."""

    def __init__(self, spans: Sequence[TreeSpan], position_ids: Tensor):
        """
        Args:
            spans: where the trees lie.
            position_ids: [1, L], on the device to compute on.
        """
        self.position = position_ids[0]
        tree = torch.full((len(self.position),), len(spans))  # what is left of the row is padding, a tree of its own
        branch = torch.zeros_like(tree)  # 0 is the prompt
        for number, span in enumerate(spans):
            tree[span.start : span.start + len(span)] = number
            for place, (start, length) in enumerate(span.branches):
                branch[start : start + length] = place + 1
        self.tree, self.branch = tree.to(self.position.device), branch.to(self.position.device)
        self._made: dict[int | None, Any] = {}

    def allows(self, window: int | None) -> Callable[..., Tensor]:
        """FlexAttention's `mask_mod`: whether the query at one place of the row sees the key at another."""
        tree, branch, position = self.tree, self.branch, self.position

        def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            seen = (query >= key) & (tree[query] == tree[key])
            seen &= (branch[key] == 0) | (branch[key] == branch[query])
            return seen if window is None else seen & (position[query] - position[key] < window)

        return allowed

    def of(self, window: int | None) -> Any:
        """The block mask under a sliding window; made once."""
        from torch.nn.attention.flex_attention import create_block_mask

        if window not in self._made:
            size, device = len(self.position), self.position.device
            self._made[window] = create_block_mask(self.allows(window), None, None, size, size, device=device)
        return self._made[window]


RECOMPILATIONS = 64  # row lengths and windows, training and scoring: PyTorch's own limit is 8


@functools.cache
def _flex_attention() -> Callable[..., Tensor]:
    import torch._dynamo
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = max(RECOMPILATIONS, torch._dynamo.config.recompile_limit)
    # In full, for what is not compiled would hold all scores at once.
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, fullgraph=True)
    return compiled


@dataclass(frozen=True, slots=True)
class HeadSizes:
    """What decides whether FlexAttention has a kernel for a model."""

    heads: int
    key_heads: int
    size: int
    softcap: float | None
    window: int | None

    @classmethod
    def of(cls, config: Any) -> "HeadSizes":
        """As the config of a model of transformers says."""
        heads = getattr(config, "num_attention_heads", None) or 1
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        keys = getattr(config, "num_key_value_heads", None) or heads
        softcap, window = (getattr(config, name, None) for name in ("attn_logit_softcapping", "sliding_window"))
        return cls(heads, keys, size, softcap, window)


@functools.cache
def flex_works(device: torch.device, dtype: torch.dtype, sizes: HeadSizes) -> bool:
    """Whether FlexAttention compiles for a model on a device, and gives there what attention piece by piece gives.

    Tried once in a process, on two rows of a few trees, forward and backward. Says so in the log where it does not: a
    GPU that is too old, a compiler that is missing, heads that there is no kernel for.
    """
    try:
        # Whoever asks first may be sampling, in another mode than training.
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            close = all(
                _flex_agrees(device, dtype, sizes, window, trees)
                for window in dict.fromkeys((None, sizes.window))
                for trees in (_PROBES, _PROBES[:1])
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # PyTorch's compiler, Triton and the C compiler behind it have no common family
        log.warning(
            "FlexAttention cannot be used: %s: %s", type(error).__name__, next(iter(str(error).splitlines()), "")
        )
        return False
    if not close:
        log.warning("FlexAttention gives other results on this device than plain attention, and is not used")
    return close


_PROBES = (PrefixTree([0] * 200, ([0] * 150, [0] * 99)), PrefixTree([0] * 50, ([0] * 60,)))


def _flex_agrees(
    device: torch.device, dtype: torch.dtype, sizes: HeadSizes, window: int | None, trees: Sequence[PrefixTree]
) -> bool:
    layout = pack_batch(trees, True).to(device)
    assert layout.spans is not None
    length, real = layout.input_ids.shape[1], sum(map(len, trees))
    generator = torch.Generator().manual_seed(0)
    query, key, value = inputs = [
        torch.randn(1, heads, length, sizes.size, generator=generator).to(device, dtype).requires_grad_()
        for heads in (sizes.heads, sizes.key_heads, sizes.key_heads)
    ]
    found = []
    for masks in (None, BlockMasks(layout.spans, layout.position_ids)):
        out, _ = tree_attention(
            torch.nn.Identity(),
            query,
            key,
            value,
            None,
            softcap=sizes.softcap,
            sliding_window=window,
            spans=layout.spans,
            masks=masks,
        )
        out = out[:, :real]  # of padding nothing is asked
        found.append([out.detach(), *torch.autograd.grad(out.float().square().sum(), inputs)])
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    return all(torch.allclose(ours, theirs, tolerance, tolerance) for ours, theirs in zip(*found, strict=True))


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

    def last(self, query: Tensor, key: Tensor, value: Tensor, behind: Tensor) -> Tensor:
        """The query of one token in each row: [B, H, 1, D], [B, G, K, D], `behind` [B, K] → [B, H, 1, D].

        Heads that share a key go together as the rows of one product, so that keys are read once, where they are.
        """
        rows, heads, _, size = query.shape
        mask = behind >= 0 if self.window is None else (behind >= 0) & (behind < self.window)
        if query.dtype != torch.float32 and self.softcap is None:  # the kernels of scoring, which round once
            allowed = mask[:, None, None]
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=allowed, scale=self.scaling, enable_gqa=heads != key.shape[1]
            )
        grouped = query.view(rows, key.shape[1], heads // key.shape[1], size)
        return self._explicit(grouped, key, value, mask[:, None, None]).reshape(rows, heads, 1, -1)

    def blocks(self, query: Tensor, key: Tensor, value: Tensor, masks: BlockMasks) -> Tensor:
        """A whole row by FlexAttention (arXiv 2412.05496): [1, H, L, D], [1, G, L, D] → [1, H, L, D]."""
        return _flex_attention()(
            query.to(value.dtype),  # rotary positions may have left it in another precision
            key.to(value.dtype),
            value,
            score_mod=None if self.softcap is None else _cap(self.softcap),
            block_mask=masks.of(self.window),
            scale=self.scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )

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


def _cap(limit: float) -> Callable[..., Tensor]:
    """FlexAttention's `score_mod` for a softcap."""

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return limit * torch.tanh(score / limit)

    return capped


def register_tree_attention() -> None:
    """Make `tree_attention` known to transformers; the models' own mask code then builds no mask for it."""
    from transformers import AttentionInterface

    AttentionInterface.register(TREE_ATTENTION, tree_attention)
