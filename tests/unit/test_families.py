"""Families of models that differ from a plain decoder: in what they keep between tokens, and in what is adapted."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from models import STATEFUL, save_tiny_model, tiny_model, tiny_recipe
from spinlm.errors import ModelError
from spinlm.generation import LocalEngine
from spinlm.generation.base import Response, Sampling
from spinlm.model.attention import register_tree_attention
from spinlm.model.logprobs import LogProbs, max_logprob_error
from spinlm.model.prefix_trees import PrefixTree
from spinlm.model.run import Run
from spinlm.rundir.layout import RunDir
from spinlm.stages.reference_logprobs import _check_mismatch, _Tally

V = 97

register_tree_attention()


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(3, V, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [ids(length, seed) for seed, length in enumerate((11, 1, 23, 5, 11, 6, 3, 17))]


@torch.no_grad()
def full_logprob(model: Any, prompt: Sequence[int], response: Sequence[int]) -> float:
    """Compute log p of a response from the model's own logits of one row, without a cache."""
    logits = model(input_ids=torch.tensor([[*prompt, *response]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return float(torch.log_softmax(logits.float(), dim=-1).gather(1, torch.tensor(response)[:, None]).sum())


def generate(model: Any, sampling: Sampling, batch_size: int = 8) -> list[list[Response]]:
    return LocalEngine(LogProbs(model), batch_size, prefix_sharing=False).generate(
        PROMPTS, sampling, 0, lambda completed, tokens: None
    )


# Models that keep a state


TOLERANCE = {"zamba2": 1e-3, "nemotron_h": 1e-3}
"""transformers limits their time step from below when it reads a prompt, and does not when it decodes."""


@pytest.mark.parametrize("family", STATEFUL)
def test_responses_of_a_stateful_model_have_the_log_probabilities_of_the_scorer(family: str) -> None:
    """Eight responses at once, to prompts of different lengths, that end at different times."""
    model = tiny_model(family, vocabulary=V)
    logprobs = LogProbs(model)
    assert max_logprob_error(logprobs, [PrefixTree(PROMPTS[2], (ids(9, 8), ids(4, 9)))], False) < 1e-5
    stops = tuple(range(2, V, 7))
    generated = generate(model, Sampling(1.0, 1.0, 12, 1000, 2, stops))
    assert len({len(response.token_ids) for row in generated for response in row}) > 4
    for prompt, responses in zip(PROMPTS, generated, strict=True):
        for response in responses:
            expected = full_logprob(model, prompt, response.token_ids)
            assert abs(response.logprob - expected) / len(response.token_ids) < TOLERANCE.get(family, 1e-4)
    with pytest.raises(ModelError, match="keeps a state"):
        logprobs.use_tree_attention(True)


@pytest.mark.parametrize("family", ["mamba", "lfm2", "qwen3_5_text"])
def test_a_response_of_a_stateful_model_does_not_depend_on_its_batch(family: str) -> None:
    model = tiny_model(family, vocabulary=V)
    sampling = Sampling(1.0, 1.0, 12, 1000, 2, tuple(range(2, V, 7)))
    together, alone = generate(model, sampling), generate(model, sampling, batch_size=1)
    assert [[r.token_ids for r in row] for row in together] == [[r.token_ids for r in row] for row in alone]


def mismatch_tally(mismatch: float) -> _Tally:
    tally = _Tally()
    counts = {"pairs": 4, "responses": 4, "identical": 0, "truncated": 0, "tokens": 40}
    tally.counts["train"] = counts | {"mismatch": 4 * mismatch, "mismatches": 4, "mismatch_max": 2 * mismatch}
    return tally


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 0.01), ("bfloat16", 0.1)])
def test_a_gap_between_sampler_and_scorer_is_an_error_with_the_local_engine(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: str, bound: float
) -> None:
    recipe = tiny_recipe(save_tiny_model(tmp_path / "model"), lora={"r": 4}, model={"dtype": dtype})
    run = Run(recipe, RunDir(tmp_path / "run"))
    _check_mismatch(run, 0, mismatch_tally(0.99 * bound))
    with pytest.raises(ModelError, match=rf"model: .* by {1.01 * bound:.2g} nats .*LlamaForCausalLM.*opponent\.engine"):
        _check_mismatch(run, 0, mismatch_tally(1.01 * bound))
    server = {"engine": "server", "server": {"urls": ["http://localhost:1"], "api": "vllm"}}
    other = Run(tiny_recipe(tmp_path / "model", lora={"r": 4}, opponent=server), RunDir(tmp_path / "run"))
    _check_mismatch(other, 0, mismatch_tally(0.11))
    assert "the server engine differ from ours by 0.11 nats" in caplog.text
