"""What the objectives do, on a prompt with five possible responses, where every expectation is a finite sum.

Notation: d is p_data, p the opponent θ_t, q what writes y'; e_y is the unit vector of y. The player is softmax(θ), so
∇ log p_θ(y) = e_y − p_θ. Log-errors are log p − log d without their mean, which softmax ignores.
"""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spinlm.training.objectives import mean_nll, mix_reference, spin

torch.manual_seed(3)
N = 5
DATA = torch.softmax(torch.randn(N, dtype=torch.float64), dim=0)
START = torch.softmax(torch.randn(N, dtype=torch.float64), dim=0)
UNIT = torch.eye(N, dtype=torch.float64)
GREEDY = UNIT[START.argmax()]
Y, Z = (index.flatten() for index in torch.meshgrid(torch.arange(N), torch.arange(N), indexing="ij"))  # all pairs


def expected_loss(theta: Tensor, opponent: Tensor, writer: Tensor, reference: Tensor, beta: float) -> Tensor:
    """E[SPIN's loss] over y ~ DATA and y' ~ writer."""
    player = torch.log_softmax(theta, dim=0)
    return (DATA[Y] * writer[Z] * spin(player[Y], player[Z], reference[Y], reference[Z], beta=beta)).sum()


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    theta = at.clone().requires_grad_()
    return torch.autograd.grad(loss(theta), theta)[0]


def solve(opponent: Tensor, beta: float, reference: Tensor | None = None) -> Tensor:
    """Minimize SPIN's expected loss with fair samples, by L-BFGS from θ_t. Return the player's probabilities."""
    reference = opponent.log() if reference is None else reference
    theta = opponent.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=500, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = expected_loss(theta, opponent, opponent, reference, beta)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return torch.softmax(theta.detach(), dim=0)


def log_error(p: Tensor) -> Tensor:
    error = p.log() - DATA.log()
    return error - error.mean()


def step_0_gradient(writer: Tensor, beta: float) -> Tensor:
    return gradient(lambda theta: expected_loss(theta, START, writer, START.log(), beta), START.log())


def sft_gradient() -> Tensor:
    """The gradient of fine-tuning on the real responses, of one token each: p − d."""
    return gradient(lambda theta: (DATA * mean_nll(torch.log_softmax(theta, 0), torch.ones(N))).sum(), START.log())


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_first_gradient_is_that_of_fine_tuning(beta: float) -> None:
    """−(β/2) (E ∇log p(y) − E ∇log p(y')), and the second term is 0: Σ p(y') (e_y' − p) = p − p."""
    torch.testing.assert_close(sft_gradient(), START - DATA, rtol=0, atol=1e-15)
    torch.testing.assert_close(step_0_gradient(START, beta), beta / 2 * sft_gradient(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 2.0])
def test_unfair_samples_add_their_own_term(temperature: float) -> None:
    """y' ~ q instead of p adds (β/2) Σ q(y') (e_y' − p) = (β/2) (q − p), which pushes down what q prefers."""
    beta = 0.7
    writer = GREEDY if temperature == 0 else torch.softmax(START.log() / temperature, dim=0)
    difference = step_0_gradient(writer, beta) - beta / 2 * sft_gradient()
    torch.testing.assert_close(difference, beta / 2 * (writer - START), rtol=0, atol=1e-14)
    assert difference.norm() > 0.01


@pytest.mark.parametrize("beta", [0.5, 1.0, 5.0])
def test_solved_iteration(beta: float) -> None:
    """p (d/p)^(1/β), normalized.

    Responses a, b contribute d_a p_b ℓ(z) + d_b p_a ℓ(−z), least at z = log(d_a p_b / (d_b p_a)). Every pair is least
    at once where β r(y) = log d_y/p_y + constant.
    """
    expected = START * (DATA / START) ** (1 / beta)
    torch.testing.assert_close(solve(START, beta), expected / expected.sum(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("beta", "factor", "outcome"),
    [
        (0.4, -1.5, "diverges"),
        (0.5, -1.0, "oscillates"),
        (0.6, -2 / 3, "converges"),
        (1.0, 0.0, "converges"),
        (5.0, 0.8, "converges"),
    ],
)
def test_iterations_converge_above_one_half(beta: float, factor: float, outcome: str) -> None:
    """A solved iteration multiplies the log-error by 1 − 1/β: log p' − log d = (1 − 1/β) (log p − log d)."""
    p, first = START, log_error(START)
    for t in range(1, 4):  # by an optimizer
        p = solve(p, beta)
        torch.testing.assert_close(log_error(p), factor**t * first, rtol=1e-4, atol=1e-5)
    error = first
    for _ in range(40):  # by the formula, each time at a zero of the objective's gradient
        opponent = torch.softmax(DATA.log() + error, dim=0)
        error = factor * error
        if outcome != "diverges":
            theta = DATA.log() + error
            zero = gradient(lambda theta, p=opponent: expected_loss(theta, p, p, p.log(), beta), theta)
            assert zero.abs().max() < 1e-14
    size = (error.norm() / first.norm()).item()
    assert {"diverges": size > 1e6, "oscillates": size == pytest.approx(1), "converges": size < 1e-3}[outcome]


@pytest.mark.parametrize(("mix", "beta"), [(1.0, 1.0), (0.5, 1.0), (0.5, 2.0), (0.0, 2.0), (0.0, 0.8)])
def test_reference_mix_holds_the_player_to_the_start(mix: float, beta: float) -> None:
    """e' = m e + (1 − m) e_0 − e/β, with log-errors e; its fixed point is e = (1 − m) / (1 − m + 1/β) e_0.

    The distance to it is multiplied by m − 1/β: it shrinks for β > 1/(1 + m). Only m = 1 ends at the data.
    """

    def reference(p: Tensor) -> Tensor:
        return mix_reference(p.log(), START.log(), mix)

    first = log_error(START)
    limit = (1 - mix) / (1 - mix + 1 / beta) * first
    fixed = torch.softmax(DATA.log() + limit, dim=0)
    at_fixed = gradient(lambda theta: expected_loss(theta, fixed, fixed, reference(fixed), beta), fixed.log())
    assert at_fixed.abs().max() < 1e-15
    p = START
    for t in range(1, 5):
        p = solve(p, beta, reference(p))
        torch.testing.assert_close(log_error(p) - limit, (mix - 1 / beta) ** t * (first - limit), rtol=0, atol=1e-5)


def test_reference_mix_by_hand() -> None:
    """0.25 · (−8) + 0.75 · (−4) = −5; the ends are exactly the opponent and the start."""
    opponent, start = torch.tensor([-8.0]), torch.tensor([-4.0])
    assert [mix_reference(opponent, start, weight).item() for weight in (0.25, 1.0, 0.0)] == [-5.0, -8.0, -4.0]


@pytest.mark.parametrize("samples", [1, 2, 4])
def test_more_samples_have_less_noise(samples: int) -> None:
    """The noise of the mean over k responses, E|g − E g|², is (β/2)² (1 − Σ p²) / k, since E|e_y' − p|² = 1 − Σ p²."""
    beta, real = 0.6, 2

    def pair_gradient(synthetic: int) -> Tensor:
        def loss(theta: Tensor) -> Tensor:
            player, opponent = torch.log_softmax(theta, dim=0), START.log()
            return spin(player[real], player[synthetic], opponent[real], opponent[synthetic], beta=beta)

        return gradient(loss, START.log())

    of = torch.stack([pair_gradient(synthetic) for synthetic in range(N)])  # [N, N]
    drawn = torch.tensor(list(itertools.product(range(N), repeat=samples)))  # all draws of k responses
    probability, step = START[drawn].prod(dim=1), of[drawn].mean(dim=1)
    mean = probability @ step
    noise = (probability * (step - mean).square().sum(dim=1)).sum().item()
    torch.testing.assert_close(mean, -beta / 2 * (UNIT[real] - START), rtol=0, atol=1e-14)
    assert noise == pytest.approx((beta / 2) ** 2 * (1 - START.square().sum().item()) / samples, rel=1e-12)


def test_greedy_responses_are_max_margin_training() -> None:
    """A pair with ŷ = argmax p pulls with −(β/2) (e_y − e_ŷ), the perceptron's step, and not where y = ŷ."""
    beta, best = 0.8, int(START.argmax())
    for real in range(N):

        def loss(theta: Tensor, real: int = real) -> Tensor:
            player, opponent = torch.log_softmax(theta, dim=0), START.log()
            return spin(player[real], player[best], opponent[real], opponent[best], beta=beta)

        torch.testing.assert_close(gradient(loss, START.log()), -beta / 2 * (UNIT[real] - UNIT[best]))
    assert not gradient(lambda theta: loss(theta, best), START.log()).any()
    torch.testing.assert_close(step_0_gradient(GREEDY, beta), -beta / 2 * (DATA - GREEDY))


def test_label_smoothing_by_hand() -> None:
    """Margins 2 and −2 at β = 0.5, ε = 0.1: ℓ(−z) = ℓ(z) + z, so the loss is ℓ(z) + 0.1 z = ln(1 + 1/e) + 0.1, …"""
    real, zero = torch.tensor([2.0, -2.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    losses = spin(real, zero, zero, zero, beta=0.5, label_smoothing=0.1)
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-1)) + 0.1, math.log1p(math.exp(1)) - 0.1])
    assert torch.equal(
        spin(real, zero, zero, zero, beta=0.5), spin(real, zero, zero, zero, beta=0.5, label_smoothing=0)
    )


@pytest.mark.parametrize("epsilon", [0.1, 0.3])
def test_label_smoothing_bounds_the_margin(epsilon: float) -> None:
    """d/dz [(1 − ε) ℓ(z) + ε ℓ(−z)] = ε − σ(−z): 0 at z = log((1 − ε)/ε), ε − 1/2 at z = 0, ε where z is large."""
    beta, zero = 0.5, torch.zeros(1, dtype=torch.float64)

    def slope(margin: float) -> float:
        at = torch.tensor([margin], dtype=torch.float64)
        loss = gradient(lambda real: spin(real, zero, zero, zero, beta=beta, label_smoothing=epsilon).sum(), at)
        return loss.item() / beta

    least = math.log((1 - epsilon) / epsilon) / beta
    assert slope(least) == pytest.approx(0, abs=1e-15)
    assert slope(0.0) == pytest.approx(epsilon - 0.5)
    assert slope(200.0) == pytest.approx(epsilon)
    assert slope(least - 1) < 0 < slope(least + 1)


@pytest.mark.parametrize(("beta", "tokens", "expected"), [(1.0, 25, 0.004 / 0.504), (0.1, 250, 0.0004 / 0.0504)])
def test_the_nll_term_has_a_small_share(beta: float, tokens: int, expected: float) -> None:
    """nll_weight 0.1 pulls log p(y) with 0.1/|y|, SPIN with β/2: at β = 1 and 25 tokens the share is below 1%."""
    logprob, zero = torch.tensor([-20.0], dtype=torch.float64), torch.tensor([-20.0], dtype=torch.float64)
    pull = -gradient(lambda real: spin(real, zero, zero, zero, beta=beta).sum(), logprob)
    assert pull.item() == pytest.approx(beta / 2)
    lengths = torch.tensor([float(tokens)])
    term = -gradient(lambda real: 0.1 * mean_nll(real, lengths).sum(), logprob)
    assert term.item() == pytest.approx(0.1 / tokens)
    assert (term / (term + pull)).item() == pytest.approx(expected)
