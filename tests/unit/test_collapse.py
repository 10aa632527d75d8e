"""The guard must detect a jump and ignore noise."""

import math

import pytest

from spinlm.evals.collapse import detect_collapse
from spinlm.recipe.schema import Guard

START = {"heldout_nll": 0.5, "truncated_rate": 0.1, "repeated_4grams": 0.05}
GUARD = Guard(max_nll_increase=0.1, max_truncated_increase=0.2, max_repetition_increase=0.1)


@pytest.mark.parametrize(
    ("now", "sign"),
    [
        ({"heldout_nll": 0.61}, "held-out NLL 0.500 at the start, 0.610 now (bound: +0.100)"),
        ({"truncated_rate": 0.31}, "truncated responses 10% at the start, 31% now (bound: +20%)"),
        ({"repeated_4grams": 0.16}, "repeated 4-grams 5% at the start, 16% now (bound: +10%)"),
        ({"heldout_nll": math.nan}, "held-out NLL 0.500 at the start, nan now (bound: +0.100)"),
    ],
)
def test_each_sign(now: dict[str, float], sign: str) -> None:
    assert detect_collapse(GUARD, START, START | now) == sign
    assert detect_collapse(None, START, START | now) == ""


@pytest.mark.parametrize(
    "now",
    [
        {},
        {"heldout_nll": 0.59, "truncated_rate": 0.29, "repeated_4grams": 0.14},
        {"heldout_nll": 0.1, "truncated_rate": 0.0, "repeated_4grams": 0.0},  # better
    ],
)
def test_no_sign(now: dict[str, float]) -> None:
    assert detect_collapse(GUARD, START, START | now) == ""


def test_all_signs_are_named() -> None:
    now = {"heldout_nll": 9.0, "truncated_rate": 1.0, "repeated_4grams": 1.0}
    assert detect_collapse(GUARD, START, now).count(";") == 2


def test_a_missing_metric_is_not_checked() -> None:
    assert detect_collapse(GUARD, START, {"heldout_nll": 0.5}) == ""
