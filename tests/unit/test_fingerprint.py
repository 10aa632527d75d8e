"""Comparing recipes."""

from typing import Any

import pytest

from spinlm.recipe.fingerprint import differences, recipe_fingerprint
from spinlm.recipe.schema import MUTABLE_FIELDS, Recipe


def fingerprint(t: int, **changes: Any) -> str:
    return recipe_fingerprint(
        Recipe.model_validate({"model": {"path": "m"}, "data": {"path": "d"}, "lora": {}} | changes), t
    )


def rates(*values: float) -> dict[str, Any]:
    return {"selfplay": {"iterations": len(values)}, "train": {"learning_rate": list(values)}}


def test_fingerprint_ignores_later_iterations():
    assert fingerprint(1, **rates(0.5, 0.25)) == fingerprint(1, **rates(0.5, 0.25, 0.125))
    assert fingerprint(2, **rates(0.5, 0.25, 1)) != fingerprint(2, **rates(0.5, 0.25, 0.125))
    assert fingerprint(1, **rates(0.5, 0.5)) == fingerprint(1, train={"learning_rate": 0.5})
    assert fingerprint(0, selfplay={"iterations": 4}) == fingerprint(0, selfplay={"iterations": 5}) == fingerprint(0)
    assert fingerprint(0, objective={"beta": [0.1, 5.0]}, selfplay={"iterations": 2}) == fingerprint(0)


def test_fingerprint_ignores_mutable_fields():
    assert "train.save_steps" in MUTABLE_FIELDS
    assert fingerprint(0, train={"save_steps": 7}) == fingerprint(0)
    assert fingerprint(0, seed=1) != fingerprint(0) != fingerprint(0, lora=None)


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": 1, "b": {"c": [1, 2]}}, {"a": 1, "b": {"c": [1, 2]}}, []),
        ({"b": {"c": [1, 2]}}, {"b": {"c": [2, 1]}}, ["b.c: was [1, 2], is [2, 1]"]),
        ({"a": None}, {"a": {"r": 4}}, ['a: was null, is {"r": 4}']),
        ({"z": 1, "a": 1}, {"z": 2, "a": 2}, ["a: was 1, is 2", "z: was 1, is 2"]),
        ({}, {"new": True}, ["new: was null, is true"]),
        ({"old": "x"}, {}, ['old: was "x", is null']),
    ],
)
def test_differences(old, new, lines):
    assert differences(old, new) == lines
