"""Signs that a player has collapsed: measures that jump where the training loss looks better than ever."""

from spinlm.evals.heldout import Metrics
from spinlm.recipe.schema import Guard


def detect_collapse(guard: Guard | None, start: Metrics, now: Metrics) -> str:
    """What has risen above the starting player's by more than its bound, in words; empty where nothing has.

    Args:
        guard: the bounds; absent means none.
        start: what was measured on the starting player.
        now: on the player in question. A measure it lacks is not looked at.
    """
    if guard is None:
        return ""
    measures = (
        ("heldout_nll", "held-out NLL", guard.max_nll_increase, "{:.3f}"),
        ("truncated_rate", "unfinished answers", guard.max_truncated_increase, "{:.0%}"),
        ("repeated_4grams", "repeated_4grams", guard.max_repetition_increase, "{:.0%}"),
    )
    return "; ".join(
        f"{words} {form.format(start[key])} at the start, {form.format(now[key])} now (bound: +{form.format(bound)})"
        for key, words, bound, form in measures
        if key in now and not now[key] - start[key] <= bound
    )
