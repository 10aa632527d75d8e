"""The questions and reference answers of MT-Bench, in FastChat's formats, and a player's responses to the questions."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from spinlm.data.renderer import Renderer
from spinlm.distributed.progress import Advance, track
from spinlm.errors import DataError, RowError
from spinlm.model.run import Run
from spinlm.rundir.records import Journal, Message
from spinlm.rundir.stage_graph import player_name
from spinlm.utils.atomic import short_digest
from spinlm.utils.seeds import derive_seed

TEMPERATURES = {
    **dict.fromkeys(("writing", "roleplay"), 0.7),
    **dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0),
    **dict.fromkeys(("stem", "humanities"), 0.1),
}
"""Sampling temperature by category, as in FastChat."""
DEFAULT_TEMPERATURE = 0.7  # of all other categories

REFERENCE_CATEGORIES = ("math", "reasoning", "coding", "arena-hard")
"""Prefixes of the categories that the judge grades with a reference answer, if there is one."""

BATCH_SIZE = 32  # questions; the responses to a batch are written to disk together

QuestionId = int | str
References = dict[QuestionId, tuple[str, ...]]
"""Reference answers to the turns of a question, by the question's id."""


class Row(BaseModel):
    """One line of a file in one of FastChat's formats. Other keys are ignored."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class Question(Row):
    question_id: QuestionId
    category: str
    turns: Annotated[tuple[Annotated[str, StringConstraints(pattern=r"\S")], ...], Field(min_length=1, max_length=2)]

    @property
    def temperature(self) -> float:
        return TEMPERATURES.get(self.category, DEFAULT_TEMPERATURE)

    @property
    def uses_reference(self) -> bool:
        return self.category.startswith(REFERENCE_CATEGORIES)

    @property
    def fingerprint(self) -> list[QuestionId]:
        return [self.question_id, self.category, *self.turns]


class Choice(Row):
    turns: tuple[str, ...]


class ReferenceAnswer(Row):
    question_id: QuestionId
    choices: Annotated[tuple[Choice, ...], Field(min_length=1)]


RowType = TypeVar("RowType", bound=Row)


def read_text(path: Path, option: str) -> str:
    """Read a UTF-8 text file; `option` names the setting in messages.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "not UTF-8 text"
        raise DataError(f"{option}: {path} cannot be read ({reason})") from error


def read_rows(path: Path, option: str, row_type: type[RowType]) -> Iterator[tuple[str, RowType]]:
    """Yield the rows of a JSON-lines file, each with its file and line for messages.

    Raises:
        DataError: the file cannot be read, or a line is not such a row.
    """
    for number, line in enumerate(read_text(path, option).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, row_type.model_validate_json(line)
            except ValidationError as error:
                raise DataError(f"{where}: {describe_errors(error)}") from error


def describe_errors(error: ValidationError) -> str:
    """Describe each wrong field, without its value."""
    problems = []
    for item in error.errors(include_url=False, include_input=False):
        message = str(item["ctx"]["error"]) if item["type"] == "value_error" else item["msg"]
        problems.append(": ".join(filter(None, (".".join(map(str, item["loc"])), message))))
    return "; ".join(problems)


def read_questions(path: Path) -> list[Question]:
    """Read questions. The order takes one question of each category in turn, so that a limit keeps many categories.

    Raises:
        DataError: the file cannot be read, is empty, or a line is not a question.
    """
    by_category: dict[str, list[Question]] = defaultdict(list)
    lines: dict[QuestionId, str] = {}
    for where, question in read_rows(path, "--questions", Question):
        if question.question_id in lines:
            raise DataError(f"{where}: question_id {question.question_id!r} repeats {lines[question.question_id]}")
        lines[question.question_id] = where
        by_category[question.category].append(question)
    if not lines:
        raise DataError(f"--questions: {path} is empty")
    return [question for group in zip_longest(*by_category.values()) for question in group if question is not None]


def read_references(path: Path | None, questions: Sequence[Question]) -> References:
    """Read the reference answers to the questions that use one. Without a file there are none.

    Raises:
        DataError: the file cannot be read, a line is not a reference answer, or no line belongs to these questions.
    """
    if path is None:
        return {}
    by_id = {question.question_id: question for question in questions if question.uses_reference}
    references = {}
    for where, row in read_rows(path, "--references", ReferenceAnswer):
        if (question := by_id.get(row.question_id)) is not None:
            references[row.question_id] = turns = row.choices[0].turns
            if len(turns) < len(question.turns):
                raise DataError(f"{where}: {len(turns)} answers for a question of {len(question.turns)} turns")
    if not references:
        raise DataError(f"--references: {path} has no answer with a question_id of these questions")
    return references


@dataclass(frozen=True)
class TurnResponses:
    """A player's responses to the turns of one question."""

    turns: tuple[str, ...] = ()  # fewer than the question has, if a turn could not be asked
    finished: tuple[bool, ...] = ()  # False: the response was truncated at the length limit
    problem: str | None = None  # why a turn could not be asked


class ResponseSet:
    """A player's responses to the questions, kept in a journal.

    The name of the journal contains a digest of everything that the responses depend on.
    """

    def __init__(self, run: Run, player: int, all_questions: Sequence[Question], max_new_tokens: int):
        self.run, self.player, self.name = run, player, player_name(player)
        self.max_new_tokens = max_new_tokens
        self.folder = run.folder.iteration(player) / "mt-bench"
        self.fingerprint: dict[str, Any] = {
            "player": run.folder.player_digest(player),
            "questions": [question.fingerprint for question in all_questions],
            "temperatures": [TEMPERATURES, DEFAULT_TEMPERATURE],
            "max_new_tokens": max_new_tokens,
            "batch": BATCH_SIZE,
            "seed": run.recipe.seed,
        }
        self._journal = Journal(self.folder / f"responses-{short_digest(self.fingerprint)}.jsonl")
        self._responses = {
            row["question_id"]: TurnResponses(tuple(row["choices"][0]["turns"]), tuple(row["finished"]), row["problem"])
            for row in self._journal.records
        }

    def __getitem__(self, question: Question) -> TurnResponses:
        return self._responses[question.question_id]

    def missing(self, questions: Sequence[Question]) -> list[Question]:
        """Return the questions without responses."""
        return [question for question in questions if question.question_id not in self._responses]

    def generate(self, questions: Sequence[Question]) -> None:
        """Generate the missing responses. Each batch is written to disk as soon as it is complete.

        Raises:
            DataError: the player cannot respond to any of the questions.
            StoppedError: the user asked to stop.
        """
        if self.missing(questions):
            with track(f"{self.name}: respond", 2 * len(questions)) as advance:
                for number, batch in _batches(questions):
                    if missing := self.missing(batch):
                        responses = self._respond(number, batch, advance)  # to all: the seeds depend on the batch
                        new = {question.question_id: responses[batch.index(question)] for question in missing}
                        self._journal.add(*(self._row(question, new[question.question_id]) for question in missing))
                        self._responses |= new
                    else:
                        advance(2 * len(batch))
        if not any(self[question].turns for question in questions):
            raise DataError(
                f"{self.name} cannot respond to any of these questions. Question {questions[0].question_id}: "
                f"{self[questions[0]].problem}"
            )

    def notes(self, questions: Sequence[Question]) -> Iterator[str]:
        """Describe responses that are missing or truncated."""
        incomplete = [question for question in questions if self[question].problem]
        finished = [value for question in questions for value in self[question].finished]
        if incomplete:
            yield (
                f"{self.name}: {len(incomplete)} of {len(questions)} questions have no complete response; question "
                f"{incomplete[0].question_id}: {self[incomplete[0]].problem}"
            )
        if truncated := finished.count(False):
            yield (
                f"{self.name}: {truncated} of {len(finished)} responses were truncated at the length limit, and graded "
                "as they are"
            )

    def _respond(self, number: int, batch: Sequence[Question], advance: Advance) -> list[TurnResponses]:
        """Generate the responses to all turns of a batch of questions."""
        from spinlm.generation import local_engine
        from spinlm.generation.base import Sampling

        players = self.run.players
        players.load(self.player)
        engine = local_engine(players)
        max_length = players.max_positions or players.recipe.train.max_length
        stop_ids, temperature = players.renderer.stop_ids, batch[0].temperature
        sampling = Sampling(temperature, 1.0, self.max_new_tokens, max_length, samples=1, stop_ids=stop_ids)
        responses = [TurnResponses() for _ in batch]
        for turn in range(max(len(question.turns) for question in batch)):
            prompts: dict[int, list[int]] = {}
            for index, question in enumerate(batch):
                if turn < len(question.turns) and responses[index].problem is None:
                    try:
                        prompts[index] = _prompt_ids(players.renderer, question, responses[index].turns, max_length)
                    except RowError as error:
                        responses[index] = replace(responses[index], problem=f"turn {turn + 1}: {error}")
            # All players get the same seed, so that only the players differ.
            seed = derive_seed(self.run.recipe.seed, "exam", turn, str(temperature), number)
            generated = engine.generate(list(prompts.values()), sampling, seed, advance)
            for index, (response,) in zip(prompts, generated, strict=True):
                text, before = players.renderer.decode(response.token_ids), responses[index]
                responses[index] = TurnResponses((*before.turns, text), (*before.finished, response.finished))
        return responses

    def _row(self, question: Question, responses: TurnResponses) -> dict[str, Any]:
        """Return a row in the format of FastChat's model answers; finished and problem are spinlm's."""
        return {
            "question_id": question.question_id,
            "model_id": f"{self.run.folder.root.resolve().name}/{self.run.folder.iteration(self.player).name}",
            "category": question.category,
            "temperature": question.temperature,
            "choices": [{"index": 0, "turns": list(responses.turns)}],
            "finished": list(responses.finished),
            "problem": responses.problem,
        }


def _batches(questions: Sequence[Question]) -> Iterator[tuple[int, list[Question]]]:
    """Yield numbered batches of questions of one temperature. A limit does not move a question to another batch."""
    groups: dict[float, list[Question]] = defaultdict(list)
    for question in questions:
        groups[question.temperature].append(question)
    for group in groups.values():
        for number, first in enumerate(range(0, len(group), BATCH_SIZE)):
            yield number, group[first : first + BATCH_SIZE]


def _prompt_ids(renderer: Renderer, question: Question, responses: Sequence[str], max_length: int) -> list[int]:
    """Return the tokens of the conversation up to the turn that follows these responses.

    Raises:
        RowError: the conversation cannot be rendered, or leaves no room for a response.
    """
    messages: list[Message] = []
    for text, response in zip(question.turns, responses, strict=False):
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": response}]
    ids = renderer.prompt_ids([*messages, {"role": "user", "content": question.turns[len(responses)]}])
    if len(ids) >= max_length:
        problem = f"the conversation has {len(ids)} tokens, and the model has {max_length} positions"
        raise RowError("prompt_too_long", problem)
    return ids
