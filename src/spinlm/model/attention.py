"""Attention over prefix trees and over cached responses, for the models of transformers.

The attention is registered in transformers' `AttentionInterface` and receives the structure of the batch as keyword
arguments. No block of scores between two branches or two trees is computed. On a CPU a row is split into segments with
causal attention; on a GPU FlexAttention computes the whole row under a block mask.

Shapes: N rows, L tokens in a row, H query heads, G key-value heads, E head size, Q queries, K keys.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spinlm.errors import ModelError
from spinlm.model.prefix_trees import PrefixTree, TreeSpan, pack_batch

log = logging.getLogger("spinlm")

TREE_ATTENTION = "spinlm_tree"
"""Name of `tree_attention` in transformers' `AttentionInterface`."""

LAYOUT = "spinlm_layout"
"""Attribute of an attention mask with `spans`, `block_masks` or `key_distance`. See `attention_layers`."""

RECOMPILE_LIMIT = 64
"""Compiled versions of FlexAttention per process: by row length, window, training or not. PyTorch's default is 8."""


def register_tree_attention() -> None:
    """Register `tree_attention` with transformers. Models build no attention mask for it."""
    from transformers import AttentionInterface

    AttentionInterface.register(TREE_ATTENTION, tree_attention)


class _Params(NamedTuple):
    """What an attention layer does to its scores."""

    scaling: float | None
    softcap: float | None
    sliding_window: int | None


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
    block_masks: "BlockMasks | None" = None,
    key_distance: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute attention over one row of prefix trees; or, if `key_distance` is given, of one new token per response.

    Args:
        module: the attention layer.
        query: [1, H, L, E]; [N, H, 1, E] with `key_distance`.
        key: [1, G, L, E]; [N, G, K, E] with `key_distance`.
        value: as key.
        attention_mask: ignored, except its attribute `LAYOUT`; `spans` or `key_distance` define the mask.
        scaling: multiplies query · key; None means 1/√E.
        dropout: ignored; players are trained without attention dropout.
        softcap: scores become softcap · tanh(score / softcap), as in Gemma 2.
        sliding_window: number of positions a token attends to, including its own.
        spans: the trees in the row.
        block_masks: masks of the row for FlexAttention. Without them the row is computed in segments.
        key_distance: [N, K] position of the new token minus position of the key; negative where the cache is unused.

    Returns:
        [1, L, H, E] or [N, 1, H, E], and None in place of attention weights.

    Raises:
        ModelError: the model does not pass `spans` to its attention layers.
    """
    layout = getattr(attention_mask, LAYOUT, None)
    if layout is not None:
        return tree_attention(module, query, key, value, None, scaling, dropout, softcap, sliding_window, **layout)
    params = _Params(scaling, softcap, sliding_window)
    if key_distance is not None:
        return _decode_attention(query, key, value, key_distance, params).transpose(1, 2), None
    if not spans:
        raise ModelError(f"{type(module).__name__}: the model does not pass keyword arguments to its attention layers")
    if block_masks is not None:
        return _flex_row_attention(query, key, value, block_masks, params).transpose(1, 2), None
    segments = _segments(spans, query.shape[2])
    lengths = [segment.length for segment in segments]
    queries, keys, values = (states.split(lengths, dim=2) for states in (query, key, value))
    outputs = []
    for index, (segment, q, k, v) in enumerate(zip(segments, queries, keys, values, strict=True)):
        if segment.prompt_segment is None:
            output = value.new_zeros(*q.shape[:3], value.shape[3])
        elif segment.prompt_segment == index:
            output = _causal_attention(q, k, v, params)
        else:
            prompt_k, prompt_v = (
                states[segment.prompt_segment][:, :, : segment.prompt_length] for states in (keys, values)
            )
            output = _causal_attention(q, torch.cat([prompt_k, k], dim=2), torch.cat([prompt_v, v], dim=2), params)
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1), None


class _Segment(NamedTuple):
    """A part of a row with causal attention. Its tokens also attend to the prompt, which may be in another segment."""

    length: int
    prompt_segment: int | None  # number of the segment that begins with the prompt; None for padding
    prompt_length: int


def _segments(spans: Sequence[TreeSpan], row_length: int) -> list[_Segment]:
    """Split a row into segments. A prompt and its first branch are one segment; every other branch is one."""
    segments: list[_Segment] = []
    for span in spans:
        first, *others = [length for _, length in span.branches] or [0]
        prompt_segment = len(segments)
        segments.append(_Segment(span.prompt_length + first, prompt_segment, span.prompt_length))
        segments += [_Segment(length, prompt_segment, span.prompt_length) for length in others if length]
    padding = row_length - sum(segment.length for segment in segments)
    return [*segments, _Segment(padding, None, 0)] if padding else segments


def _causal_attention(query: Tensor, key: Tensor, value: Tensor, params: _Params) -> Tensor:
    """Compute attention of the last Q of K positions: [1, H, Q, E], [1, G, K, E], [1, G, K, E] → [1, H, Q, E]."""
    q, k = query.shape[2], key.shape[2]
    window = params.sliding_window
    if params.softcap is None and q == k and (window is None or k <= window):
        return _sdpa(query, key, value, None, params)
    key_distance = torch.arange(k - q, k, device=query.device)[:, None] - torch.arange(k, device=query.device)
    mask = _visible(key_distance, window)  # [Q, K]
    if params.softcap is None:
        return _sdpa(query, key, value, mask, params)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return _explicit_attention(query, key, value, mask, params)


def _decode_attention(query: Tensor, key: Tensor, value: Tensor, key_distance: Tensor, params: _Params) -> Tensor:
    """Compute attention of one new token per row: [N, H, 1, E], [N, G, K, E], [N, G, K, E], [N, K] → [N, H, 1, E]."""
    rows, heads, _, size = query.shape
    mask = _visible(key_distance, params.sliding_window)[:, None, None]  # [N, 1, 1, K]
    if (
        query.dtype != torch.float32 and params.softcap is None
    ):  # the kernel that also scores responses; it rounds only once
        return _sdpa(query, key, value, mask, params)
    # Heads that share a key become rows of one product: the keys are read once and not copied.
    grouped = query.view(rows, key.shape[1], heads // key.shape[1], size)  # [N, G, H/G, E]
    return _explicit_attention(grouped, key, value, mask, params).reshape(rows, heads, 1, -1)


def _visible(key_distance: Tensor, window: int | None) -> Tensor:
    """Return whether a query attends to a key, from the position of the query minus the position of the key."""
    mask = key_distance >= 0
    return mask if window is None else mask & (key_distance < window)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, params: _Params) -> Tensor:
    """Call PyTorch's attention; causal without a mask."""
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=params.scaling, enable_gqa=grouped
    )


def _explicit_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, params: _Params) -> Tensor:
    """Compute attention by its formula: [N, G, Q, E], [N, G, K, E], [N, G, K, E] → [N, G, Q, E]."""
    scores = query @ key.transpose(2, 3) * (params.scaling or query.shape[-1] ** -0.5)
    if params.softcap is not None:
        scores = params.softcap * torch.tanh(scores / params.softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value


class BlockMasks:
    """FlexAttention's block masks of a row of trees, one per sliding window of the model."""

    def __init__(self, spans: Sequence[TreeSpan], position_ids: Tensor):
        self.position = position_ids[0]  # [L], on the compute device
        tree = torch.full((len(self.position),), len(spans))  # the number after the last tree marks padding
        branch = torch.zeros_like(tree)  # 0 for the prompt
        for number, span in enumerate(spans):
            tree[span.start : span.start + len(span)] = number
            for branch_number, (start, length) in enumerate(span.branches, start=1):
                branch[start : start + length] = branch_number
        self.tree, self.branch = tree.to(self.position.device), branch.to(self.position.device)
        self._cache: dict[int | None, Any] = {}

    def mask_mod(self, window: int | None) -> Callable[..., Tensor]:
        """Return FlexAttention's `mask_mod` under a sliding window."""
        tree, branch, position = self.tree, self.branch, self.position

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            mask = (query >= key) & (tree[query] == tree[key])
            mask &= (branch[key] == 0) | (branch[key] == branch[query])
            return mask if window is None else mask & (position[query] - position[key] < window)

        return visible

    def get(self, window: int | None) -> Any:
        """Return the `BlockMask` under a sliding window, built on first use."""
        from torch.nn.attention.flex_attention import create_block_mask

        if window not in self._cache:
            size, device = len(self.position), self.position.device
            self._cache[window] = create_block_mask(self.mask_mod(window), None, None, size, size, device=device)
        return self._cache[window]


@functools.cache
def _flex_attention() -> Callable[..., Tensor]:
    import torch._dynamo
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
    # fullgraph, because uncompiled FlexAttention holds all scores in memory.
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, fullgraph=True)
    return compiled


def _flex_row_attention(query: Tensor, key: Tensor, value: Tensor, masks: BlockMasks, params: _Params) -> Tensor:
    """Call FlexAttention (arXiv 2412.05496) on a whole row: [1, H, L, E], [1, G, L, E] → [1, H, L, E]."""
    return _flex_attention()(
        query.to(value.dtype),  # rotary embeddings may return another precision
        key.to(value.dtype),
        value,
        score_mod=None if params.softcap is None else _softcap_mod(params.softcap),
        block_mask=masks.get(params.sliding_window),
        scale=params.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _softcap_mod(softcap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


class AttentionShape(NamedTuple):
    """The properties of a model that decide whether FlexAttention has a kernel for it."""

    heads: int
    kv_heads: int
    head_size: int
    softcap: float | None
    sliding_window: int | None

    @classmethod
    def from_config(cls, config: Any) -> "AttentionShape":
        """Read the properties from a transformers config."""
        heads = getattr(config, "num_attention_heads", None) or 1
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        softcap = getattr(config, "attn_logit_softcapping", None)
        window = getattr(config, "sliding_window", None) or getattr(config, "window_size", None)  # the latter: GPT-Neo
        return cls(heads, kv_heads, head_size, softcap, window)


@functools.cache
def flex_attention_works(device: torch.device, dtype: torch.dtype, shape: AttentionShape) -> bool:
    """Return whether FlexAttention compiles on a device and agrees with attention in segments, forward and backward.

    Tested once per process on two rows of small trees. If False, the reason is logged: the GPU is too old, a compiler
    is missing, or no kernel has these head sizes.

    Raises:
        torch.OutOfMemoryError: the test does not fit in GPU memory.
    """
    try:
        # The caller may be in inference mode or under autocast.
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            agrees = all(
                _flex_agrees(device, dtype, shape, window, trees)
                for window in dict.fromkeys((None, shape.sliding_window))
                for trees in (_TEST_TREES, _TEST_TREES[:1])
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the compilers of PyTorch, Triton and C share no exception class
        reason = next(iter(str(error).splitlines()), "")
        log.warning("FlexAttention is not used: %s: %s", type(error).__name__, reason)
        return False
    if not agrees:
        log.warning("FlexAttention is not used: its results on this device differ from those of plain attention")
    return agrees


_TEST_TREES = (PrefixTree([0] * 200, ([0] * 150, [0] * 99)), PrefixTree([0] * 50, ([0] * 60,)))


def _flex_agrees(
    device: torch.device, dtype: torch.dtype, shape: AttentionShape, window: int | None, trees: Sequence[PrefixTree]
) -> bool:
    batch = pack_batch(trees, prefix_sharing=True).to(device)
    assert batch.spans is not None
    row_length, tokens = batch.input_ids.shape[1], sum(map(len, trees))
    generator = torch.Generator().manual_seed(0)
    query, key, value = inputs = [
        torch.randn(1, heads, row_length, shape.head_size, generator=generator).to(device, dtype).requires_grad_()
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    ]
    attend = functools.partial(
        tree_attention, torch.nn.Identity(), query, key, value, None, spans=batch.spans, sliding_window=window
    )
    results = []
    for block_masks in (None, BlockMasks(batch.spans, batch.position_ids)):
        output, _ = attend(softcap=shape.softcap, block_masks=block_masks)
        output = output[:, :tokens]  # without padding
        results.append([output.detach(), *torch.autograd.grad(output.float().square().sum(), inputs)])
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    return all(torch.allclose(plain, flex, tolerance, tolerance) for plain, flex in zip(*results, strict=True))
