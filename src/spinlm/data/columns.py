"""Which columns of a data set hold the conversation, and the messages that a row holds."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from spinlm.data.sources import Source, kind_of, open_source
from spinlm.errors import DataError, RowError, shortened
from spinlm.recipe.schema import Columns, Data
from spinlm.rundir.records import Message
from spinlm.utils.suggest import nearest

ROWS_TO_INSPECT = 100  # readable rows whose keys together are the columns of a data set

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_PROMPTS = ("prompt", "instruction", "question")
_RESPONSES = ("response", "completion", "output", "answer")
_PREFERRED = ("chosen", *_RESPONSES)


@dataclass(frozen=True)
class Layout:
    """The columns of a conversation: either `messages`, or `prompt` and `response`."""

    messages: str | None = None
    prompt: str | None = None
    prompt_input: str | None = None  # Alpaca's `input`, appended to the prompt
    response: str | None = None
    rejected: str | None = None
    system: str | None = None
    id: str | None = None

    def conversation(self, row: dict[str, Any]) -> list[Message]:
        """Return all messages of a row; a response with its own column is the last message.

        Raises:
            RowError: missing_column, not_text, not_messages, unknown_role, tool_call.
        """
        if self.messages:
            conversation = _messages(_field(row, self.messages), self.messages)
        else:
            assert self.prompt and self.response
            prompt = self._prompt(row, self.prompt)
            conversation = [*prompt, _response(_field(row, self.response), self.response, prompt)]
        system = _optional_text(row, self.system)
        if system and [message["role"] for message in conversation[:1]] != ["system"]:
            return [{"role": "system", "content": system}, *conversation]
        return conversation

    def responses(self, conversation: list[Message], turns: str) -> list[int]:
        """Return the positions of the assistant messages that become examples.

        Args:
            conversation: all messages of a row.
            turns: `data.turns`. Ignored where the response has its own column or the data are preferences.

        Raises:
            RowError: no_assistant_turn, no_user_message.
        """
        roles = [message["role"] for message in conversation]
        if "assistant" not in roles:
            raise RowError("no_assistant_turn", "the conversation has no assistant message")
        first_user = roles.index("user") if "user" in roles else len(roles)
        positions = [at for at, role in enumerate(roles) if role == "assistant" and at > first_user]
        if not positions:
            raise RowError("no_user_message", "no user message comes before the response")
        if not self.messages or self.rejected or turns == "last":
            return positions[-1:]
        return positions[:1] if turns == "first" else positions

    def rejected_response(self, row: dict[str, Any], conversation: list[Message]) -> list[str]:
        """Return the rejected response, which replaces the last message; an empty list without preferences.

        Raises:
            RowError: missing_column, not_text, not_messages, no_assistant_turn.
        """
        if not self.rejected:
            return []
        *prompt, last = conversation
        if last["role"] != "assistant":
            raise RowError("no_assistant_turn", "the conversation does not end with an assistant message")
        return [_response(_field(row, self.rejected), self.rejected, prompt)["content"]]

    def row_id(self, row: dict[str, Any]) -> str | None:
        """Return the row's id from the data, or None.

        Raises:
            RowError: bad_id, not_text.
        """
        value = row.get(self.id) if self.id else None
        if isinstance(value, bool) or not isinstance(value, str | int | None):
            raise RowError("bad_id", f"the id in {self.id!r} is {kind_of(value)}, not text or a whole number")
        return None if value is None else _text(str(value), str(self.id))

    def _prompt(self, row: dict[str, Any], column: str) -> list[Message]:
        value = _field(row, column)
        if isinstance(value, list):
            return _messages(value, column)
        text, extra = _text(value, column), _optional_text(row, self.prompt_input)
        return [{"role": "user", "content": f"{text}\n\n{extra}" if extra else text}]


def check_layout(data: Data) -> None:
    """Check that the columns of a data set are recognized. Reads only the first rows of a .jsonl file.

    Raises:
        DataError: the columns are not recognized, or the data cannot be read.
    """
    with contextlib.suppress(DataError):  # perhaps only the first rows cannot be read
        recognize_layout(open_source(data, ROWS_TO_INSPECT), data.columns)
        return
    recognize_layout(open_source(data), data.columns)


def recognize_layout(source: Source, named: Columns) -> Layout:
    """Find the columns of the conversation among those of a source.

    Args:
        source: the open data.
        named: the columns that the recipe names; other columns are found by their usual names.

    Raises:
        DataError: a named column does not exist, the names contradict each other, or the prompt or the response is not
            found.
    """
    columns = _column_names(source)
    listing = shortened(", ".join(map(repr, columns)))
    for key, column in named.model_dump(exclude_none=True).items():
        if column not in columns:
            near = nearest(column, columns)
            guess = f"; did you mean {near!r}?" if near else ""
            raise DataError(
                f"{source.where}: data.columns.{key} is {column!r}, but the data have no such column{guess} "
                f"(columns: {listing})"
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
            return Layout(messages=response, rejected=named.rejected, system=system, id=named.id)
    if prompt or response:
        prompt, response = prompt or present(*_PROMPTS), response or present(*_RESPONSES)
    elif messages:
        return Layout(messages=messages, rejected=named.rejected, system=system, id=named.id or present("prompt_id"))
    else:
        usual = (("prompt", present(*_RESPONSES)), ("instruction", present("output")), ("question", present("answer")))
        prompt, response = next(((name, other) for name, other in usual if name in columns and other), (None, None))
    if not prompt or not response or prompt == response:
        raise DataError(
            f"{source.where}: cannot tell which columns hold the prompt and the response (columns: {listing}). "
            "Name them: data.columns.prompt and data.columns.response, or "
            "data.columns.messages for a list of messages"
        )
    return Layout(
        prompt=prompt,
        prompt_input=present("input") if prompt == "instruction" and response != "input" else None,
        response=response,
        rejected=named.rejected,
        system=system,
        id=named.id,
    )


def _column_names(source: Source) -> list[str]:
    """Return the keys of the first readable rows, in order.

    Raises:
        DataError: no row can be read.
    """
    columns: dict[str, None] = {}
    readable, first_error = 0, None
    for index, number in enumerate(source.numbers):
        try:
            columns.update(dict.fromkeys(source.row(index)))
            readable += 1
        except RowError as error:
            first_error = first_error or DataError(f"{source.where}: no row can be read; row {number}: {error}")
        if readable == ROWS_TO_INSPECT:
            break
    if first_error and not readable:
        raise first_error
    return list(columns)


def _field(row: dict[str, Any], column: str) -> Any:
    if column not in row:
        raise RowError("missing_column", f"the row has no {column!r}")
    return row[column]


def _optional_text(row: dict[str, Any], column: str | None) -> str:
    """Return the text of a column; an empty string where it is absent, null or blank."""
    value = row.get(column) if column else None
    text = "" if value is None else _text(value, str(column))
    return text if text.strip() else ""


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowError("not_text", f"{name!r} is {kind_of(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError("not_text", f"{name!r} is not valid UTF-8, or holds half a character: {error}") from error
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
        raise RowError("tool_call", f"{name!r} calls a tool, which self-play does not support")
    content = value["content"]
    if isinstance(content, list):
        content = "".join(_text_parts(content, name))
    return {"role": _ROLES[role], "content": _text(content, f"{name}.content")}


def _text_parts(parts: list[Any], name: str) -> Iterator[str]:
    for part in parts:
        if not isinstance(part, dict):
            raise RowError("not_text", f"{name!r} has a part that is {kind_of(part)}, not an object with type and text")
        if (kind := part.get("type")) != "text":
            raise RowError("not_text", f"{name!r} has a part of the type {kind!r}, not text")
        yield _text(part.get("text"), f"{name}.content")


def _response(value: Any, name: str, prompt: list[Message]) -> Message:
    """Return a response given as text, as a list of one message, or as the last message of the whole conversation."""
    if not isinstance(value, list):
        return {"role": "assistant", "content": _text(value, name)}
    messages = _messages(value, name)
    without_system = [message for message in prompt if message["role"] != "system"]
    if not messages or messages[-1]["role"] != "assistant" or messages[:-1] not in ([], prompt, without_system):
        raise RowError(
            "not_messages",
            f"{name!r} must be text or a list that ends with one assistant message; only the messages of the prompt "
            "may come before it",
        )
    return messages[-1]
