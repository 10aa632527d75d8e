"""Signs that a player has collapsed: metrics that jump although the training loss still falls."""

from spinlm.evals.heldout import Metrics
from spinlm.recipe.schema import Guard


def detect_collapse(guard: Guard | None, start: Metrics, now: Metrics) -> str:
    """Describe each metric that exceeds its value at the start by more than its bound; empty if there is none.

    Args:
        guard: the bounds; None means no bounds.
        start: metrics of the starting player.
        now: metrics of the player to check. A missing metric is not checked.
    """
    if guard is None:
        return ""
    measures = (
        ("heldout_nll", "held-out NLL", guard.max_nll_increase, "{:.3f}"),
        ("truncated_rate", "truncated responses", guard.max_truncated_increase, "{:.0%}"),
        ("repeated_4grams", "repeated 4-grams", guard.max_repetition_increase, "{:.0%}"),
    )
    return "; ".join(
        f"{words} {form.format(start[key])} at the start, {form.format(now[key])} now (bound: +{form.format(bound)})"
        for key, words, bound, form in measures
        if key in now and not now[key] - start[key] <= bound
    )
