"""Requests to servers, and responses made of what they return: literal values."""

from typing import Any

import pytest

from models import save_tiny_model, tiny_recipe
from spinlm.data.renderer import Renderer
from spinlm.generation.server import ServerError, merge_extra_body, to_response
from spinlm.generation.server_apis import SERVER_APIS, GenerationRequest, GenerationResult
from spinlm.model.players import Players
from spinlm.rundir.layout import RunDir


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    folder = tmp_path_factory.mktemp("model")
    return Players(tiny_recipe(save_tiny_model(folder)), RunDir(folder)).renderer


def request_for(renderer: Renderer) -> GenerationRequest:
    prompt = renderer.prompt_ids([{"role": "user", "content": "What is 1?"}])
    return GenerationRequest(prompt, 4, 1, 1.0, 1.0, renderer.stop_ids)


def convert(result: GenerationResult, renderer: Renderer) -> tuple[list[int], bool, float | None]:
    response = to_response(result, request_for(renderer), renderer)
    return response.token_ids, response.finished, response.logprob


def test_finished_response(renderer: Renderer) -> None:
    end = renderer.end_id
    assert convert(GenerationResult([7, 8, end], True, [-1.0, -2.0, -0.5]), renderer) == ([7, 8, end], True, -3.5)


def test_missing_end_token_is_added_without_logprob(renderer: Renderer) -> None:
    assert convert(GenerationResult([7, 8], True, [-1.0, -2.0]), renderer) == ([7, 8, renderer.end_id], True, None)


def test_truncated_response_gets_no_end_token(renderer: Renderer) -> None:
    result = GenerationResult([7, 8, 9, 10], False, [-1.0] * 4)
    assert convert(result, renderer) == ([7, 8, 9, 10], False, -4.0)


def test_tokens_after_the_end_or_the_limit_are_removed(renderer: Renderer) -> None:
    end = renderer.end_id
    assert convert(GenerationResult([7, end, 8, 9], False, [-1.0] * 4), renderer) == ([7, end], True, -2.0)
    assert convert(GenerationResult([7, 8, 9, 10, 11], True), renderer) == ([7, 8, 9, 10], False, None)


def test_end_token_of_the_server_is_replaced(renderer: Renderer) -> None:
    foreign = next(token for token in renderer.special_ids if token not in renderer.stop_ids)
    assert convert(GenerationResult([7, 8, foreign], True), renderer)[0] == [7, 8, renderer.end_id]


@pytest.mark.parametrize("ids", [[], [7, 8]])
def test_response_cut_by_the_context_of_the_server(ids: list[int], renderer: Renderer) -> None:
    with pytest.raises(ServerError, match=f"{len(ids)} of 4 tokens"):
        convert(GenerationResult(ids, False), renderer)


@pytest.mark.parametrize("name", sorted(SERVER_APIS))
def test_request_states_all_sampling_parameters(name: str, renderer: Renderer) -> None:
    """Temperature, top-p, and what would truncate the distribution: the server's defaults must not apply."""
    body = SERVER_APIS[name].body("it", request_for(renderer))
    body |= body.pop("sampling_params", {})
    assert (body["temperature"], body["top_p"]) == (1.0, 1.0)
    if name == "llama.cpp":
        assert body["samplers"] == ["temperature", "top_p"]
    else:
        assert (body["top_k"] in (0, -1), body["min_p"], body["repetition_penalty"]) == (True, 0, 1)


ABORTED: dict[str, dict[str, Any]] = {
    "vllm": {"choices": [{"token_ids": [7], "finish_reason": "abort"}]},
    "llama.cpp": {"tokens": [7], "stop_type": "none"},
    "sglang": {"output_ids": [7], "meta_info": {"finish_reason": {"type": "abort"}}},
}


@pytest.mark.parametrize("name", sorted(SERVER_APIS))
def test_aborted_response_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match="ended with"):
        SERVER_APIS[name].parse(ABORTED[name])


def test_extra_body_changes_single_fields() -> None:
    body = {"a": 1, "b": {"c": 2, "d": 3}}
    assert merge_extra_body(body, {"b": {"d": None, "e": 4}, "f": 5}) == {"a": 1, "b": {"c": 2, "e": 4}, "f": 5}
    assert merge_extra_body(body, {"b": None}) == {"a": 1} and body["b"] == {"c": 2, "d": 3}


def test_incomplete_logprobs_are_dropped() -> None:
    """llama.cpp returns none for a token that is part of a character."""
    tokens = [{"id": 7, "logprob": -1.0}, {"id": 9, "logprob": -2.0}]
    reply = {"tokens": [7, 8, 9], "stop_type": "limit", "completion_probabilities": tokens}
    assert SERVER_APIS["llama.cpp"].parse(reply) == GenerationResult([7, 8, 9], False, None)
    assert SERVER_APIS["llama.cpp"].parse(reply | {"tokens": [7, 9]}) == GenerationResult([7, 9], False, [-1.0, -2.0])
