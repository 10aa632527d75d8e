"""The opponent inside this process: batched sampling with the model that also trains.

Prompts are sorted by length and padded on the left. A response that ends leaves the batch at once, so a batch never
waits for its longest one at full width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spinlm.errors import ModelError
from spinlm.interrupt import stop_if_asked
from spinlm.model.logprobs import LogProbs
from spinlm.opponents.base import Answer, Progress
from spinlm.records import Sampling


class LocalOpponent:
    """The transformers engine."""

    def __init__(self, logprobs: LogProbs, batch_size: int):
        self.logprobs = logprobs
        self.batch_size = batch_size

    @torch.inference_mode()
    def answer(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int, progress: Progress
    ) -> list[list[Answer]]:
        """See `Opponent.answer`."""
        self.logprobs.eval()
        self.logprobs.use_attention(tree=False)
        device = next(self.logprobs.parameters()).device
        generator = torch.Generator(device).manual_seed(seed)
        answers: list[list[Answer]] = [[] for _ in prompts]
        jobs = [index for index in range(len(prompts)) for _ in range(sampling.samples)]
        jobs.sort(key=lambda index: (len(prompts[index]), index))
        for start in range(0, len(jobs), self.batch_size):
            batch = jobs[start : start + self.batch_size]
            with torch.autocast(device.type, dtype=self.logprobs.autocast, enabled=self.logprobs.autocast is not None):
                replies = _decode(self.logprobs.causal, [prompts[i] for i in batch], sampling, generator, progress)
            for index, reply in zip(batch, replies, strict=True):
                answers[index].append(reply)
        return answers


def _decode(
    model: Any,
    prompts: list[Sequence[int]],
    sampling: Sampling,
    generator: torch.Generator,
    progress: Progress,
) -> list[Answer]:
    """Continue prompts until each has reached a stop token or the limit.

    Shapes: B responses still running, P longest prompt, V vocabulary.
    """
    from transformers import DynamicCache

    device = generator.device
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)  # [B, P]
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)  # [B, P + generated]
    position = (mask.cumsum(1) - 1).clamp(min=0)
    stop = torch.tensor(sampling.stop_ids, device=device)
    tokens: list[list[int]] = [[] for _ in prompts]
    logprob = [0.0] * len(prompts)
    finished = [False] * len(prompts)
    limit = torch.tensor(
        [min(sampling.max_new_tokens, sampling.max_length - len(prompt)) for prompt in prompts], device=device
    )
    running = list(range(len(prompts)))  # which response each row of the batch is
    cache = DynamicCache(config=model.config)
    for generated in range(1, sampling.max_new_tokens + 1):
        stop_if_asked()
        logits = (
            model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            .logits[:, -1]
            .float()
        )  # [B, V]
        chosen, chosen_logprob = sample(logits, sampling.temperature, sampling.top_p, generator)
        ended = torch.isin(chosen, stop)
        for row, token, value, end in zip(
            running, chosen.tolist(), chosen_logprob.tolist(), ended.tolist(), strict=True
        ):
            tokens[row].append(token)
            logprob[row] += value
            finished[row] = end
        keep = (~ended & (limit[running] > generated)).nonzero().squeeze(1)
        progress(len(running) - len(keep), len(running))
        if len(keep) == 0:
            break
        mask = torch.cat([mask, mask.new_ones(len(running), 1)], dim=1)
        if len(keep) < len(running):
            running = [running[row] for row in keep.tolist()]
            chosen, mask, position = chosen[keep], mask[keep], position[keep]
            cache.batch_select_indices(keep)
        ids, position = chosen[:, None], position[:, -1:] + 1
    return [Answer(*reply) for reply in zip(tokens, finished, logprob, strict=True)]


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw a token from each row of logits.

    Args:
        logits: [B, V] in float32.
        temperature: divides the logits; 0 takes the most likely token.
        top_p: sample from the smallest set of tokens that holds this share of the probability.
        generator: source of randomness.

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
    if temperature == 0:
        chosen = logits.argmax(dim=-1)
    else:
        probs = torch.softmax(logits / temperature, dim=-1)
        if top_p < 1:
            ordered, order = probs.sort(dim=-1, descending=True)
            beyond = ordered.cumsum(-1) - ordered >= top_p  # the mass before this token is already enough
            probs = probs.scatter(-1, order, ordered.masked_fill(beyond, 0.0))
        chosen = torch.multinomial(probs, 1, generator=generator).squeeze(1)
    return chosen, logits.gather(-1, chosen[:, None]).squeeze(1) - total
