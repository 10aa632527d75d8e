"""MT-Bench's files: questions of one or two turns, and reference answers to them, in FastChat's formats."""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from spinlm.errors import DataError
from spinlm.evals.mt_bench.prompts import read_text

TURNS = 2

TEMPERATURES = {
    **dict.fromkeys(("writing", "roleplay"), 0.7),
    **dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0),
    **dict.fromkeys(("stem", "humanities"), 0.1),
}
"""What players sample with, by category, as MT-Bench has it; other categories take `OTHER_TEMPERATURE`."""
OTHER_TEMPERATURE = 0.7

REFERENCED = ("math", "reasoning", "coding", "arena-hard")
"""Categories, by how they begin, that are judged beside a reference answer where there is one."""


@dataclass(frozen=True)
class Question:
    """What a user writes: a message, and a second one once the first is answered."""

    id: int | str
    category: str
    turns: tuple[str, ...]

    @property
    def temperature(self) -> float:
        return TEMPERATURES.get(self.category, OTHER_TEMPERATURE)

    def plain(self) -> list[int | str]:
        """All of it, as JSON."""
        return [self.id, self.category, *self.turns]

    @property
    def wants_reference(self) -> bool:
        return self.category.startswith(REFERENCED)


References = dict[int | str, tuple[str, ...]]
"""Reference answers to the turns of a question, by its id."""


def read_questions(path: Path | None) -> list[Question]:
    """The questions of a file: JSON lines with question_id, category and turns.

    They come from the categories in turn, so that the first few of them are of many kinds.

    Raises:
        DataError: the file cannot be read, has no questions, or a line is none.
    """
    if path is None:
        raise DataError("no questions: name MT-Bench's question.jsonl, or a file like it, with --questions")
    by_category: dict[str, list[Question]] = defaultdict(list)
    seen: dict[int | str, str] = {}
    for where, row in _rows(path, "--questions"):
        question = _question(row, where)
        if question.id in seen:
            raise DataError(f"{where}: question_id {question.id!r} is that of {seen[question.id]}, too")
        seen[question.id] = where
        by_category[question.category].append(question)
    if not seen:
        raise DataError(f"--questions: {path} is empty: it has no questions")
    return [question for some in zip_longest(*by_category.values()) for question in some if question is not None]


def read_references(path: Path | None, questions: Sequence[Question]) -> References:
    """The reference answers of a file to those of these questions that are judged beside one; none without a file.

    Raises:
        DataError: the file cannot be read, a line is no answer, or it has none to any of these questions.
    """
    if path is None:
        return {}
    answers = {}
    for where, row in _rows(path, "--references"):
        try:
            turns = tuple(row["choices"][0]["turns"])
            answers[row["question_id"]] = (where, turns)
        except (KeyError, IndexError, TypeError) as error:
            raise DataError(
                f"{where}: not a reference answer ({error!r}). A line is a JSON object with question_id and "
                "choices[0].turns, a list of texts"
            ) from error
        if not all(isinstance(turn, str) for turn in turns):
            raise DataError(f"{where}: the turns of a reference answer must be texts")
    references = {}
    for question in questions:
        if question.id not in answers or not question.wants_reference:
            continue
        where, turns = answers[question.id]
        if len(turns) < len(question.turns):
            raise DataError(f"{where}: {len(turns)} answers to the {len(question.turns)} turns of the question")
        references[question.id] = turns
    if not any(question.id in answers for question in questions):
        raise DataError(f"--references: {path} answers none of these questions: their question_ids are others")
    return references


def _rows(path: Path, option: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file of JSON lines, each with where it stands."""
    for number, line in enumerate(read_text(path, option).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: not a JSON object")
        yield where, row


def _question(row: dict[str, Any], where: str) -> Question:
    """A question, if the row is one."""
    for name, kind, say in (
        ("question_id", (int, str), "a number or a text"),
        ("category", str, "a text"),
        ("turns", list, "a list of texts"),
    ):
        if not isinstance(row.get(name), kind):
            problem = "is missing" if name not in row else f"is not {say}"
            raise DataError(f"{where}: not a question: {name} {problem}")
    turns = row["turns"]
    if not 1 <= len(turns) <= TURNS or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise DataError(f"{where}: not a question: turns must be one or two texts that are not empty")
    return Question(row["question_id"], row["category"], tuple(turns))
