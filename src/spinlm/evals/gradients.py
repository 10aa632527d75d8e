"""Statistics of gradients at the start of an iteration: is self-play fine-tuning with noise?

Every gradient points uphill: it is that of log p(y|x), or that of the loss times −1. An iteration begins at θ = θ_t.
With fair samples y' ~ p_θt(.|x) the expected gradient of log p_θt(y'|x) is 0, so the expected gradient of the SPIN
objective is β/2 times that of fine-tuning, and y' adds noise only. The functions here measure how far that holds.

Shapes: n prompts drawn from the training prompts, C coordinates drawn from the D trained parameters.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

COLUMNS = 1 << 16  # coordinates in one block of float64


@dataclass(frozen=True)
class GradientSample:
    """Gradients of n prompts at C of D coordinates: [n, C] each, in float32 on the CPU.

    A prompt whose synthetic responses all equal the real one counts: its contrast is 0.
    """

    sft: Tensor  # of log p(y|x)
    objective: Tensor  # of the loss times −1: sum over the prompt's pairs, divided by the responses per prompt
    contrast: Tensor  # of the margin r(y) − r(y'): sum over the prompt's pairs, divided by the responses per prompt
    scale: float  # D / C; turns a sum over C coordinates into an estimate of the sum over D


def coordinates(total: int, limit: int, seed: int) -> Tensor:
    """Draw at most `limit` of `total` coordinates, sorted: [C]. Every coordinate is drawn with probability C / D.

    One coordinate is drawn from each of C intervals of equal length, so that the draw needs no memory for all of them.
    """
    if total <= limit:
        return torch.arange(total)
    bounds = torch.arange(limit + 1) * total // limit
    lengths = bounds[1:] - bounds[:-1]
    draw = torch.rand(limit, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return bounds[:-1] + (draw * lengths).long().clamp_(max=lengths - 1)


def inner_products(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Estimate the inner products of the rows of two matrices [n, C]: [n, n] in float64."""
    result = torch.zeros(len(a), len(b), dtype=torch.float64)
    for start in range(0, a.shape[1], COLUMNS):
        block = slice(start, start + COLUMNS)
        result.addmm_(a[:, block].double(), b[:, block].double().T)
    return result * scale


@dataclass(frozen=True)
class Moments:
    """First and second moments of the gradients of n prompts, from their inner products [n, n]."""

    objective: Tensor
    sft: Tensor
    cross: Tensor  # objective times SFT

    @classmethod
    def from_sample(cls, sample: GradientSample) -> "Moments":
        return cls(
            inner_products(sample.objective, sample.objective, sample.scale),
            inner_products(sample.sft, sample.sft, sample.scale),
            inner_products(sample.objective, sample.sft, sample.scale),
        )

    def without(self, index: int) -> "Moments":
        """Return the moments of all prompts but one."""
        keep = torch.arange(len(self.sft)) != index
        return Moments(*(matrix[keep][:, keep] for matrix in (self.objective, self.sft, self.cross)))


def mean_product(products: Tensor) -> float:
    """Estimate ⟨E a, E b⟩ without bias from the products ⟨a_i, b_j⟩ [n, n]: the mean over i ≠ j."""
    n = len(products)
    return float(products.sum() - products.trace()) / (n * (n - 1))


def total_variance(products: Tensor) -> float:
    """Estimate tr Var a without bias from the products ⟨a_i, a_j⟩ [n, n]."""
    n = len(products)
    return float(products.trace() - products.sum() / n) / (n - 1)


def cosine(moments: Moments) -> float | None:
    """Return the cosine between the mean gradients of the objective and of SFT over these prompts."""
    return _cosine(*(float(matrix.sum()) for matrix in (moments.cross, moments.objective, moments.sft)))


def cosine_corrected(moments: Moments) -> float | None:
    """Return the cosine between the expected gradients: the noise of n prompts does not count.

    None if an estimate of a squared length is not positive: n is too small for this noise.
    """
    return _cosine(*map(mean_product, (moments.cross, moments.objective, moments.sft)))


def _cosine(product: float, first: float, second: float) -> float | None:
    return product / math.sqrt(first * second) if first > 0 and second > 0 else None


def jackknife(statistic: Callable[[Moments], float | None], moments: Moments) -> float | None:
    """Return the standard error of a statistic by leaving out each prompt; None if a value is undefined.

    For the values v_i of the statistic without prompt i, the variance is (n − 1) / n Σ (v_i − mean v)².
    """
    n = len(moments.sft)
    values = [statistic(moments.without(index)) for index in range(n)] if n > 2 else [None]
    defined = [value for value in values if value is not None]
    if len(defined) < len(values):
        return None
    mean = sum(defined) / n
    return math.sqrt((n - 1) / n * sum((value - mean) ** 2 for value in defined))


def noise_ratio(moments: Moments, real_weight: float) -> float | None:
    """Return N: the objective has N times the noise of SFT that pulls the real responses as much.

    N = tr Var(objective) / (a² tr Var(SFT)), where a is `real_weight`, the mean weight of ∇ log p(y|x) in the
    objective: β/2 for SPIN. With fair samples, Var(objective) = a² (Var g + E s sᵀ) for the gradients g of log p(y|x)
    and s of log p(y'|x).
    """
    variance = real_weight**2 * total_variance(moments.sft)
    return total_variance(moments.objective) / variance if variance > 0 else None


def synthetic_noise_share(moments: Moments, real_weight: float, prompts_per_step: float) -> float | None:
    """Return the share of a step's expected squared gradient that is noise of the synthetic responses.

    A step's gradient is the mean over b prompts, so its expected square is |E o|² + tr Var(o) / b for the objective's
    gradient o of one prompt. The part of y' is [tr Var(o) − a² tr Var(g)] / b. This is exact for one fair sample per
    prompt: E[s|x] = 0 makes s uncorrelated with g, so tr Var(o) = a² (tr Var(g) + E|s|²). For other responses it is the
    noise beyond that of SFT with the same pull; it may be negative, and then counts as 0.

    Args:
        moments: of the prompts.
        real_weight: a, as in `noise_ratio`.
        prompts_per_step: b.
    """
    variance = total_variance(moments.objective)
    square = max(mean_product(moments.objective), 0.0) + variance / prompts_per_step
    excess = max(variance - real_weight**2 * total_variance(moments.sft), 0.0)
    return excess / prompts_per_step / square if square > 0 else None
