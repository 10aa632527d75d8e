"""Datasets in, checked examples out: which rows a run uses, what it leaves out, and why.

Rows are read one at a time in a seeded order and handed on as they are accepted, so the size of a .jsonl or
hub dataset does not matter; other files are held in memory.
"""

import contextlib
import difflib
import hashlib
import json
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

import numpy as np

from spinlm.data.renderer import Renderer, RowError
from spinlm.data.sources import Source, kind_of, open_source
from spinlm.distributed.progress import track
from spinlm.errors import DataError, shortened
from spinlm.recipe.schema import Columns, Data
from spinlm.rundir.records import Example, Message

Turns = Literal["first", "last", "every"]
SPLITS = ("heldout", "sft", "train")  # in the order they are with_defaults

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_PROMPTS = ("prompt", "instruction", "question")
_RESPONSES = ("response", "completion", "output", "answer")
_PREFERRED = ("chosen", *_RESPONSES)
_ROWS_TO_RECOGNISE = 100
_DROPS_TO_LIST = 100


@dataclass(frozen=True)
class Selection:
    """What was made of the rows. With `turns: every`, a single turn of a row can be dropped."""

    counts: dict[str, int]  # split to examples
    rows: int  # in the source
    dropped: dict[str, int]  # reason to how often
    dropped_rows: list[str]  # "file:row: reason: detail" of the first ones
    cut: int  # examples whose response was cut at the length limit
    not_sampled: int  # rows that were not needed


def select_examples(
    data: Data, warmup: int | None, renderer: Renderer, max_length: int, write: Callable[[str, Example], None]
) -> Selection:
    """Draw held-out examples, then `warmup` ones, then those of self-play, and `write(split, example)` each.

    The same data and seed give the same examples in the same order on every machine. Examples of one row go to one
    split, exact duplicates are dropped, and no prompt of the held-out examples occurs in another split.

    Raises:
        DataError: the data cannot be read or its layout is not recognised; a row is bad and `data.on_bad_row` is
            `error`; or there are fewer usable examples than asked for.
    """
    source = open_source(data)
    draw = _Draw(data, warmup, source, renderer, max_length, write)
    rows = len(source.numbers)
    with track("prepare", int(min(rows, sum(draw.wanted.values()))), unit="rows") as advance:
        for index in np.random.default_rng(data.seed).permutation(len(source.numbers)).tolist():
            if draw.split is None:
                break
            before = sum(draw.counts.values())
            draw.row(index)
            # Where all rows are wanted, it ends with the last of them; else with the last example.
            advance(1 if math.isinf(draw.wanted["train"]) else sum(draw.counts.values()) - before, 1)
    return draw.selection()


def check_layout(data: Data, source: Source | None = None) -> None:
    """Look at the first rows alone: whether their columns can be told.

    Args:
        data: of the recipe.
        source: the same, where it is open. Otherwise no more of a .jsonl file is read than has to be.

    Raises:
        DataError: they cannot, or the data cannot be read.
    """
    if source is None:
        with contextlib.suppress(DataError):  # perhaps it is just the first rows that cannot be read
            _recognise(open_source(data, _ROWS_TO_RECOGNISE), data.columns)
            return
        source = open_source(data)
    _recognise(source, data.columns)


class _Draw:
    """Fills one split after the other, a row at a time."""

    def __init__(
        self,
        data: Data,
        warmup: int | None,
        source: Source,
        renderer: Renderer,
        max_length: int,
        write: Callable[[str, Example], None],
    ):
        self.source, self.renderer, self.max_length, self.write = source, renderer, max_length, write
        self.layout = _recognise(source, data.columns)
        # A prompt column may hold a conversation; its response is one turn.
        self.turns: Turns = data.turns if self.layout.messages and not self.layout.rejected else "last"
        self.wanted = {"heldout": data.heldout, "sft": warmup or 0, "train": data.prompts or math.inf}
        self.counts = dict.fromkeys(SPLITS, 0)
        self.drops = _Drops(source, strict=data.on_bad_row == "error")
        self.contents: set[bytes] = set()
        self.heldout_prompts: set[bytes] = set()
        self.ids: set[str] = set()
        self.visited = self.cut = 0

    @property
    def split(self) -> str | None:
        """The split that is being filled; None when all are full."""
        return next((split for split in SPLITS if self.counts[split] < self.wanted[split]), None)

    def row(self, index: int) -> None:
        """Make examples of a row, all for the split that is being filled."""
        split = self.split
        assert split is not None
        self.visited += 1
        number = self.source.numbers[index]
        try:
            row = self.source.row(index)
            conversation = self.layout.conversation(row)
            row_id = self.layout.row_id(row)
            targets = _targets(conversation, self.turns)
            rejected = self.layout.rejected_text(row, conversation)
        except RowError as error:
            self.drops.bad_row(number, error)
            return
        for position, target in enumerate(targets):
            if self.counts[split] >= self.wanted[split]:
                return
            suffix = f"-{position}" if len(targets) > 1 else ""
            texts = (conversation[target]["content"], *rejected)
            self._example(split, number, row_id, suffix, conversation[:target], *texts)

    def _example(
        self,
        split: str,
        number: int,
        row_id: str | None,
        suffix: str,
        messages: list[Message],
        response: str,
        *rejected: str,
    ) -> None:
        """Take one prompt, its response and, where the data are preferences, the rejected one; or count why not."""
        try:
            _check_not_empty(messages, response, *rejected)
            encoded, *worse = (self.renderer.encode(messages, text, self.max_length) for text in (response, *rejected))
        except RowError as error:
            self.drops.bad_row(number, error)
            return
        # By tokens, since a template may make the same of different texts.
        prompt = _digest(encoded.prompt_ids)
        digest = _digest([encoded.prompt_ids, *(one.response_ids for one in (encoded, *worse))])
        if digest in self.contents:
            self.drops.add(number, "duplicate", "the same prompt and response as an earlier row")
            return
        if split != "heldout" and prompt in self.heldout_prompts:
            self.drops.add(number, "prompt_in_heldout", "its prompt is one of the held-out ones")
            return
        content = _digest([messages, response, *rejected]).hex()[:16]
        example_id = (row_id or content) + suffix
        while example_id in self.ids:
            example_id += f"-{content}"
        self.ids.add(example_id)
        self.contents.add(digest)
        if split == "heldout":
            self.heldout_prompts.add(prompt)
        self.counts[split] += 1
        self.cut += encoded.cut
        source_row = f"{self.source.name}:{number}"
        rejected_ids = worse[0].response_ids if worse else None
        ids = encoded.prompt_ids, encoded.response_ids
        self.write(split, Example(example_id, messages, response, *ids, source_row, rejected_ids))

    def selection(self) -> Selection:
        """What came of it.

        Raises:
            DataError: there were fewer usable examples than asked for.
        """
        rows = len(self.source.numbers)
        at_least = {split: 1 if math.isinf(number) else number for split, number in self.wanted.items()}
        if any(self.counts[split] < number for split, number in at_least.items()):
            self._not_enough(rows)
        drops = self.drops
        return Selection(self.counts, rows, dict(drops.counts), drops.rows, self.cut, rows - self.visited)

    def _not_enough(self, rows: int) -> NoReturn:
        got = ", ".join(
            f"{self.counts[split]} of {'at least 1' if math.isinf(number) else number} {split}"
            for split, number in self.wanted.items()
            if number
        )
        why = ", ".join(f"{reason} {count}" for reason, count in self.drops.counts.items()) or "none"
        raise DataError(
            f"{self.source.where}: not enough usable examples: {got}. Its {rows} rows gave "
            f"{sum(self.counts.values())}; dropped: {why}. Add rows, or lower data.heldout, data.prompts or "
            "sft.prompts"
        )


@dataclass
class _Drops:
    """Counts what is left out, and stops at a bad row where that is asked for."""

    source: Source
    strict: bool
    counts: Counter[str] = field(default_factory=Counter)
    rows: list[str] = field(default_factory=list)

    def add(self, number: int, reason: str, detail: str) -> None:
        self.counts[reason] += 1
        if len(self.rows) < _DROPS_TO_LIST:
            self.rows.append(f"{self.source.name}:{number}: {reason}: {detail}")

    def bad_row(self, number: int, error: RowError) -> None:
        if self.strict:
            raise DataError(
                f"{self.source.where}, row {number}: {error}. Correct or remove it, or set data.on_bad_row: skip"
            ) from error
        self.add(number, error.reason, str(error))


@dataclass(frozen=True)
class _Layout:
    """The columns that hold a conversation: either `messages`, or `prompt` and `response`."""

    messages: str | None = None
    prompt: str | None = None
    addition: str | None = None  # Alpaca's input, which belongs to the prompt
    response: str | None = None
    rejected: str | None = None
    system: str | None = None
    id: str | None = None

    def conversation(self, row: dict[str, Any]) -> list[Message]:
        """All messages of a row, with the response as the last one where it has a column of its own."""
        if self.messages:
            conversation = _messages(_field(row, self.messages), self.messages)
        else:
            assert self.prompt and self.response
            prompt = self._prompt(row, self.prompt)
            conversation = [*prompt, _response(_field(row, self.response), self.response, prompt)]
        system = row.get(self.system) if self.system else None
        if self.system and system is not None and (text := _text(system, self.system)).strip():
            has_one = bool(conversation) and conversation[0]["role"] == "system"
            conversation = conversation if has_one else [{"role": "system", "content": text}, *conversation]
        return conversation

    def rejected_text(self, row: dict[str, Any], conversation: list[Message]) -> list[str]:
        """The worse response in place of a conversation's last message; none where the data are no preferences."""
        if not self.rejected:
            return []
        *prompt, last = conversation
        if last["role"] != "assistant":
            raise RowError("no_assistant_turn", "the conversation does not end with a message of the assistant")
        return [_response(_field(row, self.rejected), self.rejected, prompt)["content"]]

    def row_id(self, row: dict[str, Any]) -> str | None:
        """The id the data gives the row, if any."""
        value = row.get(self.id) if self.id else None
        if isinstance(value, bool) or not isinstance(value, str | int | None):
            raise RowError("bad_id", f"the id in {self.id!r} is {kind_of(value)}, not text or a whole number")
        return None if value is None else _text(str(value), str(self.id))

    def _prompt(self, row: dict[str, Any], column: str) -> list[Message]:
        value = _field(row, column)
        if isinstance(value, list):
            return _messages(value, column)
        text = _text(value, column)
        addition = row.get(self.addition) if self.addition else None
        if self.addition and addition is not None and (more := _text(addition, self.addition)).strip():
            text = f"{text}\n\n{more}"
        return [{"role": "user", "content": text}]


def _recognise(source: Source, named: Columns) -> _Layout:
    columns = _columns(source)
    for key, column in named.model_dump(exclude_none=True).items():
        if column not in columns:
            known = shortened(", ".join(map(repr, columns)))
            near = difflib.get_close_matches(column, columns, n=1, cutoff=0.5)
            guess = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(
                f"{source.where}: data.columns.{key} is {column!r}, which is no column of the data{guess} "
                f"(columns: {known})"
            )
    if named.messages and (named.prompt or named.response):
        raise DataError(
            "data.columns names both messages and a prompt or response: name messages, or prompt and response"
        )

    def present(*names: str) -> str | None:
        return next((name for name in names if name in columns), None)

    prompt, response = named.prompt, named.response
    system = named.system or present("system", "system_prompt")
    messages = named.messages or present("messages")
    if named.rejected and not messages:
        prompt, response = prompt or present(*_PROMPTS), response or present(*_PREFERRED)
        if response and not prompt:  # both columns hold whole conversations
            return _Layout(messages=response, rejected=named.rejected, system=system, id=named.id)
    if prompt or response:
        prompt = prompt or present(*_PROMPTS)
        response = response or present(*_RESPONSES)
    elif messages:
        return _Layout(messages=messages, rejected=named.rejected, system=system, id=named.id or present("prompt_id"))
    elif present("prompt") and present(*_RESPONSES):
        prompt, response = "prompt", present(*_RESPONSES)
    elif present("instruction") and present("output"):
        prompt, response = "instruction", "output"
    elif present("question") and present("answer"):
        prompt, response = "question", "answer"
    if not prompt or not response or prompt == response:
        known = shortened(", ".join(map(repr, columns)))
        raise DataError(
            f"{source.where}: cannot tell which columns hold the prompt and the response (columns: {known}). "
            "Name them: data.columns.prompt and data.columns.response, or "
            "data.columns.messages for a list of messages"
        )
    addition = present("input") if prompt == "instruction" and response != "input" else None
    return _Layout(
        prompt=prompt, addition=addition, response=response, rejected=named.rejected, system=system, id=named.id
    )


def _columns(source: Source) -> list[str]:
    """Names in the first readable rows, in order."""
    columns: dict[str, None] = {}
    readable = 0
    first_error: DataError | None = None
    for index, number in enumerate(source.numbers):
        try:
            columns.update(dict.fromkeys(source.row(index)))
        except RowError as error:
            first_error = first_error or DataError(f"{source.where}: no row can be read; row {number}: {error}")
        else:
            readable += 1
            if readable == _ROWS_TO_RECOGNISE:
                break
    if first_error and not readable:
        raise first_error
    return list(columns)


def _field(row: dict[str, Any], column: str) -> Any:
    if column not in row:
        raise RowError("missing_column", f"the row has no {column!r}")
    return row[column]


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowError("not_text", f"{name!r} is {kind_of(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError("not_text", f"{name!r} holds what is not UTF-8, or half a character: {error}") from error
    return value


def _messages(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list):
        raise RowError("not_messages", f"{name!r} is {kind_of(value)}, not a list of messages")
    return [_message(item, f"{name}[{index}]") for index, item in enumerate(value)]


def _message(value: Any, name: str) -> Message:
    if not isinstance(value, dict) or "role" not in value or "content" not in value:
        raise RowError("not_messages", f"{name!r} is not a message: an object with role and content")
    role = value["role"]
    if not isinstance(role, str) or role not in _ROLES:
        raise RowError("unknown_role", f"{name!r} has the role {role!r}; known: {', '.join(_ROLES)}")
    if value.get("tool_calls") or value.get("function_call"):
        raise RowError("tool_call", f"{name!r} calls a tool, which self-play cannot answer")
    content = value["content"]
    if isinstance(content, list):
        content = "".join(_parts(content, name))
    return {"role": _ROLES[role], "content": _text(content, f"{name}.content")}


def _parts(parts: list[Any], name: str) -> Iterator[str]:
    for part in parts:
        if not isinstance(part, dict):
            raise RowError("not_text", f"{name!r} has a part that is {kind_of(part)}, not an object with type and text")
        if (kind := part.get("type")) != "text":
            raise RowError("not_text", f"{name!r} has a part of the type {kind!r}, not text")
        yield _text(part.get("text"), f"{name}.content")


def _response(value: Any, name: str, prompt: list[Message]) -> Message:
    """A response as text, as a list of one message, or as the last message of the whole conversation."""
    if not isinstance(value, list):
        return {"role": "assistant", "content": _text(value, name)}
    messages = _messages(value, name)
    spoken = [message for message in prompt if message["role"] != "system"]  # which may have a column of its own
    if not messages or messages[-1]["role"] != "assistant" or messages[:-1] not in ([], prompt, spoken):
        raise RowError(
            "not_messages",
            f"{name!r} must be text or a list of one assistant message, which the prompt's messages may stand before",
        )
    return messages[-1]


def _targets(conversation: list[Message], turns: Turns) -> list[int]:
    """Positions of the assistant messages to learn from: those that come after a message of the user."""
    roles = [message["role"] for message in conversation]
    if "assistant" not in roles:
        raise RowError("no_assistant_turn", "the conversation has no message of the assistant")
    asked = roles.index("user") if "user" in roles else len(roles)
    targets = [position for position, role in enumerate(roles) if role == "assistant" and position > asked]
    if not targets:
        raise RowError("no_user_message", "no message of the user comes before the response")
    return {"first": targets[:1], "last": targets[-1:], "every": targets}[turns]


def _check_not_empty(messages: list[Message], *responses: str) -> None:
    if not all(map(_visible, responses)):
        raise RowError("empty_response", "the response is empty")
    *_, asked = (message["content"] for message in messages if message["role"] == "user")
    if not _visible(asked):
        raise RowError("empty_prompt", "the prompt is empty")


def _visible(text: str) -> bool:
    """Whether there is more to a text than white space and characters without a shape (zero-width, control)."""
    return any(not sign.isspace() and unicodedata.category(sign) not in ("Cc", "Cf") for sign in text)


def _digest(value: Any) -> bytes:
    return hashlib.sha256(
        json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
    ).digest()
