"""What the main player minimizes: pure functions of per-response log-probabilities.

Shapes: B pairs. Every log-probability is the sum over a response's tokens, its end-of-turn token included.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LINKS: dict[str, Callable[[Tensor], Tensor]] = {
    # SPIN (arXiv 2401.01335), section 4.1: ℓ is any monotonically decreasing convex function of the margin.
    "logistic": lambda z: F.softplus(-z),  # log(1 + e^−z)
    "hinge": lambda z: F.relu(1 - z),  # max(0, 1 − z)
    "exponential": lambda z: torch.exp(-z),  # e^−z
}


def margin(real: Tensor, synthetic: Tensor, opponent_real: Tensor, opponent_synthetic: Tensor) -> Tensor:
    """r(y) − r(y') with r(y) = log p_θ(y|x) − log p_θt(y|x), in nats: [B] of [B] each, as in `spin`."""
    return (real - opponent_real) - (synthetic - opponent_synthetic)


def spin(
    real: Tensor,
    synthetic: Tensor,
    opponent_real: Tensor,
    opponent_synthetic: Tensor,
    *,
    beta: float,
    link: str = "logistic",
    tokens: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The SPIN objective, ℓ(β [r(y) − r(y')]) with r(y) = log p_θ(y|x) − log p_θt(y|x).

    SPIN (arXiv 2401.01335), equation 4.7; β is the paper's λ. With the logistic ℓ this is the sigmoid loss of DPO
    (arXiv 2305.18290, equation 7) with the real response chosen, the synthetic one rejected, and the opponent θ_t as
    the reference.

    Args:
        real: [B] log p_θ(y|x) of the real responses.
        synthetic: [B] log p_θ(y'|x) of the synthetic responses.
        opponent_real: [B] log p_θt(y|x).
        opponent_synthetic: [B] log p_θt(y'|x).
        beta: λ in the paper.
        link: ℓ, one of `LINKS`.
        tokens: [B] |y| and [B] |y'|, for r(y) / |y| and r(y') / |y'| in place of the sums.

    Returns:
        [B] the loss of each pair.
    """
    ratio, other = real - opponent_real, synthetic - opponent_synthetic
    if tokens is not None:
        ratio, other = ratio / tokens[0], other / tokens[1]
    return LINKS[link](beta * (ratio - other))


def dpo_positive(
    real: Tensor,
    synthetic: Tensor,
    opponent_real: Tensor,
    opponent_synthetic: Tensor,
    *,
    beta: float,
    dpop_lambda: float,
) -> Tensor:
    """DPO-Positive, −log σ(β [r(y) − r(y') − λ max(0, −r(y))]): a real response that becomes less likely costs.

    Smaug (arXiv 2402.13228), equation 3; its λ is `dpop_lambda`. Shapes and the other arguments as in `spin`.
    """
    ratio, other = real - opponent_real, synthetic - opponent_synthetic  # r(y), r(y')
    return F.softplus(-beta * (ratio - other - dpop_lambda * F.relu(-ratio)))


def space(real: Tensor, synthetic: Tensor, opponent_real: Tensor, opponent_synthetic: Tensor, *, mu: float) -> Tensor:
    """SPACE, −log σ_μ(r(y)) − μ log σ_1/μ(−r(y')) with σ_μ(x) = 1 / (1 + μ e^−x).

    SPACE (arXiv 2512.07175), section 3: noise contrastive estimation, which asks of each response alone whether it is
    real. With μ synthetic responses to a real one, all by θ_t, σ_μ(r(y)) is the probability that y is real, and
    σ_1/μ(−r(y')) that y' is not. That holds for one new response to a prompt: with replayed ones (`selfplay.replay`),
    which other opponents wrote, or several samples, the minimum is no longer the data. Shapes and arguments as in
    `spin`.
    """
    ratio, other = real - opponent_real, synthetic - opponent_synthetic  # r(y), r(y')
    shift = math.log(mu)
    return F.softplus(shift - ratio) + mu * F.softplus(other - shift)


def t_spin(
    real: Tensor,
    synthetic: Tensor,
    initial: Tensor,
    *,
    beta: float,
    history_weight: float,
    link: str = "logistic",
) -> Tensor:
    """T-SPIN, ℓ(β [log p_θ(y|x) − log p_θ(y'|x)]) + w ℓ(β [log p_θ(y'|x) − log p_θ(y₀|x)]), without a reference.

    T-SPIN (arXiv 2601.08198); its α is β here, as for the other objectives, and its β is `history_weight` (w). y₀ is
    the response of the initial player θ_0: the second term keeps a gradient where y and y' have become alike.

    Args:
        real: [B] log p_θ(y|x).
        synthetic: [B] log p_θ(y'|x).
        initial: [B] log p_θ(y₀|x).
        beta: scale of the differences.
        history_weight: of the second term.
        link: ℓ, one of `LINKS`.

    Returns:
        [B] the loss of each pair.
    """
    step = LINKS[link]
    return step(beta * (real - synthetic)) + history_weight * step(beta * (synthetic - initial))


def mean_nll(logprob: Tensor, tokens: Tensor) -> Tensor:
    """Negative log-likelihood per token, −log p_θ(y|x) / |y|.

    Added to the pair loss with a weight, it keeps the likelihood of the real responses from falling, as in RPO
    (arXiv 2404.19733, equation 1).

    Args:
        logprob: [B] log p_θ(y|x).
        tokens: [B] |y|.
    """
    return -logprob / tokens
