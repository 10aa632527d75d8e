"""Generate responses in this process, in batches, with the model that is also trained.

A finished response leaves the batch at once. With models that support prefix trees the next prompt takes its row, so
no row waits for the longest response of a batch.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from spinlm.errors import ModelError
from spinlm.generation.base import OnProgress, Response, Sampling
from spinlm.model.decoding import BatchState, PaddedBatch, RaggedBatch, StatefulBatch
from spinlm.model.families import ONE_ROW_FAMILIES, keeps_state
from spinlm.model.fused import prepacked_adapters
from spinlm.model.logprobs import LogProbs
from spinlm.utils.signals import check_interrupt

MIN_TEMPERATURE = 1e-6  # a lower temperature is greedy: the logits divided by it would overflow
MIN_FREE_FRACTION = 1 / 4  # of the rows; as soon as this fraction is free, the next prompts are prefilled together

OnToken = Callable[[int, list[int]], None]
"""`on_token(prompt, tokens)`: the response to the prompt with this index consists of these tokens so far."""


@dataclass(slots=True)
class _PartialResponse:
    """A response that is being generated."""

    prompt: int  # index
    max_tokens: int
    draws: Tensor  # [max_tokens] the uniform random number for each token
    prompt_rest: list[int] = field(default_factory=list)  # tokens of the prompt to feed in before the response
    tokens: list[int] = field(default_factory=list)
    logprob: float = 0.0
    finished: bool = False


class LocalEngine:
    """The engine of this process: at most `batch_size` responses at once, with the player that `logprobs` holds."""

    def __init__(self, logprobs: LogProbs, batch_size: int, prefix_sharing: bool):
        self.logprobs, self.prefix_sharing = logprobs, prefix_sharing
        one_row = logprobs.causal_lm.config.model_type in ONE_ROW_FAMILIES
        self.batch_size = 1 if one_row else batch_size

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seed: int,
        on_progress: OnProgress,
        on_token: OnToken = lambda prompt, tokens: None,
    ) -> list[list[Response]]:
        """See `Engine.generate`. `on_token` is called for each new token, in no order among prompts."""
        self.logprobs.eval()
        device = next(self.logprobs.parameters()).device
        partial = [
            _start(index, len(prompt), sample, sampling, seed)
            for index, prompt in enumerate(prompts)
            for sample in range(sampling.samples)
        ]
        # Sort by length, so that padded rows need little padding. The samples of one prompt stay together.
        waiting = deque(sorted(partial, key=lambda response: -len(prompts[response.prompt])))
        dtype = self.logprobs.autocast
        autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
        try:
            with autocast, prepacked_adapters(self.logprobs.causal_lm, min(self.batch_size, len(partial))):
                self._decode(self._batch_state(prompts, partial), prompts, waiting, sampling, on_progress, on_token)
        finally:
            self.logprobs.use_tree_attention(False)  # the default
        responses: list[list[Response]] = [[] for _ in prompts]
        for response in partial:
            responses[response.prompt].append(Response(response.tokens, response.finished, response.logprob))
        return responses

    def _batch_state(self, prompts: Sequence[Sequence[int]], partial: list[_PartialResponse]) -> BatchState:
        if keeps_state(self.logprobs.causal_lm):
            return StatefulBatch(self.logprobs)
        if not self.prefix_sharing:
            return PaddedBatch(self.logprobs)
        longest = max((len(prompts[response.prompt]) + response.max_tokens for response in partial), default=0)
        return RaggedBatch(self.logprobs, min(self.batch_size, len(partial)), longest)

    def _decode(
        self,
        batch: BatchState,
        prompts: Sequence[Sequence[int]],
        waiting: deque[_PartialResponse],
        sampling: Sampling,
        on_progress: OnProgress,
        on_token: OnToken,
    ) -> None:
        """Generate until no response is waiting or running."""
        running: list[_PartialResponse] = []
        logits: list[Tensor] = []
        while waiting or running:
            check_interrupt()
            free = self.batch_size - len(running)
            enough_free = free >= min(self.batch_size * MIN_FREE_FRACTION, len(waiting))
            if waiting and (not running or (batch.supports_continuous_batching and enough_free)):
                new = [waiting.popleft() for _ in range(min(free, len(waiting)))]
                logits.append(batch.prefill(_prefill_prompts(batch, new, prompts)))
                running += new
            draws = torch.stack([response.draws[len(response.tokens)] for response in running])
            tokens, logprobs = sample(torch.cat(logits), sampling.temperature, sampling.top_p, draws)
            unfinished = []
            for row, (response, token, logprob) in enumerate(
                zip(running, tokens.tolist(), logprobs.tolist(), strict=True)
            ):
                if response.prompt_rest:
                    tokens[row] = response.prompt_rest.pop(0)
                    unfinished.append(row)
                    continue
                response.tokens.append(token)
                response.logprob += logprob
                response.finished = token in sampling.stop_ids
                on_token(response.prompt, response.tokens)
                if not response.finished and len(response.tokens) < response.max_tokens:
                    unfinished.append(row)
            on_progress(len(running) - len(unfinished), len(running))
            order = batch.compact(unfinished)
            running = [running[row] for row in order]
            logits = [batch.step(tokens[order])] if running else []


def _prefill_prompts(
    batch: BatchState, new: list[_PartialResponse], prompts: Sequence[Sequence[int]]
) -> list[Sequence[int]]:
    """Return the prompts to prefill: cut to the shortest one if the batch cannot pad."""
    chosen = [prompts[response.prompt] for response in new]
    if batch.supports_padding:
        return chosen
    shortest = min(map(len, chosen))
    for response, prompt in zip(new, chosen, strict=True):
        response.prompt_rest = list(prompt[shortest:])
    return [prompt[:shortest] for prompt in chosen]


def _start(index: int, prompt_length: int, sample: int, sampling: Sampling, seed: int) -> _PartialResponse:
    """Start a response. Its random numbers depend only on the seed, the index of the prompt and the sample number."""
    max_tokens = min(sampling.max_new_tokens, sampling.max_length - prompt_length)
    assert max_tokens > 0, "prepare skips prompts that leave no room for a response"
    draws = np.random.default_rng([seed, index, sample]).random(max_tokens, dtype=np.float32)
    return _PartialResponse(index, max_tokens, torch.from_numpy(draws))


def sample(logits: Tensor, temperature: float, top_p: float, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Sample a token from each row of logits.

    Args:
        logits: [B, V] in float32.
        temperature: divides the logits; 0 selects the most likely token.
        top_p: sample from the smallest set of tokens whose probabilities sum to at least this.
        draws: [B] in float32, uniform in [0, 1): the first token whose cumulative probability exceeds the draw.

    Returns:
        Tokens [B], and their log-probabilities [B] under the model at temperature 1, before top-p.

    Raises:
        ModelError: a row contains NaN or infinite logits.
    """
    log_partition = logits.logsumexp(dim=-1)
    if not torch.isfinite(log_partition).all():
        raise ModelError(
            "the player's logits are not finite: training has diverged. Lower train.learning_rate, and run in another "
            "--run-dir"
        )
    if temperature < MIN_TEMPERATURE:
        tokens = logits.argmax(dim=-1)
    else:
        probs = torch.softmax(logits / temperature, dim=-1)
        if top_p < 1:
            ordered, order = probs.sort(dim=-1, descending=True)
            outside = ordered.cumsum(-1) - ordered >= top_p  # the tokens before this one already sum to top_p
            probs = probs.scatter(-1, order, ordered.masked_fill(outside, 0.0))
        cumulative = probs.cumsum(-1, dtype=torch.float64)  # [B, V]
        threshold = draws.to(cumulative)[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, threshold, right=True).squeeze(1)  # never a token of probability 0
    return tokens, logits.gather(-1, tokens[:, None]).squeeze(1) - log_partition
