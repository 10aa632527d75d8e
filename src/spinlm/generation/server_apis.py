"""How servers are asked for a response, and what they send back.

Every request names the whole of the sampling: a server that is not told takes what its own defaults or the model's
generation_config.json say (llama.cpp min_p 0.05 and top_k 40, for example), which is another distribution.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Wish:
    """One response that is wanted."""

    prompt_ids: Sequence[int]
    text: str  # the prompt as text, of which a server makes the same tokens
    limit: int  # of its tokens
    seed: int
    temperature: float
    top_p: float
    stop_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server sent back."""

    stopped: bool  # it ended by itself, not by the limit
    token_ids: list[int] | None = None  # None: `text` instead
    text: str = ""
    logprobs: list[float] | None = None  # of each of token_ids


def _stopped(reason: Any, ends: tuple[str, ...] = ("stop",), limit: str = "length") -> bool:
    """Whether a response ended by itself. One that was broken off is none: ValueError."""
    if reason not in (*ends, limit):
        raise ValueError(f"ended with {reason!r}")
    return reason != limit


class Dialect(Protocol):
    """A kind of server. `read` raises KeyError, IndexError, TypeError or ValueError for what it does not understand."""

    path: str
    adapters: str | None  # where it is told of a new adapter, with lora_name and lora_path
    dropped: str | None  # where it is told that an adapter is needed no more, with lora_name
    what: str  # the field that a reply has to have
    raw_logprobs: bool  # before temperature and top-p

    def body(self, model: str | None, wish: Wish) -> dict[str, Any]: ...

    def read(self, answer: Any) -> Reply: ...


class OpenAI:
    """Any server with /v1/completions: text in and out, and nothing asked that is not in OpenAI's own interface."""

    path = "/v1/completions"
    adapters: str | None = None
    dropped: str | None = None
    what = "choices[0].text"
    raw_logprobs = True

    def body(self, model: str | None, wish: Wish) -> dict[str, Any]:
        """The request for one response."""
        named = {} if model is None else {"model": model}
        return named | {
            "prompt": wish.text,
            "max_tokens": wish.limit,
            "temperature": wish.temperature,
            "top_p": wish.top_p,
            "seed": wish.seed,
        }

    def read(self, answer: Any) -> Reply:
        """The response in an answer."""
        choice = answer["choices"][0]
        if not isinstance(choice["text"], str):
            raise TypeError("no text")
        return Reply(_stopped(choice["finish_reason"]), text=choice["text"])


class VLLM(OpenAI):
    """vLLM from 0.10.2 on: token ids both ways, log-probabilities before temperature (its default)."""

    adapters: str | None = "/v1/load_lora_adapter"  # where VLLM_ALLOW_RUNTIME_LORA_UPDATING is set
    dropped: str | None = "/v1/unload_lora_adapter"
    what = "choices[0].token_ids"

    def body(self, model: str | None, wish: Wish) -> dict[str, Any]:
        """The request for one response."""
        return super().body(model, wish) | {
            "prompt": list(wish.prompt_ids),
            "stop_token_ids": list(wish.stop_ids),
            "return_token_ids": True,
            "logprobs": 0,  # that of the token itself
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }

    def read(self, answer: Any) -> Reply:
        """The response in an answer."""
        choice = answer["choices"][0]
        ids = [int(token) for token in choice["token_ids"]]
        given = (choice.get("logprobs") or {}).get("token_logprobs")
        return Reply(_stopped(choice["finish_reason"]), ids, logprobs=_matching(given, ids))


class LlamaCpp:
    """llama.cpp's own /completion: token ids both ways, and log-probabilities before any sampler.

    It has none for tokens that are but a part of a character, so an answer with such a token goes without.
    """

    path = "/completion"
    adapters: str | None = None
    dropped: str | None = None
    what = "tokens"
    raw_logprobs = True

    def body(self, model: str | None, wish: Wish) -> dict[str, Any]:
        """The request for one response."""
        named = {} if model is None else {"model": model}
        return named | {
            "prompt": list(wish.prompt_ids),
            "n_predict": wish.limit,
            "return_tokens": True,
            "n_probs": 1,
            "temperature": wish.temperature,
            "top_p": wish.top_p,
            "seed": wish.seed,
            "samplers": ["temperature", "top_p"],  # in this order, and no others
        }

    def read(self, answer: Any) -> Reply:
        """The response in an answer."""
        ids = [int(token) for token in answer["tokens"]]
        about = answer.get("completion_probabilities") or []
        same = [int(token["id"]) for token in about] == ids
        logprobs = [float(token["logprob"]) for token in about] if same else None
        return Reply(_stopped(answer["stop_type"], ("eos", "word"), "limit"), ids, logprobs=logprobs)


class SGLang:
    """SGLang's own /generate: token ids both ways, and log-probabilities after temperature and top-p."""

    path = "/generate"
    adapters: str | None = "/load_lora_adapter"
    dropped: str | None = "/unload_lora_adapter"
    what = "output_ids"
    raw_logprobs = False

    def body(self, model: str | None, wish: Wish) -> dict[str, Any]:
        """The request for one response; `model` is the adapter's name."""
        named = {} if model is None else {"lora_path": model}
        return named | {
            "input_ids": list(wish.prompt_ids),
            "return_logprob": True,
            "sampling_params": {
                "max_new_tokens": wish.limit,
                "temperature": wish.temperature,
                "top_p": wish.top_p,
                "top_k": -1,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "stop_token_ids": list(wish.stop_ids),
                "sampling_seed": wish.seed,
            },
        }

    def read(self, answer: Any) -> Reply:
        """The response in an answer."""
        ids = [int(token) for token in answer["output_ids"]]
        about = answer["meta_info"]
        given = [entry[0] for entry in about.get("output_token_logprobs") or ()]
        return Reply(_stopped(about["finish_reason"]["type"]), ids, logprobs=_matching(given, ids))


DIALECTS: dict[str, Dialect] = {"openai": OpenAI(), "vllm": VLLM(), "llama.cpp": LlamaCpp(), "sglang": SGLang()}


def _matching(values: Any, ids: list[int]) -> list[float] | None:
    if not isinstance(values, list) or len(values) != len(ids) or None in values:
        return None
    return [float(value) for value in values]
