"""What goes to vLLM, and what is made of what comes back: literal values."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spinlm.errors import RecipeError
from spinlm.generation.base import Response
from spinlm.generation.vllm import VllmError, divide_gpus, engine_arguments, explain, read_answer, request
from spinlm.generation.vllm_worker import read_output
from spinlm.recipe.load import parse_recipe
from spinlm.recipe.schema import Recipe, Vllm
from spinlm.rundir.records import Sampling

SAMPLING = Sampling(temperature=0.7, top_p=0.9, max_new_tokens=20, max_length=30, samples=1, stop_ids=(2, 5))


def recipe(**sections: Any) -> Recipe:
    values = {"model": {"path": "m"}, "data": {"path": "d"}, "train": {"max_length": 512}, "lora": {"r": 40}}
    return parse_recipe(values | sections)


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


def test_a_rank_that_vllm_does_not_take() -> None:
    with pytest.raises(RecipeError, match="up to rank 512"):
        engine_arguments(recipe(lora={"r": 513}), Vllm(), "folder", "bfloat16")


@pytest.mark.parametrize(("prompt", "limit"), [([1] * 5, 20), ([1] * 25, 5)])
def test_request(prompt: list[int], limit: int) -> None:
    assert request(prompt, SAMPLING, 7) == {
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


def test_what_comes_back() -> None:
    one = SimpleNamespace(token_ids=(8, 9, 5), cumulative_logprob=-1.5, finish_reason="stop", text="")
    given = read_output(SimpleNamespace(outputs=[one]))
    assert given == {"token_ids": [8, 9, 5], "logprob": -1.5, "finish_reason": "stop"}
    assert read_answer(given, (2, 5)) == Response([8, 9, 5], True, -1.5)
    assert read_answer(given | {"token_ids": [8, 9], "finish_reason": "length"}, (2, 5)) == Response(
        [8, 9], False, -1.5
    )


@pytest.mark.parametrize("wrong", [{"finish_reason": "abort"}, {"token_ids": []}])
def test_a_response_that_did_not_come_to_its_end(wrong: dict[str, Any]) -> None:
    with pytest.raises(VllmError, match="ended a response with"):
        read_answer({"token_ids": [8], "logprob": -1.0, "finish_reason": "stop"} | wrong, (2,))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("RuntimeError: The NVIDIA driver on your system is too old", "driver is too old for this vLLM"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "out of GPU memory: lower"),
        ("ValueError: No available memory for the cache blocks.", "too little free GPU memory"),
        ("a traceback\nKeyError: 'x'", "vLLM failed: KeyError: 'x'"),
        ("", "no message"),
    ],
)
def test_what_a_failure_means(error: str, said: str) -> None:
    assert said in explain(error, Path("log")) and "Its log: log" in explain(error, Path("log"))


def test_gpus_are_divided_among_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert divide_gpus(Vllm(tensor_parallel=2, data_parallel=2)) == ["4,5", "6,7"]
    assert divide_gpus(Vllm()) == ["4"]
    with pytest.raises(RecipeError, match=r"3 × 2 GPUs .* but there are 4"):
        divide_gpus(Vllm(tensor_parallel=2, data_parallel=3))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert divide_gpus(Vllm(data_parallel=2)) == [None, None]
