"""The local engine: the same tokens as transformers' own generation, and the right distribution."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from models import ARCHITECTURES, save_tiny_model, tiny_model, tiny_recipe
from spinlm.generation import LocalEngine
from spinlm.generation.base import OnProgress, Response, Sampling
from spinlm.generation.local import sample
from spinlm.model.attention import register_tree_attention
from spinlm.model.decoding import RaggedBatch
from spinlm.model.fused import fuse_layers
from spinlm.model.loading import add_adapter
from spinlm.model.logprobs import LogProbs
from spinlm.model.players import Players
from spinlm.model.prefix_trees import PrefixTree, pack_batch
from spinlm.recipe.model import Lora
from spinlm.rundir.layout import RunDir

V = 97
GREEDY = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=20, max_length=1000, samples=1, stop_ids=(2,))
FREE = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=12, max_length=1000, samples=2, stop_ids=(2,))

register_tree_attention()


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(3, V, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


# Out of order, of different lengths, one token short and far beyond the sliding windows of 8; one twice.
PROMPTS = [ids(11, 1), ids(1, 2), ids(23, 3), ids(5, 4), ids(11, 1), ids(6, 5)]


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seed: int = 0,
    batch_size: int = 4,
    on_progress: OnProgress = lambda completed, tokens: None,
    prefix_sharing: bool = True,
) -> list[list[Response]]:
    engine = LocalEngine(LogProbs(model), batch_size, prefix_sharing)
    return engine.generate(prompts, sampling, seed, on_progress)


def transformers_generate(model: Any, prompt: list[int], stop_ids: Sequence[int], limit: int) -> list[int]:
    """Return the response that transformers generates."""
    prompt_ids = torch.tensor([prompt])
    out = model.generate(
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=list(stop_ids),
        pad_token_id=0,
    )
    response: list[int] = out[0, len(prompt) :].tolist()
    return response


@pytest.mark.parametrize(
    ("architecture", "prefix_sharing"),
    [
        *((name, prefix_sharing) for name in ARCHITECTURES for prefix_sharing in (True, False)),
        *((name, True) for name in ("gptj", "codegen", "gpt_neox_japanese", "xglm", "stablelm", "nemotron")),
    ],
)
def test_greedy_responses_equal_those_of_transformers(architecture: str, prefix_sharing: bool) -> None:
    model = tiny_model(architecture, vocabulary=V, tie_word_embeddings=False)  # tied, it repeats itself for ever
    free = [transformers_generate(model, prompt, [V + 1], 20) for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in free}) == len(PROMPTS) - 1
    # Stop at tokens that end some responses early, at different places, so that the batch shrinks as it goes.
    stops = (free[0][3], free[2][9])
    expected = [transformers_generate(model, prompt, stops, 20) for prompt in PROMPTS]
    assert len({len(tokens) for tokens in expected}) > 2

    responses = [
        response
        for (response,) in generate(
            model, PROMPTS, Sampling(0.0, 1.0, 20, 1000, 1, stops), prefix_sharing=prefix_sharing
        )
    ]

    assert [response.token_ids for response in responses] == expected
    assert [response.finished for response in responses] == [tokens[-1] in stops for tokens in expected]
    assert {response.finished for response in responses} >= {True}


def test_greedy_responses_are_independent_of_batch_size_and_samples() -> None:
    model = tiny_model("llama", vocabulary=V)
    alone = [response.token_ids for (response,) in generate(model, PROMPTS, GREEDY, batch_size=1)]
    for prefix_sharing in (True, False):
        together = generate(
            model, PROMPTS, Sampling(0.0, 1.0, 20, 1000, 3, (2,)), batch_size=7, prefix_sharing=prefix_sharing
        )
        assert [[response.token_ids for response in row] for row in together] == [[tokens] * 3 for tokens in alone]


def test_response_depends_only_on_the_seed_and_the_index_of_the_prompt() -> None:
    """The batch size, the other responses and prefix sharing make no difference."""
    model = tiny_model("llama", vocabulary=V)
    sampling = Sampling(1.0, 1.0, 12, 1000, 2, tuple(range(40, 50)))
    expected = [[response.token_ids for response in row] for row in generate(model, PROMPTS, sampling, batch_size=1)]
    assert len({len(tokens) for row in expected for tokens in row}) > 3
    for batch_size, prefix_sharing in ((2, True), (5, True), (100, True), (5, False)):
        responses = generate(model, PROMPTS, sampling, batch_size=batch_size, prefix_sharing=prefix_sharing)
        assert [[response.token_ids for response in row] for row in responses] == expected


def test_next_prompt_takes_a_free_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """This needs fewer forward passes than batches that wait for their longest response."""
    model = tiny_model("llama", vocabulary=V)
    sampling = Sampling(1.0, 1.0, 40, 1000, 8, tuple(range(30, 34)))
    steps: list[int] = []
    step = RaggedBatch.step

    def counted(rows: RaggedBatch, tokens: torch.Tensor) -> torch.Tensor:
        steps.append(len(tokens))
        return step(rows, tokens)

    monkeypatch.setattr(RaggedBatch, "step", counted)
    lengths = [len(response.token_ids) for row in generate(model, PROMPTS, sampling, batch_size=8) for response in row]
    assert sum(steps) == sum(lengths) - len(lengths)  # every token but the first of each, and no padding
    waiting = sum(max(lengths[start : start + 8]) for start in range(0, len(lengths), 8))
    assert len(steps) < 0.75 * waiting


def test_prompt_with_several_samples_is_prefilled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", vocabulary=V)
    fed: list[int] = []
    model.base_model.register_forward_pre_hook(
        lambda _, args, kw: fed.append(kw["input_ids"].numel()), with_kwargs=True
    )
    generate(model, PROMPTS, Sampling(1.0, 1.0, 1, 1000, 5, ()), batch_size=100)
    assert fed == [sum(map(len, PROMPTS))]
    monkeypatch.setattr("spinlm.model.decoding.PREFILL_TOKENS", 23)
    fed.clear()
    generate(model, PROMPTS, Sampling(1.0, 1.0, 1, 1000, 5, ()), batch_size=100)
    assert fed == [23, 22, 12]  # of 23, 11, 11, 6, 5, 1


def test_seed_determines_the_responses() -> None:
    model = tiny_model("llama", vocabulary=V)
    torch.manual_seed(1)
    first = generate(model, PROMPTS, FREE, seed=5)
    torch.manual_seed(2)
    assert generate(model, PROMPTS, FREE, seed=5) == first
    other = generate(model, PROMPTS, FREE, seed=6)
    assert all(a != b for a, b in zip(first, other, strict=True))
    assert [len(row) for row in first] == [2] * len(PROMPTS)
    samples = [tuple(response.token_ids) for row in first for response in row]
    assert len(set(samples)) == len(samples)  # even those to the same prompt


@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["full", "lora"])
def test_responses_are_those_of_the_current_player(tmp_path: Path, lora: Any) -> None:
    recipe = tiny_recipe(save_tiny_model(tmp_path / "model"), lora=lora)
    players = Players(recipe, RunDir(tmp_path / "run"))
    engine = LocalEngine(players.logprobs, 4, True)
    arguments = (PROMPTS, GREEDY, 0, lambda completed, tokens: None)
    players.save(0)
    before = engine.generate(*arguments)
    torch.manual_seed(3)
    with torch.no_grad():
        for _, parameter in players.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    players.mark_modified()
    players.save(1)
    after = engine.generate(*arguments)
    assert all(a != b for a, b in zip(before, after, strict=True))
    players.load(0)
    assert engine.generate(*arguments) == before
    players.load(1)
    assert engine.generate(*arguments) == after


def test_model_trains_and_scores_after_generation() -> None:
    model = tiny_model("llama", vocabulary=V).train()
    logprobs = LogProbs(model)
    batch = pack_batch([PrefixTree(ids(5, 1), (ids(4, 2), ids(3, 3)))], True)
    before = logprobs(batch)
    for prefix_sharing in (True, False):
        LocalEngine(logprobs, 4, prefix_sharing).generate(PROMPTS, FREE, 0, lambda completed, tokens: None)
    after = logprobs(batch)
    assert torch.equal(before, after)
    after.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_dropout_is_off_during_generation() -> None:
    model = tiny_model("gpt2", vocabulary=V, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    expected = generate(model.eval(), PROMPTS, GREEDY)
    assert generate(model.train(), PROMPTS, GREEDY) == expected


def test_stop_tokens_finish_a_response_and_the_limit_does_not() -> None:
    model = tiny_model("llama", vocabulary=V)
    sampling = Sampling(1.0, 1.0, max_new_tokens=8, max_length=1000, samples=20, stop_ids=tuple(range(60, 70)))
    responses = [response for row in generate(model, PROMPTS, sampling, batch_size=16) for response in row]
    ends = Counter()
    for response in responses:
        stopped = [token in sampling.stop_ids for token in response.token_ids]
        assert not any(stopped[:-1])
        assert response.finished == stopped[-1]
        assert response.finished or len(response.token_ids) == 8
        ends[response.token_ids[-1] if response.finished else "limit"] += 1
    assert len(ends) == 11  # each of the ten stop tokens, and the limit


def test_prompt_and_response_stay_within_the_length() -> None:
    model = tiny_model("llama", vocabulary=V)
    sampling = Sampling(0.0, 1.0, max_new_tokens=10, max_length=12, samples=1, stop_ids=())
    prompts = [ids(count, count) for count in (5, 11, 1, 9)]
    responses = [response for (response,) in generate(model, prompts, sampling)]
    assert [len(response.token_ids) for response in responses] == [7, 1, 10, 3]
    assert not any(response.finished for response in responses)
    long = [response for (response,) in generate(model, prompts, Sampling(0.0, 1.0, 10, 1000, 1, ()))]
    assert [response.token_ids for response in responses] == [
        other.token_ids[: len(response.token_ids)] for response, other in zip(responses, long, strict=True)
    ]
    # The response with the highest limit stops first; the others keep their limits.
    stop = long[2].token_ids[0]
    assert stop not in long[0].token_ids[:7] + long[1].token_ids[:1] + long[3].token_ids[:3]
    stopped = [response for (response,) in generate(model, prompts, Sampling(0.0, 1.0, 10, 12, 1, (stop,)))]
    assert [len(response.token_ids) for response in stopped] == [7, 1, 1, 3]
    assert [response.finished for response in stopped] == [False, False, True, False]


def test_progress_counts_responses_and_tokens() -> None:
    model = tiny_model("llama", vocabulary=V)
    calls: list[tuple[int, int]] = []
    sampling = Sampling(1.0, 1.0, 12, 1000, 2, tuple(range(40, 50)))
    responses = generate(model, PROMPTS, sampling, on_progress=lambda *counts: calls.append(counts))
    completed, tokens = zip(*calls, strict=True)
    assert sum(completed) == 2 * len(PROMPTS)
    assert sum(tokens) == sum(len(response.token_ids) for row in responses for response in row)


@pytest.mark.parametrize("sampling", [FREE, Sampling(0.7, 0.9, 12, 1000, 2, (2,)), GREEDY], ids=["1", "0.7", "0"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_neo", "mistral"])
def test_logprob_of_the_sampler_equals_that_of_the_scorer(architecture: str, sampling: Sampling) -> None:
    """At every temperature it is the log-probability under the model."""
    model = tiny_model(architecture, vocabulary=V)
    responses = generate(model, PROMPTS, sampling)
    trees = [
        PrefixTree(p, tuple(response.token_ids for response in row)) for p, row in zip(PROMPTS, responses, strict=True)
    ]
    scored = LogProbs(model)(pack_batch(trees, False)).tolist()
    assert [response.logprob for row in responses for response in row] == pytest.approx(scored, abs=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "gpt2"])
def test_bfloat16_mismatch_is_rounding(architecture: str) -> None:
    """Sharp attention makes a rounded attention score visible."""
    model = tiny_model(architecture, vocabulary=V, spread=0.4).to(torch.bfloat16)
    gaps = {}
    for prefix_sharing in (True, False):
        responses = generate(model, PROMPTS, FREE, prefix_sharing=prefix_sharing)
        trees = [
            PrefixTree(p, tuple(response.token_ids for response in row))
            for p, row in zip(PROMPTS, responses, strict=True)
        ]
        scored = iter(LogProbs(model)(pack_batch(trees, False)).tolist())
        mismatches = [
            abs(response.logprob - next(scored)) / len(response.token_ids) for row in responses for response in row
        ]
        gaps[prefix_sharing] = sum(mismatches) / len(mismatches)
    assert gaps[True] < max(2 * gaps[False], 0.01)


@pytest.mark.parametrize("prefix_sharing", [True, False])
def test_adapter_gives_the_responses_of_peft(prefix_sharing: bool) -> None:
    """With a scale, alpha / r, other than 1."""
    model = add_adapter(tiny_model("llama", vocabulary=V, tie_word_embeddings=False), Lora(r=3, alpha=7.5), 0)
    plain = [transformers_generate(model.get_base_model(), prompt, [V + 1], 20) for prompt in PROMPTS]
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    expected = [transformers_generate(model.get_base_model(), prompt, [V + 1], 20) for prompt in PROMPTS]
    assert all(a != b for a, b in zip(plain, expected, strict=True))
    fuse_layers(model)
    responses = generate(model, PROMPTS, Sampling(0.0, 1.0, 20, 1000, 1, ()), prefix_sharing=prefix_sharing)
    assert [response.token_ids for (response,) in responses] == expected


# The distribution


def draws(count: int) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(0))


def assert_frequencies(counts: Counter[int], expected: Sequence[float]) -> None:
    """Assert that each frequency is within 4.5 standard deviations (exceeded by chance once in 100,000)."""
    draws = sum(counts.values())
    for token, p in enumerate(expected):
        assert abs(counts[token] / draws - p) <= 4.5 * math.sqrt(p * (1 - p) / draws), (token, counts[token] / draws, p)
    assert counts.keys() <= set(range(len(expected)))


LOGITS = [0.3, -1.0, 2.0, 0.0, -4.0, 1.1]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_frequencies_are_the_softmax(temperature: float) -> None:
    chosen, logprobs = sample(torch.tensor(LOGITS).expand(20_000, 6), temperature, 1.0, draws(20_000))
    weights = [math.exp(logit / temperature) for logit in LOGITS]
    assert_frequencies(Counter(chosen.tolist()), [weight / sum(weights) for weight in weights])
    # The log-probability is the model's own, at temperature 1.
    total = sum(math.exp(logit) for logit in LOGITS)
    expected = torch.tensor([logit - math.log(total) for logit in LOGITS])[chosen]
    torch.testing.assert_close(logprobs, expected)


@pytest.mark.parametrize(
    ("top_p", "nucleus"),
    [
        (0.25, [3]),
        (0.5, [3]),  # just enough
        (0.51, [3, 1]),
        (0.75, [3, 1]),
        (0.8, [3, 1, 0]),
        (0.875, [3, 1, 0]),
        (0.9, [3, 1, 0, 4]),
        (1.0, [3, 1, 0, 4, 2]),
    ],
)
def test_top_p_keeps_the_nucleus(top_p: float, nucleus: list[int]) -> None:
    """Of ⅛, ¼, 1/32, ½, 3/32: the fewest of the most likely tokens that hold at least top_p."""
    probs = [1 / 8, 1 / 4, 1 / 32, 1 / 2, 3 / 32]
    logits = torch.tensor(probs).log() + 3
    chosen, logprobs = sample(logits.expand(20_000, 5), 1.0, top_p, draws(20_000))
    counts = Counter(chosen.tolist())
    assert counts.keys() == {*nucleus}
    kept = sum(probs[token] for token in nucleus)
    assert_frequencies(counts, [probs[token] / kept if token in nucleus else 0.0 for token in range(5)])
    torch.testing.assert_close(logprobs, torch.tensor(probs).log()[chosen])  # before top-p


def test_top_p_is_of_the_distribution_at_the_temperature() -> None:
    """At temperature ½ the probabilities ½, ¼, ¼ are ⅔, ⅙, ⅙."""
    logits = torch.tensor([0.5, 0.25, 0.25]).log()
    chosen, _ = sample(logits.expand(2000, 3), 0.5, 0.6, draws(2000))
    assert chosen.unique().tolist() == [0]
    chosen, _ = sample(logits.expand(2000, 3), 1.0, 0.6, draws(2000))
    assert len(chosen.unique()) == 2


@given(
    levels=st.lists(st.integers(-60, 60), min_size=2, max_size=12, unique=True),
    temperature=st.sampled_from([0.25, 1.0, 2.0]),
    top_p=st.floats(0.05, 1.0),
)
@settings(max_examples=60, deadline=None)
def test_frequencies_in_the_nucleus(levels: list[int], temperature: float, top_p: float) -> None:
    """Compare with the plain formula."""
    weights = [math.exp(level / 10 / temperature) for level in levels]
    order = sorted(range(len(levels)), key=lambda token: -weights[token])
    shares = [sum(weights[token] for token in order[:count]) / sum(weights) for count in range(len(order) + 1)]
    assume(top_p == 1 or all(abs(share - top_p) > 1e-4 for share in shares))  # rounding decides there
    count = len(order) if top_p == 1 else next(number for number, share in enumerate(shares) if share >= top_p)
    nucleus = order[:count]
    draws = (torch.arange(4096) + 0.5) / 4096
    logits = torch.tensor([level / 10 for level in levels]).expand(len(draws), -1)
    tokens, logprobs = sample(logits, temperature, top_p, draws)
    drawn = Counter(tokens.tolist())
    assert set(drawn) <= set(nucleus)
    for token in nucleus:
        expected = weights[token] / sum(weights[other] for other in nucleus)
        assert abs(drawn[token] / len(draws) - expected) <= 2 / len(draws)
    whole = torch.log_softmax(logits[0].double(), dim=0)  # without temperature and top-p
    assert torch.allclose(logprobs.double(), whole[tokens], atol=1e-4)


@given(
    rows=st.lists(st.lists(st.integers(-50, 50), min_size=5, max_size=5), min_size=1, max_size=6),
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_p=st.sampled_from([0.5, 0.9, 1.0]),
    chance=st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_row_is_sampled_independently_of_other_rows(
    rows: list[list[int]], temperature: float, top_p: float, chance: Random
) -> None:
    logits, draws = torch.tensor(rows) / 10, torch.tensor([chance.randrange(2**24) / 2**24 for _ in rows])
    together, _ = sample(logits, temperature, top_p, draws)
    order = chance.sample(range(len(rows)), len(rows))
    shuffled, _ = sample(logits[order], temperature, top_p, draws[order])
    assert shuffled.tolist() == together[order].tolist()
    alone = [sample(logits[[row]], temperature, top_p, draws[[row]])[0].item() for row in range(len(rows))]
    assert alone == together.tolist()
    if temperature == 0:
        assert all(row[token] == max(row) for row, token in zip(rows, alone, strict=True))


def test_greedy_takes_the_most_likely() -> None:
    logits = torch.tensor([LOGITS, LOGITS[::-1]])
    chosen, logprobs = sample(logits, 0.0, 0.5, draws(2))
    assert chosen.tolist() == [2, 3]
    torch.testing.assert_close(logprobs, torch.log_softmax(logits, dim=-1).max(dim=-1).values)


def test_token_of_probability_zero_is_never_sampled() -> None:
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf]).expand(4, 5)
    extremes = torch.tensor([0.0, 0.5, 0.499999, 1 - 2**-24])
    assert sample(logits, 1.0, 1.0, extremes)[0].tolist() == [1, 3, 1, 3]


def test_each_row_is_sampled_from_its_logits() -> None:
    logits = torch.full((3, 4), -100.0)
    logits[0, 3] = logits[1, 0] = logits[2, 2] = 0.0
    for top_p in (1.0, 0.9):
        assert sample(logits, 1.0, top_p, draws(3))[0].tolist() == [3, 0, 2]


def test_responses_have_the_distribution_of_the_model() -> None:
    """Two-token responses to a short and a long prompt in one batch, against the model's own probabilities."""
    model = tiny_model("mistral", vocabulary=5)
    prompts = [[3, 4], [3, 1, 4, 1, 0, 2, 2, 3, 4, 0, 1]]
    sampling = Sampling(0.8, 1.0, max_new_tokens=2, max_length=100, samples=2500, stop_ids=())
    responses = generate(model, prompts, sampling, batch_size=5000)
    for prompt, drawn in zip(prompts, responses, strict=True):
        with torch.no_grad():
            rows = torch.tensor([[*prompt, token] for token in range(5)])
            logits = model(input_ids=rows).logits.double() / 0.8
        first = torch.softmax(logits[0, -2], dim=-1)
        second = torch.softmax(logits[:, -1], dim=-1)
        expected = (first[:, None] * second).flatten().tolist()
        assert_frequencies(Counter(5 * response.token_ids[0] + response.token_ids[1] for response in drawn), expected)
