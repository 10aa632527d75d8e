"""Statistics of paired differences."""

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
