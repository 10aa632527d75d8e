"""The learning rate at each step."""

import math

import torch


def learning_rate_at(step: int, steps: int, *, peak: float, warmup_ratio: float, lr_scheduler: str) -> float:
    """Return the learning rate of a step: a linear rise to the peak, then the decay that `lr_scheduler` names.

    Args:
        step: number of the step, from 0.
        steps: number of steps in all.
        peak: the highest learning rate.
        warmup_ratio: share of the steps over which the learning rate rises.
        lr_scheduler: `linear` and `cosine` decay to 0, `constant` stays at the peak.
    """
    rise = math.ceil(warmup_ratio * steps)
    if step < rise:
        return peak * ((step + 1) / rise)  # peak * (step + 1) / rise may exceed the peak by rounding
    left = (steps - step) / max(steps - rise, 1)  # 1 after the rise, toward 0 at the end
    match lr_scheduler:
        case "linear":
            return peak * left
        case "cosine":
            return peak * 0.5 * (1 - math.cos(math.pi * left))
        case _:
            return peak


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> float:
    """Set the learning rate of every parameter group, and return it."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate
