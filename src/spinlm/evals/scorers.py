"""Scorers compare a response with the real response, and return a score from 0 to 1."""

import functools
import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable
from decimal import Decimal
from numbers import Real
from pathlib import Path
from typing import Any

from spinlm.data.renderer import END_OF_THINK, THINK
from spinlm.errors import DataError, RecipeError, shortened

Scorer = Callable[[str, str], float]
"""A function of a response and the real response (the reference) that returns a score from 0 to 1."""

_FENCED = re.compile(r"```\w*+\s*+(.*)```", re.DOTALL)
_NUMBER = r"(?:(?<![\w)])-)?\$?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)"  # the minus in 7-3 is not a sign
_LAST_NUMBER = re.compile(_NUMBER)
_MARKED_NUMBER = re.compile(rf"####\s*({_NUMBER})")


def exact_match(response: str, reference: str) -> float:
    """Return 1 if the texts are equal apart from whitespace and reasoning, else 0."""
    return float(_answer(response).split() == _answer(reference).split())


def json_fields(response: str, reference: str) -> float:
    """Return the share of the reference's JSON fields that the response has: matched / |union of keys|.

    A key matches if both objects have the key with the same value. The union contains the keys of both objects, so an
    invented key costs as much as a missing one. Numbers compare as numbers (1 equals 1.0), texts exactly apart from
    whitespace around them, lists and nested objects as a whole.

    The response must be one JSON object without duplicate keys. Only whitespace or a ``` fence may surround the object,
    and only reasoning may come before it. Any other response scores 0.

    Raises:
        DataError: the reference is not a JSON object.
    """
    expected = _json_object(_answer(reference))
    if expected is None:
        raise DataError(
            f"the scorer json_fields needs a JSON object as the real response, not {_shorten(reference)}. Choose "
            "another evaluate.scorer for this data"
        )
    fields = _json_object(_answer(response))
    if fields is None:
        return 0.0
    union = expected.keys() | fields.keys()
    matched = sum(_equal(fields[key], expected[key]) for key in expected.keys() & fields.keys())
    return matched / len(union) if union else 1.0


def gsm8k(response: str, reference: str) -> float:
    """Return 1 if the final numbers of both texts are equal, else 0.

    The final number follows the first `####`. In a text without `####` and a number, the final number is the last one.
    These are lm-eval's strict-match and flexible-extract. `$`, thousands commas and a trailing dot are ignored, and
    numbers compare as numbers (18 equals 18.00).

    Raises:
        DataError: the reference has no number.
    """
    expected = _final_number(_answer(reference))
    if expected is None:
        raise DataError(
            f"the scorer gsm8k needs a number in the real response, and {_shorten(reference)} has none. Choose "
            "another evaluate.scorer for this data"
        )
    return float(_final_number(_answer(response)) == expected)


SCORERS: dict[str, Scorer] = {"exact_match": exact_match, "json_fields": json_fields, "gsm8k": gsm8k}


def get_scorer(name: str) -> Scorer:
    """Return the scorer with a name, or the function that `module:function` names.

    Python looks for the module in the current folder first. Every call checks the score.

    Raises:
        RecipeError: there is no such scorer. A call raises it if the score is not a number from 0 to 1.
    """
    function = _import_function(name) if ":" in name else SCORERS.get(name)
    if function is None:
        raise RecipeError(
            f"evaluate.scorer: no scorer {name!r}. Known: {', '.join(SCORERS)}, or module:function for your own"
        )
    return _with_check(name, function)


def _with_check(name: str, function: Scorer) -> Scorer:
    @functools.wraps(function)
    def scorer(response: str, reference: str) -> float:
        score: Any = function(response, reference)
        if not isinstance(score, Real) or not 0 <= float(score) <= 1:  # also refuses NaN
            raise RecipeError(
                f"evaluate.scorer: {name} returned {_shorten(score)} for the response {_shorten(response)}; a scorer "
                "must return a float from 0 to 1"
            )
        return float(score)

    return scorer


def _import_function(name: str) -> Scorer:
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise RecipeError(f"evaluate.scorer: {name!r} is incomplete: write module:function")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        importlib.invalidate_caches()  # Python may have cached an older listing of the folder
        module = importlib.import_module(module_name)
    except Exception as error:  # importing the user's module can raise anything
        raise RecipeError(
            f"evaluate.scorer: {name}: cannot import {module_name} ({type(error).__name__}: {error}). Put the "
            f"module into the current folder ({here}) or install it, and make sure that it imports without errors"
        ) from error
    finally:
        sys.path.remove(here)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise RecipeError(
            f"evaluate.scorer: {name}: {module_name} has no function {function_name}. Define "
            f"{function_name}(response, reference) there"
        )
    own = function.func if isinstance(function, functools.partial) else function
    if (getattr(own, "__module__", None) or "builtins").partition(".")[0] in {*sys.stdlib_module_names, "builtins"}:
        raise RecipeError(
            f"evaluate.scorer: {name}: functions of Python's standard library are not allowed: they may run a "
            "response as code"
        )
    try:
        inspect.signature(function).bind("response", "reference")
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"evaluate.scorer: {name}: cannot be called as {function_name}(response, reference): {error}"
        ) from error
    return function


def _answer(text: str) -> str:
    """Return the text after the reasoning: after `</think>`, if the text or its prompt opens with `<think>`.

    Reasoning without an end counts as the answer.
    """
    reasoning, end, answer = text.partition(END_OF_THINK)
    is_reasoning = THINK not in reasoning or reasoning.lstrip().startswith(THINK)
    return answer if end and is_reasoning else text


def _json_object(text: str) -> dict[str, Any] | None:
    """Return the JSON object that is the whole text, or None."""
    text = text.strip()
    fenced = _FENCED.fullmatch(text)
    try:
        value = json.loads(
            fenced[1] if fenced else text, object_pairs_hook=_unique_keys, parse_constant=_reject_constant
        )
    except (ValueError, RecursionError):  # a degenerate response can nest thousands of brackets
        return None
    return value if isinstance(value, dict) else None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("duplicate key")
    return value


def _reject_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _equal(a: Any, b: Any) -> bool:
    """Compare two JSON values: numbers as numbers, texts apart from whitespace around them."""
    if isinstance(a, str) and isinstance(b, str):
        return a.strip() == b.strip()
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_equal(*items) for items in zip(a, b, strict=True))
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b  # True == 1 in Python, but not in JSON
    return bool(a == b)


def _final_number(text: str) -> Decimal | None:
    marked = _MARKED_NUMBER.search(text)
    numbers = [marked[1]] if marked else _LAST_NUMBER.findall(text)
    return Decimal(numbers[-1].replace("$", "").replace(",", "")) if numbers else None


def _shorten(value: object) -> str:
    return shortened(repr(value), 80)
