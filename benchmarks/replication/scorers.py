"""Scorers of the replication's tasks, named in a plan as `scorers:FUNCTION`. Each returns a score from 0 to 1."""

import ast
import operator
import re
from collections import Counter
from fractions import Fraction

from spinlm.evals.scorers import json_fields

EQUATION = re.compile(r"<<([0-9.,+\-*/()$% ]{1,100})=([0-9.,\-$% ]{1,30})>>")
ENDING = re.compile(r"####\s*-?\$?[0-9]")
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
ROUNDING = Fraction(1, 100)  # GSM8K writes <<1/3=0.33>>


def records(response: str, reference: str) -> float:
    """Return the share of right fields in lines of JSON: the mean of `json_fields` over the lines.

    Line n of the response is compared with line n of the reference. Empty lines are ignored. A line that only one of
    the texts has scores 0.
    """
    scores = _line_scores(response, reference)
    return sum(scores) / len(scores)


def whole_records(response: str, reference: str) -> float:
    """Return the share of lines in which every field is right. Lines are compared as by `records`."""
    scores = _line_scores(response, reference)
    return sum(score == 1 for score in scores) / len(scores)


def equations(response: str, reference: str) -> float:
    """Return the share of right equations in a GSM8K rationale, which writes them as <<48/2=24>>.

    An equation is right if its left side equals its result, and the reference has an equation with this result. Each
    equation of the reference counts once. The share is of the equations of the text that has more of them. Without
    equations in the reference, the score is 1 if the response has none either.
    """
    expected = Counter(_number(result) for _, result in EQUATION.findall(reference))
    written = [(_value(left), _number(result)) for left, result in EQUATION.findall(response)]
    right = Counter(result for value, result in written if _is_close(value, result))
    most = max(expected.total(), len(written))
    return (right & expected).total() / most if most else 1.0


def arithmetic(response: str, reference: str = "") -> float:
    """Return the share of the response's equations whose left side equals the result; 0 without equations."""
    written = EQUATION.findall(response)
    return sum(_is_close(_value(left), _number(result)) for left, result in written) / max(len(written), 1)


def ending(response: str, reference: str = "") -> float:
    """Return 1 if the response states a final number as GSM8K does: `#### 24`."""
    return float(bool(ENDING.search(response)))


def _line_scores(response: str, reference: str) -> list[float]:
    lines, expected = ([line for line in text.splitlines() if line.strip()] for text in (response, reference))
    scores = [json_fields(line, right) for line, right in zip(lines, expected, strict=False)]
    return scores + [0.0] * (max(len(lines), len(expected)) - len(scores))


def _is_close(value: Fraction | None, result: Fraction | None) -> bool:
    return value is not None and result is not None and abs(value - result) <= ROUNDING


def _number(text: str) -> Fraction | None:
    """Return the number that a text is, without thousands commas, $ and %; None if it is not a number."""
    try:
        return Fraction(re.sub(r"[,$% ]", "", text))
    except (ValueError, ZeroDivisionError):
        return None


def _value(expression: str) -> Fraction | None:
    """Return the value of an arithmetic expression of numbers, + - * / and brackets; None if it has no value.

    5% is 5/100. The expression is parsed and never run as code.
    """
    text = re.sub(r"([0-9.]+)%", r"(\1/100)", re.sub(r"[,$]", "", expression)).strip()
    try:
        return _evaluate(ast.parse(text, mode="eval").body, text)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def _evaluate(node: ast.expr, text: str) -> Fraction:
    match node:
        case ast.Constant():
            return Fraction(ast.get_source_segment(text, node) or "")  # the text, since 0.1 is no exact float
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
            return _evaluate(operand, text) * (-1 if isinstance(sign, ast.USub) else 1)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return Fraction(OPERATORS[type(op)](_evaluate(left, text), _evaluate(right, text)))
    raise ValueError("not arithmetic")
