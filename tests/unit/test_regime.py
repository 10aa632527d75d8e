"""The regime of an iteration: gradient statistics, forecast and sentences."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from models import naive_logprob, save_tiny_model
from spinlm.evals.forecast import Pull, Schedule, forecast_margin, pair_pull
from spinlm.evals.gradients import (
    GradientSample,
    Moments,
    coordinates,
    cosine,
    cosine_corrected,
    jackknife,
    mean_product,
    noise_ratio,
    synthetic_noise_share,
    total_variance,
)
from spinlm.evals.regime import describe_regime, has_fair_samples, is_fine_tuning, link_scale
from spinlm.model.run import Run
from spinlm.recipe.load import parse_recipe
from spinlm.recipe.schema import Recipe
from spinlm.rundir.layout import RunDir
from spinlm.stages.evaluate import evaluate
from spinlm.stages.generate import generate
from spinlm.stages.prepare import prepare
from spinlm.stages.reference_logprobs import reference_logprobs
from spinlm.stages.regime import _draw_groups, measure_regime, regime
from spinlm.stages.sft import sft
from spinlm.stages.train import train
from spinlm.training.batches import PairDataset
from spinlm.utils.atomic import read_json


def sample(objective, sft, contrast=None, scale=1.0) -> GradientSample:
    matrices = [torch.tensor(rows) for rows in (sft, objective, contrast or objective)]
    return GradientSample(*matrices, scale)


def test_statistics_of_two_prompts():
    """By hand: g = (1, 0), (1, 2); o = (2, 1), (2, −1)."""
    moments = Moments.from_sample(sample(objective=[[2.0, 1.0], [2.0, -1.0]], sft=[[1.0, 0.0], [1.0, 2.0]]))
    # Means: g (1, 1), o (2, 0). Cosine 2 / (2 √2).
    assert cosine(moments) == pytest.approx(1 / math.sqrt(2))
    # ⟨g1, g2⟩ = 1, ⟨o1, o2⟩ = 3, ⟨o1, g2⟩ + ⟨o2, g1⟩ = 4 + 2, of which the mean is 3.
    assert mean_product(moments.sft) == pytest.approx(1)
    assert mean_product(moments.cross) == pytest.approx(3)
    assert cosine_corrected(moments) == pytest.approx(3 / math.sqrt(3))  # above 1: an estimate of two prompts
    # Var g = (0, 2), Var o = (0, 2), each with n − 1 = 1.
    assert total_variance(moments.sft) == pytest.approx(2)
    assert noise_ratio(moments, real_weight=0.5) == pytest.approx(2 / (0.25 * 2))
    # b = 4: |E o|² + tr Var o / b = 3 + 2/4; the part of y' is (2 − 0.25 · 2) / 4.
    assert synthetic_noise_share(moments, 0.5, prompts_per_step=4) == pytest.approx(0.375 / 3.5)
    assert jackknife(cosine, moments) is None  # of two prompts, one is no sample


def test_jackknife_of_a_mean_is_its_standard_error():
    """The statistic |Σ g| / n of positive numbers is their mean, whose standard error is s / √n."""
    values = [1.0, 2.0, 4.0, 9.0]
    moments = Moments.from_sample(sample(objective=[[v] for v in values], sft=[[v] for v in values]))
    error = jackknife(lambda part: math.sqrt(float(part.sft.sum())) / len(part.sft), moments)
    assert error == pytest.approx(torch.tensor(values).std().item() / 2)


@pytest.mark.parametrize(("total", "limit"), [(5, 8), (8, 8), (1000, 7), (10**12, 1000)])
def test_coordinates_are_distinct_and_cover_everything(total, limit):
    chosen = coordinates(total, limit, seed=1)
    assert len(chosen) == min(total, limit)
    assert (chosen[1:] > chosen[:-1]).all() and chosen[0] >= 0 and chosen[-1] < total
    for place, coordinate in enumerate(chosen[:50].tolist()):  # one in each of C equal intervals
        assert place * total // len(chosen) <= coordinate < (place + 1) * total // len(chosen)


def test_coordinates_estimate_inner_products_without_bias():
    torch.manual_seed(0)
    a, b = torch.randn(2, 4000)
    estimates = [(4000 / 1000 * (a * b)[coordinates(4000, 1000, seed)].sum()).item() for seed in range(400)]
    mean, error = torch.tensor(estimates).mean().item(), torch.tensor(estimates).std().item() / 20
    assert abs(mean - (a * b).sum().item()) < 3 * error


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 1.0), (0.0, None)])
def test_an_enumerable_model(temperature, expected):
    """A softmax over three responses, p = (0.5, 0.3, 0.2), p_data = (0.2, 0.3, 0.5). ∇ log p(k) = e_k − p.

    With fair samples E o = E g. With the greedy response 0 it is p_data − e_0 = (−0.8, 0.3, 0.5), and E g is
    p_data − p = (−0.3, 0, 0.3): the cosine is 0.39 / (√0.98 √0.18) = 0.929.
    """
    torch.manual_seed(0)
    p, data = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    n = 3000
    real = torch.multinomial(data, n, replacement=True)
    synthetic = torch.multinomial(p, n, replacement=True) if temperature else torch.zeros(n, dtype=torch.long)
    eye = torch.eye(3)
    g, o = eye[real] - p, eye[real] - eye[synthetic]
    moments = Moments.from_sample(GradientSample(g, o, o, 1.0))
    corrected = cosine_corrected(moments)
    error = jackknife(cosine_corrected, moments) if n < 500 else 0.03
    assert corrected == pytest.approx(expected or 0.929, abs=3 * error if expected else 0.02)
    if temperature:  # tr Var g = 1 − |p_data|² = 0.62, tr Var s = 1 − |p|² = 0.62: twice the noise
        assert noise_ratio(moments, 1.0) == pytest.approx(2, abs=0.1)
        # b = 10: the share is 0.062 / (|E g|² + 0.124), with |E g|² = 0.18.
        assert synthetic_noise_share(moments, 1.0, 10) == pytest.approx(0.062 / 0.304, abs=0.02)


def schedule(optimizer="sgd", norm=1e9, rates=(1, 1), epochs=(0, 0), prompts_per_step=1) -> Schedule:
    return Schedule(optimizer, norm, 4, prompts_per_step, epochs, rates)


def test_forecast_by_hand():
    """One coordinate, o = m = 1, 2, 3, 6, N = 4, two steps of SGD with one prompt each at rate 1.

    With prompts j and k held out, the steps move the weight by 12 − o_j − o_k, and the margin of k is
    o_k (12 − o_j − o_k). Without j its mean over k is 24, 18, 40/3 and 22/3 for o_j = 1, 2, 3, 6: on average 47/3, or
    twice the mean of o_j o_k. On the two prompts that took part the margin is (12 − o_j − o_k)² / 2, on average 61/3:
    14/3 more. A training pair has 2/4 of it, since N = 4.
    """
    values = [[1.0], [2.0], [3.0], [6.0]]
    gradients = sample(values, values)
    forecast = forecast_margin(gradients, schedule(), 1.0, 1.0)
    assert (forecast.heldout, forecast.train) == pytest.approx((47 / 3, 47 / 3 + 14 / 3 / 2), rel=1e-5)
    # √(3/4 Σ (v_j − mean)²), with differences 25/3, 7/3, −7/3 and −25/3 from the mean.
    assert forecast.heldout_error == pytest.approx(math.sqrt(3 / 4 * 2 * (625 + 49) / 9), rel=1e-5)
    # Scales: the objective's makes steps of SGD larger, the margin's counts directly.
    assert forecast_margin(gradients, schedule(), 2.0, 3.0).heldout == pytest.approx(6 * 47 / 3, rel=1e-5)
    # Every gradient is clipped to norm 0.1, so every move is 0.2. The mean of o is 3.
    assert forecast_margin(gradients, schedule(norm=0.1), 1.0, 1.0).heldout == pytest.approx(0.6, rel=1e-4)
    # With fair samples, SFT's gradients g = 2 o tell the margin of held-out prompts.
    fair = sample(values, [[2.0], [4.0], [6.0], [12.0]], contrast=values)
    assert forecast_margin(fair, schedule(), 1.0, 1.0, fair=True).heldout == pytest.approx(2 * 47 / 3, rel=1e-5)


def test_forecast_of_equal_gradients():
    """All o = m = 2. Adam moves by its learning rate; a training pair gains no more than a held-out one."""
    gradients = sample([[2.0]] * 8, [[2.0]] * 8)
    adam = forecast_margin(gradients, schedule("AdamW", rates=(1, 2, 3, 4), epochs=(0, 0, 1, 1)), 1.0, 1.0)
    assert (adam.heldout, adam.train) == pytest.approx((20, 20), rel=1e-5)
    assert adam.by_epoch == pytest.approx([1, 9], rel=1e-5)  # before the steps: 0, 2 | 6, 12
    assert adam.heldout_error == pytest.approx(0, abs=1e-5)
    # Steps of 18 prompts are simulated with 2 or 3 prompts. Where all prompts pull the same way, that is no different.
    large = schedule("adam", prompts_per_step=18)
    assert forecast_margin(gradients, large, 1.0, 1.0).heldout == pytest.approx(4, rel=1e-5)
    # Torch's RMSProp starts its mean of squares at 0: step s is lr / √(1 − 0.99^s). 200 steps are simulated as 50.
    exact = 2 * sum(0.1 / math.sqrt(1 - 0.99**step) for step in range(1, 201))
    long = schedule("rmsprop", rates=[0.1] * 200, epochs=[0] * 200)
    assert forecast_margin(gradients, long, 1.0, 1.0).heldout == pytest.approx(exact, rel=0.05)
    assert forecast_margin(gradients, schedule("lbfgs"), 1.0, 1.0) is None
    assert forecast_margin(sample([[2.0]] * 3, [[2.0]] * 3), schedule(), 1.0, 1.0) is None


def test_forecast_of_pairs_that_stop_pulling():
    """SGD, two steps at rate 1; all prompts have o = m = 2, and the pull at margin m is 1 / (1 + m).

    Step 1 moves by 2, to margin 4. Step 2 moves by 2/5. With an NLL term of gradient 1, step 1 moves by 3, to margin 6,
    and step 2 by 1 + 2/7.
    """
    pull = Pull(1.0, lambda margin: 1 / (1 + margin))
    alone = forecast_margin(sample([[2.0]] * 8, [[2.0]] * 8), schedule(), 1.0, 1.0, pull=pull)
    assert (alone.heldout, alone.train) == pytest.approx((4.8, 4.8))
    gradients = sample([[3.0]] * 8, [[2.0]] * 8, contrast=[[2.0]] * 8)
    assert forecast_margin(gradients, schedule(), 1.0, 1.0, pull=pull).heldout == pytest.approx(2 * (3 + 9 / 7))


def test_pull_of_a_pair():
    def pull(t: int = 0, **objective: Any) -> Pull | None:
        return pair_pull(recipe_of(objective={"name": "spin", "beta": 0.5} | objective), t, 0.5, 0.25)

    assert pull().relative(2.0) == pytest.approx(2 / (1 + math.e))
    # (1 − ε) ℓ(z) + ε ℓ(−z) has its minimum at z = log((1 − ε) / ε) = log 3.
    assert pull(label_smoothing=0.25).relative(2 * math.log(3)) == pytest.approx(0, abs=1e-9)
    assert (pull(link="hinge").relative(1.9), pull(link="hinge").relative(2.1)) == (1, 0)
    assert pull(1, reference_mix=0.5) is None and pull(0, reference_mix=0.5) is not None
    assert pair_pull(recipe_of(objective={"name": "dpo-positive"}), 0, 0.1, 0.05) is None


def test_steps_of_adam_on_heavy_tails():
    """Simulated steps on 32 prompts tell the margin after AdamW's steps on 64 others.

    3000 coordinates, g = 0.1 + Student's t with 3 degrees of freedom; 8 steps of 8 prompts.
    """
    torch.manual_seed(0)
    g = 0.1 + torch.distributions.StudentT(3.0).sample((64 + 32 + 2000, 3000))
    weights = torch.nn.Parameter(torch.zeros(3000))
    optimizer = torch.optim.AdamW([weights], lr=0.01, weight_decay=0.0)
    for batch in g[:64].split(8):
        weights.grad = -batch.mean(0)
        optimizer.step()
    movement = weights.detach()
    steps = Schedule("adamw", 1e9, 64, 8, [0] * 8, [0.01] * 8)
    forecast = forecast_margin(GradientSample(g[64:96], g[64:96], g[64:96], 1.0), steps, 1.0, 1.0)
    assert forecast.train == pytest.approx(float((g[:64] @ movement).mean()), rel=0.15)
    assert forecast.heldout == pytest.approx(float((g[96:] @ movement).mean()), rel=0.25)
    # One step of all 64 prompts, simulated with fewer: 0.01 in the direction of the mean of most coordinates.
    once = Schedule("adamw", 1e9, 64, 64, [0], [0.01])
    forecast = forecast_margin(GradientSample(g[64:96], g[64:96], g[64:96], 1.0), once, 1.0, 1.0)
    direction = 0.01 * g[:64].mean(0).sign()
    assert forecast.heldout == pytest.approx(float((g[96:] @ direction).mean()), rel=0.25)


def tiny_run(folder: Path, data: Path, **sections) -> Run:
    recipe = {
        "model": {"path": str(folder.parent / "model")},
        "data": {"path": str(data), "prompts": 20, "heldout": 8},
        "sft": {"epochs": 2, "learning_rate": 2e-3, "batch_size": 8},
        "opponent": {"max_new_tokens": 8},
        "selfplay": {"iterations": 1, "guard": None},
        "train": {"epochs": 2, "batch_size": 4, "learning_rate": 1e-4, "optimizer": "adamw", "max_length": 64},
        "evaluate": {"regime_prompts": 12},
    }
    run = Run(parse_recipe(recipe | sections), RunDir(folder))
    prepare(run)
    sft(run)
    generate(run, 0)
    reference_logprobs(run, 0)
    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("regime")
    save_tiny_model(folder / "model")
    words = ["one", "two", "three", "four", "five", "six", "seven"]
    rows = [{"prompt": f"What is {n}?", "response": " ".join(words[(n * k) % 7] for k in (1, 3, 5))} for n in range(48)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "data.jsonl"


OBJECTIVES = {
    "spin": {"name": "spin", "beta": 0.5},
    "nll": {"name": "spin", "nll_weight": 2.0},
    "space": {"name": "space", "mu": 2.0},
    "t-spin": {"name": "t-spin", "beta": 0.2},
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_measured_gradients_equal_those_of_plain_autograd(data, objective):
    """All coordinates, one response at a time; for SPIN, o = β/2 (g − s), and + α/|y| g with an NLL term."""
    folder = data.parent / f"run-{objective}"
    run = tiny_run(folder, data, objective=OBJECTIVES[objective], lora={"r": 2} if objective == "nll" else None)
    with run:
        values = measure_regime(run, 0)
        expected = plain_statistics(run, objective)
    assert values["coordinates"] == values["parameters"]
    assert values["prompts"] == 12
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, rel=1e-3), name


def plain_statistics(run: Run, objective: str) -> dict[str, float]:
    """Compute the statistics from full gradients of single responses, by the model's own forward pass."""
    model, parameters = run.players.model.eval(), [parameter for _, parameter in run.players.parameters()]
    run.players.logprobs.use_tree_attention(False)

    def gradient(prompt, response) -> tuple[float, torch.Tensor]:
        logprob = naive_logprob(model, prompt, response)
        parts = torch.autograd.grad(logprob, parameters)
        assert None not in parts
        return logprob.item(), torch.cat([part.flatten() for part in parts])

    real, objectives, weights, nlls = [], [], [], []
    for group in _draw_groups(run, 0):
        tree = group.tree
        logprob, g = gradient(tree.prompt, tree.responses[0])
        real.append(g)
        rows = len(group.pairs) + group.nll_only
        nlls.append(rows * (2.0 / len(tree.responses[0]) if objective == "nll" else 0.0))
        o = nlls[-1] * g
        for _, index in (pair for pair in group.pairs if pair[1] > 0):
            other, s = gradient(tree.prompt, tree.responses[index])
            # The derivative of each loss at θ_t, by hand. SPACE: σ(log μ) = 2/3 for the real response, and
            # μ σ(−log μ) = 2/3 for the synthetic one. T-SPIN: y₀ = y' in iteration 0, so its second term is constant.
            weight = {"spin": 0.25, "nll": 0.05, "space": 2 / 3}.get(objective)
            weight = weight or 0.2 / (1 + math.exp(0.2 * (logprob - other)))
            weights.append(weight)
            o = o + weight * (g - s)
        objectives.append(o)
    g, o, n = torch.stack(real).double(), torch.stack(objectives).double(), len(real)
    nll = sum(nlls) / n
    a = sum(weights) / len(weights) + nll

    def off_diagonal(x, y):
        return float(sum(x[i] @ y[j] for i in range(n) for j in range(n) if i != j))

    variances = [float(matrix.var(0).sum()) for matrix in (o, g)]
    rows = sum(PairDataset([run.folder.pairs(0, "train", 0)], 10**6).batch_cost)
    b = 20 / math.ceil(rows / 4)  # prompts in a step of 4 rows
    square = off_diagonal(o, o) / (n * (n - 1))
    return {
        "cosine": float(torch.nn.functional.cosine_similarity(g.mean(0), o.mean(0), dim=0)),
        "noise_ratio": variances[0] / (a**2 * variances[1]),
        "synthetic_noise_share": max(variances[0] - a**2 * variances[1], 0) / b / (max(square, 0) + variances[0] / b),
        "real_weight": a,
        "nll_share": nll / a,
    }


def test_a_subset_of_coordinates_gives_about_the_same(data, monkeypatch):
    """From a quarter of 43,000 coordinates, the noise ratio is right within 15%."""
    with tiny_run(data.parent / "run-subset", data) as run:
        every = measure_regime(run, 0)
        monkeypatch.setattr("spinlm.stages.regime.MAX_COORDINATES", every["parameters"] // 4)
        some = measure_regime(run, 0)
    assert some["coordinates"] == every["parameters"] // 4
    assert some["noise_ratio"] == pytest.approx(every["noise_ratio"], rel=0.15)
    assert some["cosine"] == pytest.approx(every["cosine"], abs=0.1)


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_forecast_against_a_training(data, optimizer):
    """Two epochs of 5 steps with greedy responses, whose margin grows beyond noise: right within a factor of 2."""
    settings = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-4, "optimizer": optimizer, "max_length": 64}
    settings["learning_rate"] = 2e-5 if optimizer == "rmsprop" else 1e-4
    opponent = {"max_new_tokens": 8, "temperature": 0.0}
    with tiny_run(data.parent / f"run-{optimizer}", data, opponent=opponent, train=settings) as run:
        evaluate(run, -1)
        regime(run, 0)
        train(run, 0)
        forecast = read_json(run.folder.regime(0))["forecast"]
        margins = run.folder.metadata("train", 0)["margin_by_epoch"]
    for expected, margin in zip(forecast["beta_margin_by_epoch"], margins, strict=True):
        assert 0.5 < 0.1 * margin / expected < 2


def test_stage_is_resumed_and_runs_once(data):
    with tiny_run(data.parent / "run-resumed", data) as run:
        regime(run, 0)
        written, marker = run.folder.regime(0).read_bytes(), run.folder.marker("regime", 0)
        marker.unlink()  # killed between the file and the marker
        regime(run, 0)
        assert run.folder.regime(0).read_bytes() == written
        stamp = run.folder.regime(0).stat().st_mtime_ns
        regime(run, 0)
        assert run.folder.regime(0).stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    "sections", [{"evaluate": {"regime_prompts": 0}}, {"objective": {"name": "sft"}}], ids=["none", "control"]
)
def test_nothing_is_measured(data, sections):
    with tiny_run(data.parent / f"run-{next(iter(sections))}", data, **sections) as run:
        regime(run, 0)
        assert run.folder.metadata("regime", 0)["outputs"] == {}
        assert not run.folder.regime(0).exists()


def values_of(**changes) -> dict:
    measured = {
        "prompts": 32,
        "pairs": 30,
        "real_tokens": 25.0,
        "beta": 0.1,
        "cosine": 0.6,
        "cosine_corrected": 0.97,
        "cosine_corrected_error": 0.04,
        "noise_ratio": 2.3,
        "synthetic_noise_share": 0.38,
        "nll_share": 0.02,
        "forecast": {
            "beta_margin_by_epoch": [0.05],
            "beta_margin_train": 0.12,
            "beta_margin_train_error": 0.03,
            "beta_margin_heldout": 0.01,
            "beta_margin_heldout_error": 0.02,
        },
    }
    return measured | changes


def recipe_of(**sections) -> Recipe:
    return parse_recipe({"model": {"path": "model"}, "data": {"path": "data.jsonl"}, **sections})


def test_sentences():
    fair, greedy = recipe_of(), recipe_of(opponent={"temperature": 0.0})
    first, beta, forecast = describe_regime(values_of(), fair, 0)
    assert "this is fine-tuning with 2.3 times the noise (cosine 0.97 ± 0.04" in first and "38%" in first
    # ln 3 / (2 · 0.1 · 25) = 0.22 nats; 25 / 25 = 1.
    assert "0.22 nats" in beta and "corresponds to β = 1 here" in beta
    assert "0.12 ± 0.03 on the training pairs" in forecast and "below 0.3" in forecast
    assert "0.01 ± 0.02 (too few prompts to tell) on held-out" in forecast
    unsure = values_of()["forecast"] | {"beta_margin_train_error": 0.19}  # 0.12 + 0.19 > 0.3
    assert "below 0.3" not in describe_regime(values_of(forecast=unsure), fair, 0)[2]
    far = values_of()["forecast"] | {"beta_margin_train": 4.0, "beta_margin_train_error": 1.0}  # 3 > ln 19
    assert "above 2.9, the gradient of a pair is nearly 0" in describe_regime(values_of(forecast=far), fair, 0)[2]
    far["beta_margin_train_error"] = 1.1
    assert "nearly 0" not in describe_regime(values_of(forecast=far), fair, 0)[2]
    different = values_of(cosine_corrected=0.41, cosine_corrected_error=0.06)
    assert describe_regime(different, greedy, 0)[0].startswith("The pairs ask for something other than fine-tuning")
    unclear = values_of(cosine_corrected_error=0.4)
    assert (
        "fair samples of the opponent (32 prompts are too few to measure it: cosine 0.97 ± 0.40"
        in (describe_regime(unclear, fair, 0)[0])
    )
    assert "too few to compare" in describe_regime(unclear, greedy, 0)[0]
    within = values_of(cosine_corrected=0.8, cosine_corrected_error=0.11)  # 1 is within two standard errors
    assert "too few to compare" in describe_regime(within, greedy, 0)[0]
    mixed = recipe_of(objective={"reference_mix": 0.5}, selfplay={"replay": 0})  # weights differ from iteration 1 on
    assert "fair samples" in describe_regime(within, mixed, 0)[0]
    assert "too few to compare" in describe_regime(within, mixed, 1)[0]
    assert describe_regime(values_of(real_tokens=250.0), fair, 0)[1].startswith("Forecast")  # the paper's β and length
    assert "gradient is nearly 0" in describe_regime(values_of(), fair, 0, [20.0, 41.0])[-1]  # 2σ(−4.1) = 3%
    assert "gradient is nearly 0" in describe_regime(values_of(), fair, 0, [9000.0])[-1]  # e^900 is no float
    assert "0.05, 0.10 (forecast 0.05)" in describe_regime(values_of(), fair, 0, [0.5, 1.0])[-1]
    assert "too little memory" in describe_regime({"not_measured": "too little memory"}, fair, 0)[0]
    assert "has a pair" in describe_regime({"pairs": 0, "prompts": 4}, fair, 0)[0]


def test_thresholds():
    assert is_fine_tuning(values_of())
    assert is_fine_tuning(values_of(cosine_corrected=0.91, cosine_corrected_error=0.2))
    assert not is_fine_tuning(
        values_of(cosine_corrected=0.8, cosine_corrected_error=0.11)
    )  # but 1 is within two errors
    assert not is_fine_tuning(values_of(cosine_corrected=0.95, cosine_corrected_error=0.5))
    assert has_fair_samples(recipe_of(), 0)
    assert not has_fair_samples(recipe_of(), 1)  # replays iteration 0
    assert has_fair_samples(recipe_of(selfplay={"replay": 0}), 1)
    assert not has_fair_samples(recipe_of(opponent={"temperature": 0.5}), 0)
    assert link_scale(recipe_of(objective={"beta": 0.2, "length_normalize": True}), 0, 20.0) == pytest.approx(0.01)
    assert link_scale(recipe_of(objective={"name": "space"}), 0, 20.0) == 1.0
