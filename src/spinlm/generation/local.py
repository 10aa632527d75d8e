"""The opponent inside this process: batched sampling with the model that also trains.

A response that ends leaves the batch at once, and with models that take prompt trees the next prompt takes its place,
so a batch never waits for its longest response.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from spinlm.errors import ModelError
from spinlm.generation.base import Progress, Response
from spinlm.model.decoding import BatchState, PaddedBatch, RaggedBatch
from spinlm.model.fused import prepacked_adapters
from spinlm.model.logprobs import LogProbs
from spinlm.rundir.records import Sampling
from spinlm.utils.signals import check_interrupt

GREEDY = 1e-6  # temperatures below it would divide to infinity

REFILL = 4  # new prompts come in when one in so many rows is free

Show = Callable[[int, list[int]], None]
"""`show(prompt, tokens)`: the answer to a prompt has grown to these tokens."""


@dataclass(slots=True)
class _Reply:
    """A response in progress."""

    prompt: int  # which
    limit: int  # of its tokens
    draws: Tensor  # [limit] the random number behind each token
    tokens: list[int] = field(default_factory=list)
    logprob: float = 0.0
    finished: bool = False


class LocalEngine:
    """The local engine."""

    def __init__(self, logprobs: LogProbs, batch_size: int, prefix_sharing: bool):
        """
        Args:
            logprobs: the model, holding the current opponent.
            batch_size: responses that run at once.
            prefix_sharing: whether the model's attention takes prefix trees.
        """
        self.logprobs = logprobs
        self.batch_size = batch_size
        self.prefix_sharing = prefix_sharing

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seed: int,
        progress: Progress,
        show: Show = lambda prompt, tokens: None,
    ) -> list[list[Response]]:
        """See `Engine.generate`. `show` is called for each new token, in no order among prompts."""
        self.logprobs.eval()
        device = next(self.logprobs.parameters()).device
        replies = [
            _begin(index, len(prompt), number, sampling, seed)
            for index, prompt in enumerate(prompts)
            for number in range(sampling.samples)
        ]
        # By length, so that padded rows have little padding; samples of one prompt stay together.
        waiting = deque(sorted(replies, key=lambda reply: -len(prompts[reply.prompt])))
        kind = self.logprobs.autocast
        autocast = torch.autocast(device.type, dtype=kind, enabled=kind is not None)
        try:
            with autocast, prepacked_adapters(self.logprobs.causal_lm, min(self.batch_size, len(replies))):
                self._decode(self._rows(prompts, replies), prompts, waiting, sampling, progress, show)
        finally:
            self.logprobs.use_tree_attention(False)  # the model as others expect it
        answers: list[list[Response]] = [[] for _ in prompts]
        for reply in replies:
            answers[reply.prompt].append(Response(reply.tokens, reply.finished, reply.logprob))
        return answers

    def _rows(self, prompts: Sequence[Sequence[int]], replies: list[_Reply]) -> BatchState:
        if not self.prefix_sharing:
            return PaddedBatch(self.logprobs)
        room = max((len(prompts[reply.prompt]) + reply.limit for reply in replies), default=0)
        return RaggedBatch(self.logprobs, min(self.batch_size, len(replies)), room)

    def _decode(
        self,
        rows: BatchState,
        prompts: Sequence[Sequence[int]],
        waiting: deque[_Reply],
        sampling: Sampling,
        progress: Progress,
        show: Show,
    ) -> None:
        """Bring every waiting reply to its end."""
        running: list[_Reply] = []
        logits: list[Tensor] = []
        while waiting or running:
            check_interrupt()
            free = self.batch_size - len(running)
            if waiting and (
                not running
                or (rows.supports_continuous_batching and free >= min(self.batch_size / REFILL, len(waiting)))
            ):
                new = [waiting.popleft() for _ in range(min(free, len(waiting)))]
                logits.append(rows.prefill([prompts[reply.prompt] for reply in new]))
                running += new
            draws = torch.stack([reply.draws[len(reply.tokens)] for reply in running])
            chosen, logprob = sample(torch.cat(logits), sampling.temperature, sampling.top_p, draws)
            kept = []
            for row, (reply, token, value) in enumerate(zip(running, chosen.tolist(), logprob.tolist(), strict=True)):
                reply.tokens.append(token)
                reply.logprob += value
                reply.finished = token in sampling.stop_ids
                show(reply.prompt, reply.tokens)
                if not reply.finished and len(reply.tokens) < reply.limit:
                    kept.append(row)
            progress(len(running) - len(kept), len(running))
            order = rows.compact(kept)
            running = [running[row] for row in order]
            logits = [rows.step(chosen[order])] if running else []


def _begin(index: int, length: int, sample: int, sampling: Sampling, seed: int) -> _Reply:
    """A reply whose random numbers depend on nothing but the seed, the prompt's place and the sample's number."""
    limit = min(sampling.max_new_tokens, sampling.max_length - length)
    assert limit > 0, "a prompt that leaves no room is no example"
    draws = np.random.default_rng([seed, index, sample]).random(limit, dtype=np.float32)
    return _Reply(index, limit, torch.from_numpy(draws))


def sample(logits: Tensor, temperature: float, top_p: float, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a token from each row of logits.

    Args:
        logits: [B, V] in float32.
        temperature: divides the logits; 0 takes the most likely token.
        top_p: sample from the smallest set of tokens that holds this share of the probability.
        draws: [B] in float32, uniform in [0, 1): the token is where the cumulative distribution passes it.

    Returns:
        Tokens [B], and their log-probabilities [B] under the model at temperature 1, before top-p.

    Raises:
        ModelError: a row has no finite logits.
    """
    total = logits.logsumexp(dim=-1)
    if not torch.isfinite(total).all():
        raise ModelError(
            "the player's logits are not finite: training has destroyed it. Lower train.learning_rate, and run in "
            "another --run-dir"
        )
    if temperature < GREEDY:
        chosen = logits.argmax(dim=-1)
    else:
        probs = torch.softmax(logits / temperature, dim=-1)
        if top_p < 1:
            ordered, order = probs.sort(dim=-1, descending=True)
            beyond = ordered.cumsum(-1) - ordered >= top_p  # the mass before this token is already enough
            probs = probs.scatter(-1, order, ordered.masked_fill(beyond, 0.0))
        below = probs.cumsum(-1, dtype=torch.float64)  # [B, V]
        place = draws.to(below)[:, None] * below[:, -1:]
        chosen = torch.searchsorted(below, place, right=True).squeeze(1)  # never a token of probability 0
    return chosen, logits.gather(-1, chosen[:, None]).squeeze(1) - total
