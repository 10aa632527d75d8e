"""Scorers: how good an answer is, measured against the real response, from 0 to 1."""

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

from spinlm.errors import DataError, RecipeError
from spinlm.utils.suggest import nearest

Scorer = Callable[[str, str], float]
"""Takes (answer, reference) and returns a score from 0 to 1."""

_FENCED = re.compile(r"```\w*+\s*+(.*)```", re.DOTALL)
_NUMBER = r"(?:(?<![\w)])-)?\$?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)"  # the minus of 7-3 belongs to no number
_LAST_NUMBER = re.compile(_NUMBER)
_MARKED_NUMBER = re.compile(rf"####\s*({_NUMBER})")


def exact_match(answer: str, reference: str) -> float:
    """1 if both are the same text, up to the amount of whitespace, else 0."""
    return float(answer.split() == reference.split())


def json_fields(answer: str, reference: str) -> float:
    """How much of the reference's JSON object the answer has: matched / |union of keys|.

    A key is matched when both objects have it with the same value. The union is over the keys of both, so an invented
    key costs as much as a missing one. Numbers compare as numbers (1 equals 1.0), text exactly but for whitespace
    around it, lists and nested objects as a whole.

    An answer counts only if it is one JSON object, with nothing but whitespace or a ``` fence around it and no key
    twice; any other scores 0.

    Raises:
        DataError: the reference is not a JSON object.
    """
    expected = _json_object(reference)
    if expected is None:
        raise DataError(
            f"the scorer json_fields needs a JSON object as the real response, not {_shorten(reference)}. Choose "
            "another evaluate.scorer for this data"
        )
    found = _json_object(answer)
    if found is None:
        return 0.0
    union = expected.keys() | found.keys()
    matched = sum(_same(found[key], expected[key]) for key in expected.keys() & found.keys())
    return matched / len(union) if union else 1.0


def gsm8k(answer: str, reference: str) -> float:
    """1 if the final numbers of both are equal, else 0.

    The final number is the one after the first `####`; in a text that has no `####` with a number, the last number
    counts. These are lm-eval's strict-match and flexible-extract, the first before the second. `$`, thousands commas
    and a trailing dot are ignored, and numbers compare as numbers (18 equals 18.00).

    Raises:
        DataError: the reference holds no number.
    """
    expected = _final_number(reference)
    if expected is None:
        raise DataError(
            f"the scorer gsm8k needs a number in the real response, and there is none in {_shorten(reference)}. Choose "
            "another evaluate.scorer for this data"
        )
    return float(_final_number(answer) == expected)


SCORERS: dict[str, Scorer] = {"exact_match": exact_match, "json_fields": json_fields, "gsm8k": gsm8k}


def get_scorer(name: str) -> Scorer:
    """The scorer of that name, or the function that `module:function` names.

    The module is looked for in the current folder first, then where Python finds any module. What the scorer returns is
    checked on every call.

    Raises:
        RecipeError: there is no such scorer, or, from a call, it returned something other than a number from 0 to 1.
    """
    function = _import_function(name) if ":" in name else SCORERS.get(name)
    if function is None:
        near = nearest(name, SCORERS)
        meant = f" Did you mean {near}?" if near else ""
        raise RecipeError(
            f"evaluate.scorer: there is no scorer {name!r}.{meant} Known: {', '.join(SCORERS)}, or module:function for "
            "one of your own"
        )
    return _checked(name, function)


def _checked(name: str, function: Scorer) -> Scorer:
    @functools.wraps(function)
    def scorer(answer: str, reference: str) -> float:
        score: Any = function(answer, reference)
        if not isinstance(score, Real) or not 0 <= float(score) <= 1:  # NaN is not in the range either
            raise RecipeError(
                f"evaluate.scorer: {name} returned {_shorten(score)} for the answer {_shorten(answer)}; a scorer "
                "returns a float from 0 to 1"
            )
        return float(score)

    return scorer


def _import_function(name: str) -> Scorer:
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise RecipeError(
            f"evaluate.scorer: {name!r} is incomplete: write module:function, for example my_scorers:score"
        )
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        importlib.invalidate_caches()  # the file may be newer than the folder listing Python remembers
        module = importlib.import_module(module_name)
    except Exception as error:  # the module is the user's: importing it can raise anything
        raise RecipeError(
            f"evaluate.scorer: {name}: cannot import {module_name} ({type(error).__name__}: {error}). It must be a "
            f"module in the current folder ({here}) or an installed one, and import without errors"
        ) from error
    finally:
        sys.path.remove(here)
    function = getattr(module, function_name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        near = nearest(function_name, functions)
        meant = f"; did you mean {near}?" if near else f". Define {function_name}(answer, reference) there"
        raise RecipeError(
            f"evaluate.scorer: {name}: {module_name} ({_file(module)}) has no function {function_name}{meant}"
        )
    own = function.func if isinstance(function, functools.partial) else function
    if (getattr(own, "__module__", None) or "builtins").partition(".")[0] in {*sys.stdlib_module_names, "builtins"}:
        raise RecipeError(
            f"evaluate.scorer: {name}: a function of Python itself scores nothing, and may run an answer as a command"
        )
    if not _takes_two(function):
        raise RecipeError(
            f"evaluate.scorer: {name}: {function_name} is called as {function_name}(answer, reference), but is defined "
            f"as {function_name}{inspect.signature(function)}"
        )
    return function


def _takes_two(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind("answer", "reference")
    except TypeError:
        return False
    except ValueError:  # some built-in functions have no signature to look at
        return True
    return True


def _file(module: Any) -> str:
    return getattr(module, "__file__", None) or "built into Python"


def _json_object(text: str) -> dict[str, Any] | None:
    """The one JSON object a text consists of, or None."""
    text = text.strip()
    fenced = _FENCED.fullmatch(text)
    try:
        value = json.loads(fenced[1] if fenced else text, object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError):  # a degenerate answer can nest thousands of brackets
        return None
    return value if isinstance(value, dict) else None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key stands twice")
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, str) and isinstance(other, str):
        return one.strip() == other.strip()
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(_same(*items) for items in zip(one, other, strict=True))
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other  # in Python True equals 1, in JSON it does not
    return bool(one == other)


def _final_number(text: str) -> Decimal | None:
    marked = _MARKED_NUMBER.search(text)
    numbers = [marked[1]] if marked else _LAST_NUMBER.findall(text)
    return Decimal(numbers[-1].replace("$", "").replace(",", "")) if numbers else None


def _shorten(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:79] + "…"
