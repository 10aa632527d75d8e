"""Requests to vLLM, and responses made of its output: literal values."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spinlm.errors import RecipeError
from spinlm.generation.base import Response, Sampling
from spinlm.generation.vllm import VllmError, assign_gpus, engine_arguments, explain, make_request, parse_response
from spinlm.generation.vllm_worker import read_output
from spinlm.recipe.load import parse_recipe
from spinlm.recipe.opponent import Vllm
from spinlm.recipe.schema import Recipe

SAMPLING = Sampling(temperature=0.7, top_p=0.9, max_new_tokens=20, max_length=30, samples=1, stop_ids=(2, 5))


def recipe(**sections: Any) -> Recipe:
    values = {"model": {"path": "m"}, "data": {"path": "d"}, "train": {"max_length": 512}, "lora": {"r": 40}}
    return parse_recipe(values | sections)


@pytest.mark.parametrize(
    ("lora", "revision"),
    [({}, "v2"), ({"create_new_adapter": True}, None), (None, None)],
    ids=["further", "new", "full"],
)
def test_an_adapter_is_loaded_over_the_revision_of_its_base(lora: Any, revision: str | None) -> None:
    model = {"path": "org/adapter", "revision": "v1", "base": "org/base", "base_revision": "v2"}
    arguments = engine_arguments(recipe(model=model, lora=lora), Vllm(), "folder or id", "bfloat16")
    assert arguments.get("revision") == revision


def test_engine_arguments() -> None:
    settings = Vllm(tensor_parallel=2, engine_args={"max_num_seqs": 512, "logprobs_mode": None})
    assert engine_arguments(recipe(), settings, "folder", "bfloat16") == {
        "model": "folder",
        "trust_remote_code": False,
        "dtype": "bfloat16",
        "max_model_len": 512,
        "tensor_parallel_size": 2,
        "gpu_memory_utilization": 0.9,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "enable_lora": True,
        "max_lora_rank": 64,
        "max_num_seqs": 512,
    }
    whole = engine_arguments(recipe(lora=None), Vllm(), "folder", "float32")
    assert whole["enable_lora"] is False and "max_lora_rank" not in whole


def test_unsupported_rank() -> None:
    with pytest.raises(RecipeError, match="512"):
        engine_arguments(recipe(lora={"r": 513}), Vllm(), "folder", "bfloat16")


@pytest.mark.parametrize(("prompt", "limit"), [([1] * 5, 20), ([1] * 25, 5)])
def test_request(prompt: list[int], limit: int) -> None:
    assert make_request(prompt, SAMPLING, 7) == {
        "prompt": prompt,
        "sampling": {
            "temperature": 0.7,
            "top_p": 0.9,
            "max_tokens": limit,
            "stop_token_ids": [2, 5],
            "ignore_eos": True,
            "seed": 7,
            "logprobs": 0,
            "detokenize": False,
        },
    }


def test_response() -> None:
    completion = SimpleNamespace(token_ids=(8, 9, 5), cumulative_logprob=-1.5, finish_reason="stop", text="")
    output = read_output(SimpleNamespace(outputs=[completion]))
    assert output == {"token_ids": [8, 9, 5], "logprob": -1.5, "finish_reason": "stop"}
    assert parse_response(output, (2, 5)) == Response([8, 9, 5], True, -1.5)
    assert parse_response(output | {"token_ids": [8, 9], "finish_reason": "length"}, (2, 5)) == Response(
        [8, 9], False, -1.5
    )


@pytest.mark.parametrize("wrong", [{"finish_reason": "abort"}, {"token_ids": []}])
def test_aborted_response(wrong: dict[str, Any]) -> None:
    with pytest.raises(VllmError, match="ended a response"):
        parse_response({"token_ids": [8], "logprob": -1.0, "finish_reason": "stop"} | wrong, (2,))


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        ("RuntimeError: The NVIDIA driver on your system is too old", "driver is too old"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "out of GPU memory"),
        ("ValueError: No available memory for the cache blocks.", "too little free GPU memory"),
        ("a traceback\nKeyError: 'x'", "vLLM failed: KeyError: 'x'"),
        ("", "no message"),
    ],
)
def test_causes_of_errors(error: str, cause: str) -> None:
    assert cause in explain(error, Path("log")) and "Log: log" in explain(error, Path("log"))


def test_gpus_of_each_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert assign_gpus(Vllm(tensor_parallel=2, data_parallel=2)) == ["4,5", "6,7"]
    assert assign_gpus(Vllm()) == ["4"]
    with pytest.raises(RecipeError, match=r"3 × 2 GPUs .* 4"):
        assign_gpus(Vllm(tensor_parallel=2, data_parallel=3))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert assign_gpus(Vllm(data_parallel=2)) == [None, None]
