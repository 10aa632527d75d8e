"""The learning rate at each step."""

import math

import torch


def learning_rate_at(step: int, steps: int, *, peak: float, warmup_ratio: float, lr_scheduler: str) -> float:
    """Return the learning rate of a step: linear warm-up to the peak, then the decay that `lr_scheduler` names.

    Args:
        step: number of the step, from 0.
        steps: total number of steps.
        peak: the highest learning rate.
        warmup_ratio: share of the steps that warm up.
        lr_scheduler: `linear` and `cosine` decay to 0, `constant` stays at the peak.
    """
    warmup_steps = math.ceil(warmup_ratio * steps)
    if step < warmup_steps:
        return peak * ((step + 1) / warmup_steps)  # peak * (step + 1) / warmup_steps could round to above the peak
    remaining = (steps - step) / max(steps - warmup_steps, 1)  # falls from 1 toward 0
    match lr_scheduler:
        case "linear":
            return peak * remaining
        case "cosine":
            return peak * 0.5 * (1 - math.cos(math.pi * remaining))
        case _:
            return peak


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
