"""The objectives of the main player: pure functions of per-response log-probabilities.

Shapes: B pairs. Every log-probability is the sum over a response's tokens, including its end-of-turn token.
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
    """Compute r(y) − r(y') with r(y) = log p_θ(y|x) − log p_θt(y|x), in nats: [B]. Arguments as in `spin`."""
    return (real - opponent_real) - (synthetic - opponent_synthetic)


def mix_reference(opponent: Tensor, start: Tensor, weight: float) -> Tensor:
    """Compute the reference m log p_θt + (1 − m) log p_θ0, a geometric mixture of the opponent and the start.

    α-SPIN (arXiv 2404.04291, abstract) derives such a reference from a KL penalty toward the start. The mixture is not
    normalized: in r(y) − r(y'), the constant cancels.

    Args:
        opponent: log p_θt of responses.
        start: log p_θ0 of the same responses.
        weight: m, from 0 to 1.
    """
    return weight * opponent + (1 - weight) * start


def spin(
    real: Tensor,
    synthetic: Tensor,
    opponent_real: Tensor,
    opponent_synthetic: Tensor,
    *,
    beta: float,
    link: str = "logistic",
    label_smoothing: float = 0.0,
    tokens: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Compute the SPIN objective, ℓ(β [r(y) − r(y')]) with r(y) = log p_θ(y|x) − log p_θt(y|x).

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
        label_smoothing: ε of conservative DPO (ericmitchell.ai/cdpo.pdf, equation 3): (1 − ε) ℓ(z) + ε ℓ(−z) replaces
            ℓ(z). With the logistic ℓ, a pair's minimum is at z = log((1 − ε)/ε).
        tokens: [B] |y| and [B] |y'|. If given, r(y) / |y| and r(y') / |y'| replace r(y) and r(y').

    Returns:
        [B] the loss of each pair.
    """
    real_ratio, synthetic_ratio = real - opponent_real, synthetic - opponent_synthetic  # r(y), r(y')
    if tokens is not None:
        real_ratio, synthetic_ratio = real_ratio / tokens[0], synthetic_ratio / tokens[1]
    loss, z = LINKS[link], beta * (real_ratio - synthetic_ratio)
    if label_smoothing:
        return (1 - label_smoothing) * loss(z) + label_smoothing * loss(-z)
    return loss(z)


def dpo_positive(
    real: Tensor,
    synthetic: Tensor,
    opponent_real: Tensor,
    opponent_synthetic: Tensor,
    *,
    beta: float,
    dpop_lambda: float,
) -> Tensor:
    """Compute DPO-Positive, −log σ(β [r(y) − r(y') − λ max(0, −r(y))]).

    Smaug (arXiv 2402.13228), equation 3; its λ is `dpop_lambda`. The third term penalizes a real response that becomes
    less likely. Shapes and the other arguments as in `spin`.
    """
    real_ratio, synthetic_ratio = real - opponent_real, synthetic - opponent_synthetic  # r(y), r(y')
    return F.softplus(-beta * (real_ratio - synthetic_ratio - dpop_lambda * F.relu(-real_ratio)))


def space(real: Tensor, synthetic: Tensor, opponent_real: Tensor, opponent_synthetic: Tensor, *, mu: float) -> Tensor:
    """Compute SPACE, −log σ_μ(r(y)) − μ log σ_1/μ(−r(y')) with σ_μ(x) = 1 / (1 + μ e^−x).

    SPACE (arXiv 2512.07175), section 3, is noise contrastive estimation: each response is classified by itself as real
    or synthetic. With μ synthetic responses of θ_t per real one, σ_μ(r(y)) is the probability that y is real, and
    σ_1/μ(−r(y')) is the probability that y' is synthetic. The minimum is the data distribution if every response of θ_t
    makes a pair, also one that equals the real response, and if responses of earlier opponents are not replayed.
    Shapes and the other arguments as in `spin`.
    """
    real_ratio, synthetic_ratio = real - opponent_real, synthetic - opponent_synthetic  # r(y), r(y')
    shift = math.log(mu)
    return F.softplus(shift - real_ratio) + mu * F.softplus(synthetic_ratio - shift)


def t_spin(
    real: Tensor,
    synthetic: Tensor,
    initial: Tensor,
    *,
    beta: float,
    history_weight: float,
    link: str = "logistic",
) -> Tensor:
    """Compute T-SPIN, ℓ(β [log p_θ(y|x) − log p_θ(y'|x)]) + w ℓ(β [log p_θ(y'|x) − log p_θ(y₀|x)]).

    T-SPIN (arXiv 2601.08198) needs no reference log-probabilities. The paper's α is `beta`, and its β is
    `history_weight` (w). y₀ is the response of the initial player θ_0. The second term still has a gradient when y' has
    become similar to y.

    Args:
        real: [B] log p_θ(y|x).
        synthetic: [B] log p_θ(y'|x).
        initial: [B] log p_θ(y₀|x).
        beta: scale of the differences.
        history_weight: weight of the second term.
        link: ℓ, one of `LINKS`.

    Returns:
        [B] the loss of each pair.
    """
    loss = LINKS[link]
    return loss(beta * (real - synthetic)) + history_weight * loss(beta * (synthetic - initial))


def mean_nll(logprob: Tensor, tokens: Tensor) -> Tensor:
    """Compute the negative log-likelihood per token, −log p_θ(y|x) / |y|: [B].

    `nll_weight` adds this term to the pair loss, so that the real responses do not become less likely, as in RPO
    (arXiv 2404.19733, equation 1).

    Args:
        logprob: [B] log p_θ(y|x).
        tokens: [B] |y|.
    """
    return -logprob / tokens
