"""The guard must notice what jumps, and leave alone what wavers."""

import math

import pytest

from spinlm.config import Guard
from spinlm.evals.guard import signs_of_collapse

START = {"heldout_nll": 0.5, "unfinished_share": 0.1, "repetition": 0.05}
GUARD = Guard(nll_rise=0.1, unfinished_rise=0.2, repetition_rise=0.1)


@pytest.mark.parametrize(
    ("now", "sign"),
    [
        ({"heldout_nll": 0.61}, "held-out NLL 0.500 at the start, 0.610 now (bound: +0.100)"),
        ({"unfinished_share": 0.31}, "unfinished answers 10% at the start, 31% now (bound: +20%)"),
        ({"repetition": 0.16}, "repetition 5% at the start, 16% now (bound: +10%)"),
        ({"heldout_nll": math.nan}, "held-out NLL 0.500 at the start, nan now (bound: +0.100)"),
    ],
)
def test_each_sign(now: dict[str, float], sign: str) -> None:
    assert signs_of_collapse(GUARD, START, START | now) == sign
    assert signs_of_collapse(None, START, START | now) == ""


@pytest.mark.parametrize(
    "now",
    [
        {},
        {"heldout_nll": 0.59, "unfinished_share": 0.29, "repetition": 0.14},
        {"heldout_nll": 0.1, "unfinished_share": 0.0, "repetition": 0.0},  # better
    ],
)
def test_no_sign(now: dict[str, float]) -> None:
    assert signs_of_collapse(GUARD, START, START | now) == ""


def test_all_signs_are_named() -> None:
    now = {"heldout_nll": 9.0, "unfinished_share": 1.0, "repetition": 1.0}
    assert signs_of_collapse(GUARD, START, now).count(";") == 2


def test_what_was_not_measured_is_not_looked_at() -> None:
    assert signs_of_collapse(GUARD, START, {"heldout_nll": 0.5}) == ""
