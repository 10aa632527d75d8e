"""Means, standard errors and paired differences."""

import math
import statistics
from collections.abc import Sequence


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean; 0 for fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def significantly_better(differences: Sequence[float], min_standard_errors: float) -> bool:
    """Return whether the mean paired difference is positive and exceeds this many of its standard errors."""
    mean = statistics.fmean(differences)
    return mean > 0 and mean > min_standard_errors * standard_error(differences)


def clustered_mean(groups: Sequence[Sequence[float]]) -> tuple[float, float | None]:
    """Return the mean of all values, and its standard error if the values within a group are not independent.

    For n groups of sums s and sizes k, the mean is m = Σs / Σk and its variance n/(n−1) Σ(s − m k)² / (Σk)². The
    standard error of a single group is None.
    """
    n, total = len(groups), sum(len(group) for group in groups)
    mean = sum(sum(group) for group in groups) / total
    if n < 2:
        return mean, None
    squares = sum((sum(group) - mean * len(group)) ** 2 for group in groups)
    return mean, (n / (n - 1) * squares) ** 0.5 / total
