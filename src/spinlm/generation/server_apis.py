"""The request and response formats of the servers.

Every request states all sampling parameters. A server uses its own defaults, or those in the model's
generation_config.json, for parameters that a request omits (llama.cpp: min_p 0.05 and top_k 40), and these change the
distribution.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A request for one response."""

    prompt_ids: Sequence[int]
    max_tokens: int  # of the response
    seed: int
    temperature: float
    top_p: float
    stop_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """One response as a server returns it."""

    token_ids: list[int]
    stopped: bool  # at an end token, not at the token limit
    logprobs: list[float] | None = None  # one for each token


class ServerAPI(Protocol):
    """The format of one kind of server."""

    path: str
    adapter_path: str  # with {} for load or unload; empty if the server cannot load adapters
    result_field: str  # the field that holds the token ids, for error messages
    raw_logprobs: bool  # log-probabilities are those before temperature and top-p

    def body(self, model: str | None, request: GenerationRequest) -> dict[str, Any]:
        """Return the JSON body of a request."""
        ...

    def parse(self, reply: Any) -> GenerationResult:
        """Parse the JSON of a reply.

        Raises:
            KeyError, IndexError, TypeError, ValueError: the reply does not hold a complete response.
        """
        ...


class VLLM:
    """vLLM 0.10.2 or newer: /v1/completions with token ids in both directions."""

    path = "/v1/completions"
    adapter_path = "/v1/{}_lora_adapter"  # requires VLLM_ALLOW_RUNTIME_LORA_UPDATING
    result_field = "choices[0].token_ids"
    raw_logprobs = True

    def body(self, model: str | None, request: GenerationRequest) -> dict[str, Any]:
        return _optional_field("model", model) | {
            "prompt": list(request.prompt_ids),
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed,
            "stop_token_ids": list(request.stop_ids),
            "return_token_ids": True,
            "logprobs": 0,  # of the sampled token only
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }

    def parse(self, reply: Any) -> GenerationResult:
        choice = reply["choices"][0]
        token_ids = [int(token) for token in choice["token_ids"]]
        logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
        return GenerationResult(
            token_ids, _is_stopped(choice["finish_reason"]), _complete_logprobs(logprobs, token_ids)
        )


class LlamaCpp:
    """llama.cpp's /completion.

    llama.cpp returns no log-probability for a token that is part of a character; a response with such a token has no
    log-probabilities.
    """

    path = "/completion"
    adapter_path = ""
    result_field = "tokens"
    raw_logprobs = True

    def body(self, model: str | None, request: GenerationRequest) -> dict[str, Any]:
        return _optional_field("model", model) | {
            "prompt": list(request.prompt_ids),
            "n_predict": request.max_tokens,
            "return_tokens": True,
            "n_probs": 1,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed,
            "samplers": ["temperature", "top_p"],  # in this order, and no others
        }

    def parse(self, reply: Any) -> GenerationResult:
        token_ids = [int(token) for token in reply["tokens"]]
        probabilities = reply.get("completion_probabilities") or []
        complete = [int(token["id"]) for token in probabilities] == token_ids
        logprobs = [float(token["logprob"]) for token in probabilities] if complete else None
        return GenerationResult(token_ids, _is_stopped(reply["stop_type"], ("eos", "word"), "limit"), logprobs)


class SGLang:
    """SGLang's /generate. Its log-probabilities are those after temperature and top-p."""

    path = "/generate"
    adapter_path = "/{}_lora_adapter"
    result_field = "output_ids"
    raw_logprobs = False

    def body(self, model: str | None, request: GenerationRequest) -> dict[str, Any]:
        # The model is the name of the adapter.
        return _optional_field("lora_path", model) | {
            "input_ids": list(request.prompt_ids),
            "return_logprob": True,
            "sampling_params": {
                "max_new_tokens": request.max_tokens,
                "temperature": request.temperature,
                "top_p": request.top_p,
                "top_k": -1,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "stop_token_ids": list(request.stop_ids),
                "sampling_seed": request.seed,
            },
        }

    def parse(self, reply: Any) -> GenerationResult:
        token_ids = [int(token) for token in reply["output_ids"]]
        meta = reply["meta_info"]
        logprobs = [entry[0] for entry in meta.get("output_token_logprobs") or ()]
        return GenerationResult(
            token_ids, _is_stopped(meta["finish_reason"]["type"]), _complete_logprobs(logprobs, token_ids)
        )


SERVER_APIS: dict[str, ServerAPI] = {"vllm": VLLM(), "sglang": SGLang(), "llama.cpp": LlamaCpp()}


def _optional_field(field: str, model: str | None) -> dict[str, Any]:
    return {} if model is None else {field: model}


def _is_stopped(reason: Any, stop_reasons: tuple[str, ...] = ("stop",), limit_reason: str = "length") -> bool:
    """Return whether a response stopped at an end token; raise ValueError if the server aborted the response."""
    if reason not in (*stop_reasons, limit_reason):
        raise ValueError(f"ended with {reason!r}")
    return reason != limit_reason


def _complete_logprobs(logprobs: Any, token_ids: list[int]) -> list[float] | None:
    """Return the log-probabilities if there is one for each token."""
    if not isinstance(logprobs, list) or len(logprobs) != len(token_ids) or None in logprobs:
        return None
    return [float(value) for value in logprobs]
