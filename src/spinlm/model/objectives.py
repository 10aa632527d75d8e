"""What the main player minimises: pure functions of per-response log-probabilities.

Shapes: B pairs. Every log-probability is the sum over a response's tokens, its end-of-turn token included.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    # SPIN (arXiv 2401.01335), section 4.1: ℓ is any monotonically decreasing convex function of the margin.
    "logistic": lambda z: F.softplus(-z),  # log(1 + e^−z)
    "hinge": lambda z: F.relu(1 - z),  # max(0, 1 − z)
    "exponential": lambda z: torch.exp(-z),  # e^−z
}


@dataclass(frozen=True)
class PairLoss:
    """Per-pair results. The margin is in nats, before it is scaled by beta."""

    loss: Tensor  # [B]
    margin: Tensor  # [B] r(y) − r(y'), detached


def spin(
    real: Tensor,
    synthetic: Tensor,
    opponent_real: Tensor,
    opponent_synthetic: Tensor,
    *,
    beta: float,
    loss: str = "logistic",
) -> PairLoss:
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
        loss: ℓ, one of `LOSSES`.
    """
    margin = (real - opponent_real) - (synthetic - opponent_synthetic)
    return PairLoss(LOSSES[loss](beta * margin), margin.detach())


def mean_nll(logprob: Tensor, tokens: Tensor) -> Tensor:
    """Negative log-likelihood per token, −log p_θ(y|x) / |y|.

    Added to the pair loss with a weight, it keeps the likelihood of the real responses from falling, as in RPO
    (arXiv 2404.19733, equation 1).

    Args:
        logprob: [B] log p_θ(y|x).
        tokens: [B] |y|.
    """
    return -logprob / tokens
