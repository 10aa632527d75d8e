"""Which responses make pairs: equal ones, correct ones, and rows that keep only the NLL term of the real response."""

import json
import math
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models import naive_logprob, save_tiny_model, tiny_recipe
from spinlm.errors import DataError
from spinlm.model.prefix_trees import PrefixTree
from spinlm.model.run import Run
from spinlm.recipe.objective import Space
from spinlm.recipe.schema import Recipe
from spinlm.rundir.layout import RunDir
from spinlm.rundir.records import Example, Generation, Pair, read_lines, read_pairs, to_line, write_pairs
from spinlm.rundir.stage_graph import START
from spinlm.stages.generate import generate
from spinlm.stages.prepare import prepare
from spinlm.stages.reference_logprobs import _Tally, reference_logprobs
from spinlm.stages.sft import sft
from spinlm.stages.train import train
from spinlm.training.batches import PairDataset, PromptGroup, SftDataset, pair_loss, plan_steps
from spinlm.training.pairs import choose_heldout_pairs, choose_train_pairs

REAL, OTHER, THIRD = [3, 4], [5, 4], [6, 4]
NAN = math.nan


def examples(*ids: str) -> list[Example]:
    return [Example(id, [], "right", [1, 2], REAL, "data") for id in ids]


def generation(id: str, tokens: list[int], iteration: int = 0, sample: int = 0) -> Generation:
    return Generation(id, iteration, sample, tokens, "", True, None)


def recipe(tmp_path: Path, name: str = "spin", exclude: bool = False, **objective: Any) -> Recipe:
    return tiny_recipe(
        tmp_path,
        objective={"name": name, **objective},
        opponent={"exclude_correct": exclude},
        evaluate={"scorer": "exact_match"},
    )


def rows(pairs: list[Pair]) -> list[tuple[str, int, int, bool]]:
    return [(pair.id, pair.source_iteration, pair.sample, pair.contrast) for pair in pairs]


EQUAL_PAIRS = [
    # r(y) − r(y') is 0 whatever θ is, so the loss is constant.
    ("spin", {}, -5.0, 0.0),
    ("spin", {"link": "hinge", "beta": 2.0}, -5.0, 0.0),
    ("spin", {"link": "exponential", "length_normalize": True}, -3.0, 0.0),
    ("spin", {"label_smoothing": 0.1}, -5.0, 0.0),
    # log(1 + e^x) with x = β λ max(0, −r) = 0.5 · 4 · 1 = 2 at r = −1: the slope in r is −β λ σ(2) = −2 · 0.8807971.
    ("dpo-positive", {"beta": 0.5, "dpop_lambda": 4.0}, -5.0, -1.7615942),
    ("dpo-positive", {"beta": 0.5, "dpop_lambda": 4.0}, -3.0, 0.0),  # r = 1: no penalty
    ("dpo-positive", {"dpop_lambda": 0.0}, -5.0, 0.0),
    # The slope is −σ(log μ − r) + μ σ(r − log μ) = μ (e^r − 1) / (μ + e^r); with μ = 1 it is 2σ(r) − 1.
    ("space", {}, -5.0, -0.4621172),  # r = −1
    ("space", {"mu": 2.0}, -3.0, 0.7283512),  # r = 1
    ("space", {}, -4.0, 0.0),  # r = 0, the minimum
    # The first term is ℓ(0). The second is w ℓ(β (log p(y) − log p(y₀))) = 0.3 ℓ(0.5 · 2): the slope is −0.15 σ(−1).
    ("t-spin", {"beta": 0.5, "history_weight": 0.3}, -5.0, -0.0403412),
    ("t-spin", {"history_weight": 0.0}, -5.0, 0.0),
]


@pytest.mark.parametrize(("name", "settings", "logprob", "slope"), EQUAL_PAIRS)
def test_gradient_of_an_equal_pair_by_hand(tmp_path, name, settings, logprob, slope):
    """log p_θt(y) = −4 and log p_θ(y₀) = −7."""
    pair = Pair("a", 0, 0, [1], REAL, REAL, -4.0, -4.0, initial_ids=THIRD if name == "t-spin" else None)
    write_pairs(tmp_path / "pairs.arrow", [pair])
    group = PairDataset([tmp_path / "pairs.arrow"], batch_size=8)[0]
    assert group.pairs == ((0, 0),), "an equal response is computed once"
    logprobs = torch.tensor([logprob, -7.0][: len(group.tree.responses)], requires_grad=True)
    output = pair_loss(recipe(tmp_path, name, **settings), 0)(logprobs, [group])
    (gradient,) = torch.autograd.grad(output.loss, logprobs)
    assert gradient[0].item() == pytest.approx(slope, abs=1e-6)
    if name == "t-spin":
        assert gradient[1].item() == pytest.approx(-slope, abs=1e-6)


OBJECTIVES = sorted({(name, tuple(settings.items())) for name, settings, *_ in EQUAL_PAIRS})


@pytest.mark.parametrize(("name", "settings"), OBJECTIVES)
def test_an_objective_keeps_equal_pairs_if_they_have_a_gradient_somewhere(tmp_path, name, settings):
    chosen = recipe(tmp_path, name, **dict(settings))
    slopes = [slope for other, values, _, slope in EQUAL_PAIRS if (other, tuple(values.items())) == (name, settings)]
    assert chosen.objective.equal_pairs_carry_gradient == any(slopes)
    initial = [generation("a", THIRD)] if name == "t-spin" else []
    pairs = choose_train_pairs(chosen, examples("a"), [generation("a", REAL, 1)], (), initial)
    assert rows(pairs) == ([("a", 1, 0, True)] if any(slopes) else [])


def test_t_spin_pairs_whose_responses_are_equal(tmp_path):
    """y₀ = y is replaced by y'. Where y' = y as well, nothing is left to learn from."""
    first = [generation("a", OTHER), generation("b", REAL), generation("c", REAL), generation("d", THIRD)]
    newest = [generation(id, ids, 1) for id, ids in zip("abcd", (REAL, OTHER, REAL, OTHER), strict=True)]
    pairs = choose_train_pairs(recipe(tmp_path, "t-spin"), examples(*"abcd"), newest, (), first)
    assert {pair.id: pair.initial_ids for pair in pairs} == {"a": OTHER, "b": OTHER, "d": THIRD}
    with_nll = choose_train_pairs(recipe(tmp_path, "t-spin", nll_weight=0.1), examples(*"abcd"), newest, (), first)
    assert {pair.id: (pair.contrast, pair.initial_ids) for pair in with_nll if pair not in pairs}["c"] == (False, None)
    # Iteration 0: y₀ is y' itself.
    pairs = choose_train_pairs(recipe(tmp_path, "t-spin"), examples(*"abcd"), first, (), first)
    assert [(pair.id, pair.initial_ids) for pair in pairs] == [("a", OTHER), ("d", THIRD)]


def test_t_spin_does_not_lower_a_correct_response_of_the_start(tmp_path):
    pairs = choose_train_pairs(
        recipe(tmp_path, "t-spin", exclude=True),
        *(examples("a"), [generation("a", OTHER, 1)], {(0, "a", 0)}, [generation("a", THIRD)]),
    )
    assert [pair.initial_ids for pair in pairs] == [OTHER]


@pytest.mark.parametrize(
    ("name", "exclude", "nll_weight", "expected"),
    [
        ("spin", False, 0.0, "a0 a1 - b0 - b0'"),
        ("spin", True, 0.0, "a0 - - b0 - -"),
        ("spin", False, 0.1, "a0 a1 n b0 n b0'"),
        ("spin", True, 0.1, "a0 n n b0 n n"),
        ("space", False, 0.0, "a0 a1 a1' b0 b1 b0'"),
        ("space", True, 0.0, "a0 - a1' b0 b1 -"),
        ("space", True, 0.1, "a0 n a1' b0 b1 n"),
    ],
)
def test_rows_of_several_samples_and_iterations(tmp_path, name, exclude, nll_weight, expected):
    """The last response to a and the second one to b are equal; the second one to a and the last one to b are correct.

    `a1` is sample 1 of this iteration, `a1'` of the iteration before, `-` no row, and `n` a row without contrast.
    """
    newest = [
        generation(id, ids, 1, sample)
        for id, sample, ids in (("a", 0, OTHER), ("a", 1, THIRD), ("b", 0, OTHER), ("b", 1, REAL))
    ]
    replayed = [generation("a", REAL, 0, 1), generation("b", OTHER, 0, 0)]
    correct = {(1, "a", 1), (0, "b", 0)}
    chosen = recipe(tmp_path, name, exclude, nll_weight=nll_weight)
    found = rows(choose_train_pairs(chosen, examples("a", "b"), newest + replayed, correct))
    names = [f"{id}{sample}{'' if t else chr(39)}" for id, t, sample, _ in found]
    everything = ["a0", "a1", "a1'", "b0", "b1", "b0'"]
    kinds = {name: name if contrast else "n" for name, (*_, contrast) in zip(names, found, strict=True)}
    assert " ".join(kinds.get(name, "-") for name in everything) == expected
    assert names == [name for name in everything if name in kinds], "the order of the responses"


def test_held_out_pairs_always_differ():
    heldout = [generation("a", REAL), generation("a", OTHER, 0, 1), generation("b", OTHER)]
    assert rows(choose_heldout_pairs(examples("a", "b"), heldout)) == [("a", 0, 1, True), ("b", 0, 0, True)]


def test_counts_of_a_shard(tmp_path):
    """a differs, b equals the real response, c is correct in other tokens. Rates leave out the replayed response."""
    newest = [generation(id, ids, 1) for id, ids in zip("abc", (OTHER, REAL, THIRD), strict=True)]
    correct = {(1, "b", 0), (1, "c", 0), (0, "a", 0)}
    chosen = recipe(tmp_path, exclude=True, nll_weight=0.1)
    data = examples("a", "b", "c")
    pairs = choose_train_pairs(chosen, data, [*newest, generation("a", OTHER)], correct)
    tally = _Tally()
    tally.add("train", data, newest, correct, pairs)
    tally.add("heldout", data, newest, None, choose_heldout_pairs(data, newest))
    assert tally.rates() == {
        "train": {
            **{"pairs": 1, "nll_only": 3, "responses": 3, "identical_rate": 1 / 3, "correct_rate": 2 / 3},
            **{"truncated_rate": 0.0, "mean_tokens": 2.0},
        },
        "heldout": {
            **{"pairs": 2, "responses": 3, "identical_rate": 1 / 3, "truncated_rate": 0.0, "mean_tokens": 2.0},
        },
    }
    assert tally.summary() == (
        "1 pairs; 3 rows with the NLL term alone; 33.3% of the responses equal the real one, 66.7% are correct and "
        "make no pair, 0.0% are truncated"
    )


def mixed_groups(tmp_path: Path) -> list[PromptGroup]:
    """a: twice the same response, one row without contrast. b: no contrast. c: an equal pair and another."""
    pairs = [
        Pair("a", 0, 0, [1], REAL, OTHER, NAN, NAN, contrast=False),
        Pair("a", 0, 1, [1], REAL, OTHER, -3.0, -2.0),
        Pair("a", 0, 2, [1], REAL, OTHER, -3.0, -2.0),
        Pair("b", 0, 0, [1], [7, 8, 9], [7, 8, 9], NAN, NAN, contrast=False),
        Pair("c", 0, 0, [1], REAL, REAL, -1.0, -1.0),
        Pair("c", 0, 1, [1], REAL, THIRD, -1.0, -4.0),
    ]
    write_pairs(tmp_path / "pairs.arrow", pairs)
    dataset = PairDataset([tmp_path / "pairs.arrow"], batch_size=8)
    assert dataset.batch_cost.tolist() == dataset.loss_weight.tolist() == [3, 1, 2] and dataset.num_pairs == 4
    halves = PairDataset([tmp_path / "pairs.arrow"], batch_size=2)
    assert [(len(halves[n].pairs), halves[n].nll_only) for n in range(4)] == [(1, 1), (1, 0), (0, 1), (2, 0)]
    return [dataset[n] for n in range(3)]


def test_groups_of_rows_compute_each_response_once(tmp_path):
    groups = mixed_groups(tmp_path)
    assert [group.tree.responses for group in groups] == [(REAL, OTHER), ([7, 8, 9],), (REAL, THIRD)]
    assert [group.pairs for group in groups] == [((0, 1), (0, 1)), (), ((0, 0), (0, 1))]
    assert [group.nll_only for group in groups] == [1, 1, 0]
    assert groups[0].reference_logprobs == (-3.0, -2.0) and groups[2].reference_logprobs == (-1.0, -4.0)


def test_loss_and_metrics_of_rows_without_contrast_by_hand(tmp_path):
    groups = mixed_groups(tmp_path)
    logprobs = torch.tensor([-2.0, -3.0, -6.0, -3.0, -5.0], requires_grad=True)
    output = pair_loss(recipe(tmp_path, "space", nll_weight=0.3), 0)(logprobs, groups)
    (gradient,) = torch.autograd.grad(output.loss, logprobs)

    def softplus(x: float) -> float:
        return math.log1p(math.exp(x))

    # a: r(y) = 1, r(y') = −1, twice. c: r(y) = −2; r(y') = −2 and −1. −log p(y)/|y| is 1 three times, 2, and 1.5 twice.
    losses = 2 * (softplus(-1) + softplus(-1)) + (softplus(2) + softplus(-2)) + (softplus(2) + softplus(-1))
    assert output.loss.item() == pytest.approx(losses + 0.3 * (3 * 1 + 2 + 2 * 1.5))
    # The equal pair of c is in neither margin nor accuracy: margins 2, 2 and −1.
    assert output.metrics == {"margin": 3.0, "accuracy": 2.0, "real_nll": 8.0}
    assert output.metric_rows == {"margin": 3, "accuracy": 3}
    assert gradient[2].item() == pytest.approx(-0.3 / 3), "b has the NLL term alone"


def test_rows_without_contrast_alone(tmp_path):
    group = mixed_groups(tmp_path)[1]
    logprobs = torch.tensor([-6.0], requires_grad=True)
    output = pair_loss(recipe(tmp_path, "dpo-positive", nll_weight=0.5), 0)(logprobs, [group])
    (gradient,) = torch.autograd.grad(output.loss, logprobs)
    assert output.loss.item() == 1.0 and gradient.tolist() == [pytest.approx(-0.5 / 3)]
    assert output.metric_rows == {"margin": 0, "accuracy": 0} and output.metrics["real_nll"] == 2.0


@pytest.mark.parametrize("replay", [0, 1])
def test_with_an_nll_term_self_play_takes_as_many_steps_as_its_control(tmp_path, replay):
    """Every example has one row per response, as the batch cost of the control says."""
    chosen = tiny_recipe(
        tmp_path,
        objective={"nll_weight": 0.1},
        opponent={"samples_per_prompt": 2, "exclude_correct": True},
        selfplay={"iterations": 2, "replay": replay},
        evaluate={"scorer": "exact_match"},
    )
    data = examples(*(f"{n}" for n in range(11)))
    (tmp_path / "examples.jsonl").write_text("".join(map(to_line, data)))
    chance = np.random.default_rng(0)
    responses = [
        generation(example.id, [REAL, OTHER, THIRD][chance.integers(3)], t, sample)
        for t in range(1, 0 - replay, -1)
        for example in data
        for sample in range(2)
    ]
    correct = {(g.iteration, g.id, g.sample) for g in responses if g.token_ids == THIRD}
    pairs = choose_train_pairs(chosen, data, responses, correct)
    assert {pair.contrast for pair in pairs} == {True, False}
    write_pairs(tmp_path / "pairs.arrow", pairs)
    selfplay = PairDataset([tmp_path / "pairs.arrow"], batch_size=8)
    control = SftDataset(tmp_path / "examples.jsonl", batch_cost=chosen.synthetic_per_prompt(1))
    assert selfplay.batch_cost.tolist() == control.batch_cost.tolist() == [2 * (1 + replay)] * 11
    steps = [plan_steps(dataset.batch_cost, 8, 3, seed=1) for dataset in (selfplay, control)]
    # Steps of 4 or 2 prompts: ceil(11/4) = 3 or ceil(11/2) = 6 per epoch.
    assert len(steps[0]) == len(steps[1]) == 3 * (6 if replay else 3)


# SPACE through the whole pipeline

SHARES = [0.7, 0.2, 0.1]  # of the start, on three responses; the data have a third of each
SAMPLES = 300


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that answers one prompt with 1, 2 or 3, with the probabilities `SHARES`; and the data."""
    folder = tmp_path_factory.mktemp("enumerable")
    rows = [{"prompt": "Which?", "response": text} for text in "123"] + [{"prompt": "Held out", "response": "1"}]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_tiny_model(folder / "model")
    with Run(space_recipe(folder), RunDir(folder / "prepared")) as run:
        prepare(run)
        data = list(read_lines(run.folder.examples("train"), Example))
        data.sort(key=lambda example: example.response)
        model = run.players.model
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(150):
            logprobs = [naive_logprob(model, example.prompt_ids, example.response_ids) for example in data]
            optimizer.zero_grad()
            (-sum(share * logprob for share, logprob in zip(SHARES, logprobs, strict=True))).backward()
            optimizer.step()
        model.save_pretrained(folder / "model")
    return folder


def space_recipe(folder: Path) -> Recipe:
    seed = next(
        seed for seed in count() if np.random.default_rng(seed).permutation(4)[0] == 3
    )  # holds out the last row
    return tiny_recipe(
        folder / "model",
        data={"path": str(folder / "data.jsonl"), "heldout": 1, "seed": seed},
        objective={"name": "space"},
        opponent={"samples_per_prompt": SAMPLES, "max_new_tokens": 4, "batch_size": 100},
        selfplay={"iterations": 1, "guard": None},
        train={
            **{"epochs": 60, "batch_size": 3 * SAMPLES, "learning_rate": 5e-3, "optimizer": "adam"},
            **{"max_length": 64, "warmup_ratio": 0.0, "max_grad_norm": 100.0},
        },
    )


def probabilities(run: Run, t: int) -> list[float]:
    run.players.load(t)
    data = sorted(read_lines(run.folder.examples("train"), Example), key=lambda example: example.response)
    tree = PrefixTree(data[0].prompt_ids, tuple(example.response_ids for example in data))
    return [math.exp(logprob) for logprob in run.players.response_logprobs([tree])]


@pytest.mark.parametrize(
    ("keeps_equal_pairs", "expected"),
    [
        (True, [1 / 3, 1 / 3, 1 / 3]),
        # Without equal pairs a real y counts p_data(y) (1 − p_t(y)) and a synthetic y counts p_t(y) (1 − p_data(y)). So
        # e^r = p_data (1 − p_t) / (p_t (1 − p_data)), and p = p_t e^r = (1 − p_t) / 2 where p_data is a third: 0.15,
        # 0.4, 0.45, which sum to 1.
        (False, [0.15, 0.4, 0.45]),
    ],
)
def test_space_ends_on_the_data_because_equal_pairs_stay(start, tmp_path, monkeypatch, keeps_equal_pairs, expected):
    monkeypatch.setattr(Space, "equal_pairs_carry_gradient", keeps_equal_pairs)
    with Run(space_recipe(start), RunDir(tmp_path)) as run:
        prepare(run)
        sft(run)
        assert probabilities(run, START) == pytest.approx(SHARES, abs=0.01)
        generate(run, 0)
        reference_logprobs(run, 0)
        # Each response is drawn for three examples and equals the real one of one of them.
        equal = run.folder.metadata("reference_logprobs", 0)["train"]
        assert equal["identical_rate"] == pytest.approx(1 / 3, abs=0.03)
        assert equal["pairs"] == pytest.approx(3 * SAMPLES if keeps_equal_pairs else 2 * SAMPLES, abs=30)
        train(run, 0)
        assert probabilities(run, 0) == pytest.approx(expected, abs=0.05)
    table = read_pairs([run.folder.pairs(0, "heldout", 0)]).to_pylist()
    assert all(row["real_ids"] != row["synthetic_ids"] for row in table)


@pytest.mark.parametrize("exclude", [False, True])
def test_training_responses_are_scored_only_to_exclude_correct_ones(start, tmp_path, exclude):
    """A real response that the scorer cannot read does not end a run that does not need its score."""
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n}?", "response": "no"}) + "\n" for n in "12")
    )
    chosen = tiny_recipe(
        start / "model",
        data={"path": str(tmp_path / "data.jsonl"), "heldout": 1},
        opponent={"max_new_tokens": 2, "exclude_correct": exclude},
        evaluate={"scorer": "gsm8k"},
    )
    with Run(chosen, RunDir(tmp_path / "run")) as run:
        for stage in (prepare, sft):
            stage(run)
        generate(run, 0)
        if exclude:
            with pytest.raises(DataError, match="gsm8k"):
                reference_logprobs(run, 0)
        else:
            reference_logprobs(run, 0)
            assert "correct_rate" not in run.folder.metadata("reference_logprobs", 0)["train"]
