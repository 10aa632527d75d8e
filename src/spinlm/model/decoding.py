"""The state of responses that grow a token at a time, for models that take prompt trees and for those that do not.

Both kinds offer the same three acts: `admit` prompts, `step` every running response by one token, `keep` some of them.
`RaggedRows` computes nothing for padding: prompts go through the model side by side in one row, as trees without
responses, each response has a row of its own in the cache, and a new one can be admitted whenever a row is free.
`PaddedRows`, for models with an attention of their own, pads on the left and starts anew only when all have ended.

Shapes: B running responses, T longest of them, H heads, G key heads, D head size, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from spinlm.model.logprobs import LogProbs
from spinlm.model.prefix_trees import PrefixTree, TreeSpan, pack_batch

PREFILL_TOKENS = 2048  # of prompts in one forward pass


class Rows(Protocol):
    """Responses in progress."""

    refills: bool
    """Whether prompts can be admitted while others are running."""

    def admit(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Begin responses, after those that are running; returns the logits [prompts, V] of their first tokens."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Continue every running response by its token [B]; returns the logits [B, V] of the next ones."""
        ...

    def keep(self, rows: list[int]) -> list[int]:
        """Let go of all but these; returns them in the order they have from now on."""
        ...


class RaggedCache(Cache):
    """Keys and values of every layer, each row from its own beginning: [rows, G, room, D]."""

    def __init__(self, rows: int, room: int):
        super().__init__(layers=[])
        self.rows, self.room = rows, room
        self.buffers: dict[int, tuple[Tensor, Tensor]] = {}  # by layer
        self.lengths: list[int] = []  # of the running responses, their prompts included
        self._running = self._ends = torch.empty(0, dtype=torch.long)  # rows, and where their next token goes
        self.prompts: list[tuple[TreeSpan, list[int]]] | None = None  # being admitted, and the rows each goes to

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Store what a layer has computed; returns what its attention is to see."""
        if layer_idx not in self.buffers:
            # Zeros, not whatever was there: a masked place still takes part in 0 · value.
            shape = (self.rows, key_states.shape[1], self.room)
            keys = key_states.new_zeros(*shape, key_states.shape[3])
            self.buffers[layer_idx] = keys, value_states.new_zeros(*shape, value_states.shape[3])
        buffers = self.buffers[layer_idx]
        for buffer, states in zip(buffers, (key_states, value_states), strict=True):
            if self.prompts is None:
                buffer[self._running, :, self._ends] = states[:, :, 0]
            else:
                for span, rows in self.prompts:
                    buffer[rows, :, : span.prompt] = states[:, :, span.start : span.start + span.prompt]
        if self.prompts is not None:
            return key_states, value_states
        running, longest = len(self.lengths), max(self.lengths)
        return tuple(buffer[:running, :, :longest] for buffer in buffers)

    def grow(self, device: torch.device) -> Tensor:
        """Make room for one more token of each running response; returns its position: [B]."""
        self._running = torch.arange(len(self.lengths), device=device)
        self._ends = torch.tensor(self.lengths, device=device)
        self.lengths = [length + 1 for length in self.lengths]
        return self._ends

    def move(self, source: list[int], target: list[int]) -> None:
        """Copy rows over others."""
        longest = max(self.lengths)
        for buffers in self.buffers.values():
            for buffer in buffers:
                buffer[target, :, :longest] = buffer[source, :, :longest]


class RaggedRows:
    """Rows of different lengths without padding."""

    refills = True

    def __init__(self, logprobs: LogProbs, rows: int, room: int):
        """
        Args:
            logprobs: the model, whose attention takes trees.
            rows: how many responses run at most at once.
            room: tokens in the longest of them, its prompt included.
        """
        self.logprobs = logprobs
        self.device = next(logprobs.parameters()).device
        self.cache = RaggedCache(rows, room)
        logprobs.use_attention(tree=True)

    def admit(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """See `Rows`. A prompt that comes several times in succession is computed once."""
        logits = []
        for group in _groups(prompts):
            first = len(self.cache.lengths)
            distinct: list[Sequence[int]] = []
            rows: list[list[int]] = []
            for number, prompt in enumerate(group):
                if not distinct or prompt is not distinct[-1]:
                    distinct.append(prompt)
                    rows.append([])
                rows[-1].append(first + number)
            layout = pack_batch([PrefixTree(prompt, ()) for prompt in distinct], True).to(self.device)
            assert layout.spans is not None
            self.cache.prompts = list(zip(layout.spans, rows, strict=True))
            self.cache.lengths += [len(prompt) for prompt in group]
            inputs = self.logprobs.attention_inputs(layout)
            hidden = self._forward(layout.input_ids, layout.position_ids, **inputs)[0]
            last = [span.start + span.prompt - 1 for span, rows in self.cache.prompts for _ in rows]
            logits.append(self.logprobs.logits(hidden[last]))
            self.cache.prompts = None
        return torch.cat(logits)

    def step(self, tokens: Tensor) -> Tensor:
        """See `Rows`."""
        ends = self.cache.grow(self.device)
        behind = ends[:, None] - torch.arange(max(self.cache.lengths), device=self.device)
        return self.logprobs.logits(self._forward(tokens[:, None], ends[:, None], behind=behind)[:, 0])

    def keep(self, rows: list[int]) -> list[int]:
        """See `Rows`. The last responses move to the places that have become free."""
        kept, count = set(rows), len(rows)
        free = [row for row in range(count) if row not in kept]
        last = [row for row in rows if row >= count]
        if free:
            self.cache.move(last, free)
        taken = dict(zip(free, last, strict=True))
        order = [taken.get(row, row) for row in range(count)]
        self.cache.lengths = [self.cache.lengths[row] for row in order]
        return order

    def _forward(self, input_ids: Tensor, position_ids: Tensor, **layout: Any) -> Tensor:
        output = self.logprobs.causal.base_model(
            input_ids=input_ids, position_ids=position_ids, past_key_values=self.cache, use_cache=True, **layout
        )
        states: Tensor = output.last_hidden_state
        return states


def _groups(prompts: Sequence[Sequence[int]]) -> list[list[Sequence[int]]]:
    """The prompts in order, in groups of few tokens; repeats of one in succession stay together."""
    groups: list[list[Sequence[int]]] = []
    room = 0
    for number, prompt in enumerate(prompts):
        if number and prompt is prompts[number - 1]:
            groups[-1].append(prompt)
            continue
        if not groups or len(prompt) > room:
            groups.append([])
            room = PREFILL_TOKENS
        groups[-1].append(prompt)
        room -= len(prompt)
    return groups


class PaddedRows:
    """Rows padded on the left to one length, through transformers' own cache and masks."""

    refills = False

    def __init__(self, logprobs: LogProbs):
        self.model = logprobs.causal
        self.device = next(logprobs.parameters()).device
        logprobs.use_attention(tree=False)

    def admit(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """See `Rows`. Nothing may be running."""
        width = max(map(len, prompts))
        pads = [width - len(prompt) for prompt in prompts]
        ids = [[0] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)]
        mask = [[0] * pad + [1] * (width - pad) for pad in pads]
        self.mask = torch.tensor(mask, device=self.device)  # [B, T]
        self.position = (self.mask.cumsum(1) - 1).clamp(min=0)  # [B, new]
        self.cache = DynamicCache(config=self.model.config)
        return self._forward(torch.tensor(ids, device=self.device))

    def step(self, tokens: Tensor) -> Tensor:
        """See `Rows`."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        self.position = self.position[:, -1:] + 1
        return self._forward(tokens[:, None])

    def keep(self, rows: list[int]) -> list[int]:
        """See `Rows`."""
        if 0 < len(rows) < len(self.mask):  # when all have ended, the next prompts begin anew
            index = torch.tensor(rows, device=self.device)
            self.mask, self.position = self.mask[index], self.position[index]
            self.cache.batch_select_indices(index)
        return rows

    def _forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(
            input_ids=input_ids,
            attention_mask=self.mask,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return logits.float()
