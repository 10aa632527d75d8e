"""A player as a model of lm-evaluation-harness."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from spinlm.distributed.progress import Advance, track
from spinlm.model.families import row_limit
from spinlm.model.players import Players
from spinlm.utils.signals import check_interrupt


class PlayerLM(HFLM):
    """The harness's Hugging Face model, on the weights of the player that is loaded.

    An adapter is not merged into its base. Log-probabilities are computed in float32.
    """

    def __init__(self, players: Players, batch_size: int):
        """Wrap the model of `players`, which must have loaded a player; `batch_size` requests share a forward pass."""
        players.logprobs.use_tree_attention(False)
        tokenizer = copy.deepcopy(players.tokenizer)  # the harness may add a padding token
        tokenizer.chat_template = players.renderer.template
        limit = row_limit(players.model.config.to_dict())
        super().__init__(
            pretrained=players.model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            max_length=limit[1] if limit else None,  # by default, the harness takes that of the config
            mixed_precision_dtype=players.logprobs.autocast,
            softmax_dtype=torch.float32,
        )
        self._stop_ids = torch.tensor(players.renderer.stop_ids)
        self.label = ""  # of the progress bar
        self.truncated = False  # whether a prompt was too long and lost its beginning

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> Any:
        with self._progress(requests):
            return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> Any:
        with self._progress(requests):
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> Any:
        with self._progress(requests):
            return super().generate_until(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        self.truncated |= any(len(context) + len(target) > self.max_length + 1 for _, context, target in requests)
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def tok_batch_encode(
        self, strings: Any, padding_side: str = "left", left_truncate_len: int | None = None, truncation: bool = False
    ) -> Any:
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        if left_truncate_len is not None and ids.shape[1] > left_truncate_len:
            self.truncated = True
            ids, mask = ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]
        return ids, mask

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Generate as the harness does, but end a response at every stop token, which may differ from EOS."""
        kwargs.setdefault("eos_token_id", self._stop_ids.tolist())
        rows = super()._model_generate(context, *args, **kwargs)
        generated = rows[:, context.shape[1] :]
        generated[torch.isin(generated, self._stop_ids.to(rows.device))] = self.tokenizer.pad_token_id
        return rows

    @contextmanager
    def _progress(self, requests: list[Instance]) -> Iterator[None]:
        """Show the progress of the harness, and stop between batches if the user asks for it."""
        check_interrupt()
        with track(self.label, len(requests), unit="characters") as advance:
            self.set_cache_hook(_ProgressHook(advance))
            yield


class _ProgressHook:
    """A cache hook that counts results. The harness calls it with each result and its request."""

    def __init__(self, advance: Advance):
        self._advance = advance

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self._advance(amount=sum(len(part) for part in req if isinstance(part, str)))
        check_interrupt()
