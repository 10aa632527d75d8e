"""Batches of responses that are decoded one token at a time.

A `BatchState` has three operations: `prefill` prompts, `step` every running response by one token, `compact` the batch
to the responses that continue. `RaggedBatch` computes no padding. Prompts are packed into one row, as trees without
responses; each response has its own row in the cache; and a prompt can join whenever a row is free. `PaddedBatch` is
for models whose attention cannot be replaced. It pads on the left, and takes new prompts only after all responses
ended. `StatefulBatch` is for models that keep a state, such as Mamba. Padding would change the state, so all rows have
the same length: `prefill` gets the first tokens of each prompt, and the rest of a prompt is fed in by `step`.

Shapes: N running responses, L tokens in a row, K cached tokens of the longest response, G key-value heads, E head size,
D hidden, V vocabulary.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from spinlm.model.families import text_model
from spinlm.model.logprobs import LogProbs
from spinlm.model.prefix_trees import PrefixTree, TreeSpan, pack_batch

PREFILL_TOKENS = 2048
"""Prompt tokens per forward pass. A longer prompt is prefilled alone."""

STATE_NAMES = ("past_key_values", "cache_params", "state")
"""Names under which models return their state, and take it as an argument."""


class BatchState(Protocol):
    """Running responses and their cache."""

    supports_continuous_batching: bool
    """Whether `prefill` may be called while responses are running."""
    supports_padding: bool
    """Whether the prompts of one `prefill` may differ in length."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Append one response per prompt. Return the logits of their first tokens: [number of prompts, V]."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token [N] to each running response. Return the logits of the next tokens: [N, V]."""
        ...

    def compact(self, rows: list[int]) -> list[int]:
        """Remove all responses except those in `rows`. Return `rows` in their new order."""
        ...


class RaggedCache(Cache):
    """Keys and values of all layers; each row begins at index 0: [max_rows, G, max_length, E] per layer."""

    def __init__(self, max_rows: int, max_length: int):
        super().__init__(layers=[])
        self.max_rows, self.max_length = max_rows, max_length
        self.buffers: dict[int, tuple[Tensor, ...]] = {}  # by layer
        self.lengths: list[int] = []  # [N] cached tokens of each running response, including its prompt
        self.prefilling: list[tuple[TreeSpan, list[int]]] | None = None  # each prompt with the rows to copy it into
        self._rows = self._positions = torch.empty(0, dtype=torch.long)  # [N] where `update` writes the next token

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Store the keys and values of a layer. Return those that its attention reads."""
        if layer_idx not in self.buffers:
            # Zeros, because masked values are multiplied by 0 and must not be NaN.
            self.buffers[layer_idx] = tuple(
                states.new_zeros(self.max_rows, states.shape[1], self.max_length, states.shape[3])
                for states in (key_states, value_states)
            )
        buffers = self.buffers[layer_idx]
        for buffer, states in zip(buffers, (key_states, value_states), strict=True):
            if self.prefilling is None:
                buffer[self._rows, :, self._positions] = states[:, :, 0]
            else:
                for span, rows in self.prefilling:
                    prompt = states[:, :, span.start : span.start + span.prompt_length]
                    buffer[rows, :, : span.prompt_length] = prompt
        if self.prefilling is not None:
            return key_states, value_states
        return tuple(buffer[: len(self.lengths), :, : max(self.lengths)] for buffer in buffers)

    def extend(self, device: torch.device) -> Tensor:
        """Add one token to the length of each running response. Return the position ids of these tokens: [N]."""
        self._rows = torch.arange(len(self.lengths), device=device)
        self._positions = torch.tensor(self.lengths, device=device)
        self.lengths = [length + 1 for length in self.lengths]
        return self._positions

    def copy_rows(self, source: list[int], target: list[int]) -> None:
        """Copy the rows `source` to the rows `target`."""
        longest = max(self.lengths)
        for buffers in self.buffers.values():
            for buffer in buffers:
                buffer[target, :, :longest] = buffer[source, :, :longest]


class RaggedBatch:
    """At most `max_rows` responses of at most `max_length` tokens with their prompts, without padding."""

    supports_continuous_batching = True
    supports_padding = True

    def __init__(self, logprobs: LogProbs, max_rows: int, max_length: int):
        self.logprobs = logprobs
        self.device = next(logprobs.parameters()).device
        self.cache = RaggedCache(max_rows, max_length)
        logprobs.use_tree_attention(True)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """See `BatchState`. Consecutive occurrences of one prompt object are computed once."""
        return torch.cat([self._prefill(group) for group in _prefill_groups(prompts)])

    def _prefill(self, group: list[tuple[Sequence[int], int]]) -> Tensor:
        """Prefill (prompt, number of responses) in one forward pass."""
        batch = pack_batch([PrefixTree(prompt, ()) for prompt, _ in group], prefix_sharing=True).to(self.device)
        assert batch.spans is not None
        self.cache.prefilling = []
        for span, (prompt, count) in zip(batch.spans, group, strict=True):
            first = len(self.cache.lengths)
            self.cache.prefilling.append((span, list(range(first, first + count))))
            self.cache.lengths += [len(prompt)] * count
        hidden = self._forward(batch.input_ids, batch.position_ids, **self.logprobs.attention_kwargs(batch))[0]
        last = [span.start + span.prompt_length - 1 for span, rows in self.cache.prefilling for _ in rows]
        self.cache.prefilling = None
        return self.logprobs.logits(hidden[last])

    def step(self, tokens: Tensor) -> Tensor:
        """See `BatchState`."""
        positions = self.cache.extend(self.device)[:, None]  # [N, 1]
        key_distance = positions - torch.arange(max(self.cache.lengths), device=self.device)  # [N, K]
        layout = self.logprobs.layout_kwargs(self.device, key_distance=key_distance)
        return self.logprobs.logits(self._forward(tokens[:, None], positions, **layout)[:, 0])

    def compact(self, rows: list[int]) -> list[int]:
        """See `BatchState`. The last responses move to the rows that become free."""
        count = len(rows)
        free = sorted(set(range(count)) - set(rows))
        moved = [row for row in rows if row >= count]
        if free:
            self.cache.copy_rows(moved, free)
        source = dict(zip(free, moved, strict=True))
        order = [source.get(row, row) for row in range(count)]
        self.cache.lengths = [self.cache.lengths[row] for row in order]
        return order

    def _forward(self, input_ids: Tensor, position_ids: Tensor, **attention: Any) -> Tensor:
        """Return the final hidden states: [rows, tokens, D]."""
        output = text_model(self.logprobs.causal_lm)(
            input_ids=input_ids, position_ids=position_ids, past_key_values=self.cache, use_cache=True, **attention
        )
        states: Tensor = output.last_hidden_state
        return states


def _prefill_groups(prompts: Sequence[Sequence[int]]) -> list[list[tuple[Sequence[int], int]]]:
    """Divide the prompts into forward passes, in order. Return each prompt with its consecutive occurrences."""
    groups: list[list[tuple[Sequence[int], int]]] = []
    free = 0
    for _, same in groupby(prompts, key=id):
        prompt, *others = same
        if not groups or len(prompt) > free:
            groups.append([])
            free = PREFILL_TOKENS
        groups[-1].append((prompt, 1 + len(others)))
        free -= len(prompt)
    return groups


class PaddedBatch:
    """Responses padded on the left to one length, with the cache and masks of transformers."""

    supports_continuous_batching = False
    supports_padding = True

    def __init__(self, logprobs: LogProbs):
        self.model = logprobs.causal_lm
        self.device = next(logprobs.parameters()).device
        logprobs.use_tree_attention(False)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """See `BatchState`. Replaces all responses."""
        length = max(map(len, prompts))
        padding = [length - len(prompt) for prompt in prompts]
        ids = [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
        mask = [[0] * pad + [1] * (length - pad) for pad in padding]
        self.attention_mask = torch.tensor(mask, device=self.device)  # [N, K]
        self.position_ids = (self.attention_mask.cumsum(1) - 1).clamp(min=0)  # [N, L] of the tokens fed in next
        self.cache = DynamicCache(config=self.model.config)
        return self._forward(torch.tensor(ids, device=self.device))

    def step(self, tokens: Tensor) -> Tensor:
        """See `BatchState`."""
        self.attention_mask = torch.cat([self.attention_mask, self.attention_mask.new_ones(len(tokens), 1)], dim=1)
        self.position_ids = self.position_ids[:, -1:] + 1
        return self._forward(tokens[:, None])

    def compact(self, rows: list[int]) -> list[int]:
        """See `BatchState`."""
        if 0 < len(rows) < len(self.attention_mask):  # with no rows left, `prefill` replaces the state
            index = torch.tensor(rows, device=self.device)
            self.attention_mask, self.position_ids = self.attention_mask[index], self.position_ids[index]
            self.cache.batch_select_indices(index)
        return rows

    def _forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(
            input_ids=input_ids,
            attention_mask=self.attention_mask,
            position_ids=self.position_ids,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return logits.float()


class StatefulBatch:
    """The responses of a model that keeps a state. All rows have the same length.

    Each family keeps its state in another place and shape, so no row can be removed. The row of an ended response
    computes tokens that are ignored.
    """

    supports_continuous_batching = False
    supports_padding = False

    def __init__(self, logprobs: LogProbs):
        self.logprobs, self.model = logprobs, text_model(logprobs.causal_lm)
        self.device = next(logprobs.parameters()).device
        logprobs.use_tree_attention(False)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """See `BatchState`. Replaces all responses."""
        self.rows = list(range(len(prompts)))  # [N] of the running responses, in the state
        self.num_rows, self.length = len(prompts), 0
        self.state: dict[str, Any] = {}
        if hasattr(self.model, "_setup_cache"):  # RecurrentGemma returns no cache, and the rest is in its modules
            self.model._setup_cache(self.model.config, len(prompts), self.device, self.model.dtype)
            self.state = {"past_key_values": DynamicCache(config=self.model.config)}
        return self._forward(torch.tensor(prompts, device=self.device))

    def step(self, tokens: Tensor) -> Tensor:
        """See `BatchState`."""
        rows = tokens.new_zeros(self.num_rows)
        rows[self.rows] = tokens
        return self._forward(rows[:, None])[self.rows]

    def compact(self, rows: list[int]) -> list[int]:
        """See `BatchState`."""
        self.rows = [self.rows[row] for row in rows]
        return rows

    def _forward(self, input_ids: Tensor) -> Tensor:
        positions = torch.arange(self.length, self.length + input_ids.shape[1], device=self.device)
        self.length += input_ids.shape[1]
        output = self.model(
            input_ids=input_ids, position_ids=positions.expand_as(input_ids), use_cache=True, **self.state
        )
        self.state |= {name: state for name in STATE_NAMES if (state := getattr(output, name, None)) is not None}
        return self.logprobs.logits(output.last_hidden_state[:, -1])
