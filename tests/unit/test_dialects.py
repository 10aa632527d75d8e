"""Answers out of what servers send back, by hand, and prompts as text."""

from pathlib import Path
from typing import Any

import pytest

from models import save_tiny_model, tiny_recipe
from spinlm.data.renderer import Renderer
from spinlm.generation.server import ServerError, read_reply, with_options
from spinlm.generation.server_apis import DIALECTS, Reply, Wish
from spinlm.model.players import Players
from spinlm.rundir.layout import RunDir


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    folder = tmp_path_factory.mktemp("model")
    return Players(tiny_recipe(save_tiny_model(folder)), RunDir(folder)).renderer


def wish(renderer: Renderer, limit: int = 4) -> Wish:
    prompt = renderer.prompt_ids([{"role": "user", "content": "What is 1?"}])
    return Wish(prompt, "", limit, 1, 1.0, 1.0, renderer.stop_ids)


def test_an_answer_that_ended(renderer: Renderer) -> None:
    end = renderer.end_id
    answer = read_reply(Reply(True, [7, 8, end], logprobs=[-1.0, -2.0, -0.5]), wish(renderer), renderer)
    assert (answer.token_ids, answer.finished, answer.logprob, answer.retokenised) == ([7, 8, end], True, -3.5, False)


def test_an_end_that_the_server_leaves_out_is_put_back_without_a_log_probability(renderer: Renderer) -> None:
    answer = read_reply(Reply(True, [7, 8], logprobs=[-1.0, -2.0]), wish(renderer), renderer)
    assert (answer.token_ids, answer.finished, answer.logprob) == ([7, 8, renderer.end_id], True, None)


def test_an_answer_that_was_cut_is_given_no_end(renderer: Renderer) -> None:
    answer = read_reply(Reply(False, [7, 8, 9, 10], logprobs=[-1.0] * 4), wish(renderer), renderer)
    assert (answer.token_ids, answer.finished, answer.logprob) == ([7, 8, 9, 10], False, -4.0)


def test_nothing_counts_after_an_end_or_the_limit(renderer: Renderer) -> None:
    end = renderer.end_id
    answer = read_reply(Reply(False, [7, end, 8, 9], logprobs=[-1.0] * 4), wish(renderer), renderer)
    assert (answer.token_ids, answer.finished, answer.logprob) == ([7, end], True, -2.0)
    answer = read_reply(Reply(True, [7, 8, 9, 10, 11], logprobs=None), wish(renderer), renderer)
    assert (answer.token_ids, answer.finished, answer.logprob) == ([7, 8, 9, 10], False, None)


def test_text_becomes_the_tokens_that_training_has(renderer: Renderer) -> None:
    messages = [{"role": "user", "content": "What is 1?"}]
    encoded = renderer.encode(messages, "Paris is red", 64)
    answer = read_reply(Reply(True, text="Paris is red"), wish(renderer, limit=64), renderer)
    assert answer.token_ids == encoded.response_ids
    assert (answer.finished, answer.logprob, answer.retokenised) == (True, None, True)
    assert read_reply(Reply(True, text=""), wish(renderer), renderer).token_ids == [renderer.end_id]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_prompt_as_text_has_the_same_tokens(architecture: str, tmp_path: Path) -> None:
    players = Players(tiny_recipe(save_tiny_model(tmp_path, architecture)), RunDir(tmp_path))
    renderer = players.renderer
    ids = renderer.prompt_ids([{"role": "user", "content": "What is 1?"}])
    text, same = renderer.as_text(ids)
    assert same and players.tokenizer(text)["input_ids"] == ids
    odd = [*ids, *players.tokenizer("a b", add_special_tokens=False)["input_ids"], players.tokenizer.vocab_size - 1]
    assert renderer.as_text(odd)[1] == (players.tokenizer(renderer.as_text(odd)[0])["input_ids"] == odd)


@pytest.mark.parametrize("kind", sorted(DIALECTS))
def test_a_request_names_the_whole_of_the_sampling(kind: str, renderer: Renderer) -> None:
    """Temperature, top-p and what would cut the distribution: a server's own defaults decide nothing."""
    body = DIALECTS[kind].body("it", wish(renderer))
    body |= body.pop("sampling_params", {})
    assert (body["temperature"], body["top_p"]) == (1.0, 1.0)
    if kind != "openai":  # whose interface has no more
        if kind == "llama.cpp":
            assert body["samplers"] == ["temperature", "top_p"]
            return
        assert body["top_k"] in (0, -1) and body["min_p"] == 0
        assert body.get("repetition_penalty", body.get("repeat_penalty")) == 1


BROKEN_OFF: dict[str, dict[str, Any]] = {
    "openai": {"choices": [{"text": "a", "finish_reason": "abort"}]},
    "vllm": {"choices": [{"token_ids": [7], "finish_reason": "abort"}]},
    "llama.cpp": {"tokens": [7], "stop_type": "none"},
    "sglang": {"output_ids": [7], "meta_info": {"finish_reason": {"type": "abort"}}},
}


@pytest.mark.parametrize("kind", sorted(DIALECTS))
def test_a_response_that_was_broken_off_is_none(kind: str) -> None:
    with pytest.raises(ValueError, match="ended with"):
        DIALECTS[kind].read(BROKEN_OFF[kind])


@pytest.mark.parametrize("ids", [[], [7, 8]])
def test_a_response_that_the_server_s_context_cut(ids: list[int], renderer: Renderer) -> None:
    with pytest.raises(ServerError, match=f"cut a response after {len(ids)} of 4 tokens"):
        read_reply(Reply(False, ids), wish(renderer), renderer)


def test_an_end_of_the_server_s_own_choice_gives_way_to_ours(renderer: Renderer) -> None:
    (foreign,) = [token for token in renderer.special_ids if token not in renderer.stop_ids][:1]
    answer = read_reply(Reply(True, [7, 8, foreign]), wish(renderer), renderer)
    assert answer.token_ids == [7, 8, renderer.end_id]


def test_options_change_single_fields() -> None:
    body = {"a": 1, "b": {"c": 2, "d": 3}}
    assert with_options(body, {"b": {"d": None, "e": 4}, "f": 5}) == {"a": 1, "b": {"c": 2, "e": 4}, "f": 5}
    assert with_options(body, {"b": None}) == {"a": 1} and body["b"] == {"c": 2, "d": 3}


def test_log_probabilities_that_are_not_of_the_tokens_are_left_out() -> None:
    """As llama.cpp's are where a token is but a part of a character."""
    tokens = [{"id": 7, "logprob": -1.0}, {"id": 9, "logprob": -2.0}]
    answer = {"tokens": [7, 8, 9], "stop_type": "limit", "completion_probabilities": tokens}
    assert DIALECTS["llama.cpp"].read(answer) == Reply(False, [7, 8, 9], logprobs=None)
    assert DIALECTS["llama.cpp"].read(answer | {"tokens": [7, 9]}) == Reply(False, [7, 9], logprobs=[-1.0, -2.0])
