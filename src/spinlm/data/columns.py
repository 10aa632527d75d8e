"""Which columns of a data set hold the conversation, and the messages that a row holds."""

import contextlib
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Any

from spinlm.data.messages import (
    DOCUMENTS,
    MASK,
    REASONING_COLUMNS,
    TEXT_ONLY,
    TOOL_CALLS,
    TRAINING_FLAGS,
    Conversation,
    has_turns,
    is_absent,
    is_false,
    read_conversation,
    read_history,
    read_prompt,
    read_response,
    read_text,
    read_tools,
)
from spinlm.data.readers import is_read_by_line
from spinlm.data.sources import ROWS_TO_INSPECT, Source, data_files, kind_of, open_source
from spinlm.errors import DataError, RowError, shortened
from spinlm.recipe.data import Columns, Data
from spinlm.rundir.records import Message
from spinlm.utils.suggest import nearest

_RESPONSES = ("response", "completion", "output", "answer")
_PROMPTS = ("prompt", "instruction", "question")
_PREFERRED = ("chosen", *_RESPONSES)
_CONVERSATIONS = ("conversations", "conversation", "dialog", "dialogue")
_PAIRS = (("prompt", _RESPONSES), ("instruction", ("output",)), ("question", ("answer",)))
_LISTS = ("responses", "answers")  # columns with a list of responses; a row with one response is an example
_RARER_PAIRS = (
    ("instruction", (*_RESPONSES, *_LISTS)),
    ("question", (*_RESPONSES, "solution", *_LISTS)),
    ("query", (*_RESPONSES, *_LISTS)),
    ("problem", ("solution", *_RESPONSES)),
    ("input", ("output", *_RESPONSES)),
    ("prompt", ("chosen", *_LISTS)),
)
"""Names of prompt and response, in the order in which they are tried: `messages`, `_PAIRS`, `_CONVERSATIONS`,
`_RARER_PAIRS`, `chosen`."""

_FLAGS = {"label": "label_false", "kto_tag": "label_false", **dict.fromkeys(TRAINING_FLAGS, "not_for_training")}
"""Columns that exclude a row if they are false, and the reason under which it is counted."""

_CONTEXTS = ("input", "context")  # follow an instruction; other prompts may contain them
_REFUSED = {
    **dict.fromkeys(("images", "image", "videos", "video", "audio", "audios"), TEXT_ONLY),
    **dict.fromkeys(("tool_calls", "function_call", "functions"), TOOL_CALLS),
    "documents": DOCUMENTS,
    **dict.fromkeys(("mask", "loss_mask", "completion_mask", "assistant_masks"), MASK),
    **dict.fromkeys(_CONTEXTS, "the prompt lacks it. Name it in data.columns.context, and it follows the prompt"),
    "history": "the list of messages would lack it",
    "chat_template_kwargs": "the variables of the template are the same for all rows. Set data.chat_template_kwargs",
    **dict.fromkeys(REASONING_COLUMNS, "the list of messages would lack it"),
}
"""Columns that must not be dropped unless the layout reads them, because the meaning of a row depends on them. `tools`,
`system`, `id` and those of `_FLAGS` are read; scores, ratings, names, tags and unknown columns are metadata."""


@dataclass(frozen=True)
class Layout:
    """The columns of a conversation: either `messages`, or `prompt` and `response`."""

    messages: str | None = None
    prompt: str | None = None
    context: str | None = None  # appended to the prompt, as Alpaca's `input`
    response: str | None = None
    rejected: str | None = None
    system: str | None = None
    id: str | None = None
    ignore: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()  # all columns of the data set

    def conversation(self, row: dict[str, Any]) -> Conversation:
        """Return the messages of a row; a response with its own column is the last message.

        Raises:
            RowError: missing_column, not_text, not_messages, unknown_role, tool_call, several_responses,
                unsupported_field, label_false, not_for_training.
        """
        self._check_fields(row)
        if self.messages:
            conversation = read_conversation(_field(row, self.messages), self.messages, self.ignore)
        else:
            assert self.prompt and self.response
            prompt = self._prompt(row, self.prompt)
            response = read_response(_field(row, self.response), self.response, prompt, self.ignore)
            reasoning = {
                key: read_text(row[key], key)
                for key in REASONING_COLUMNS
                if key not in self.ignore and not is_absent(row.get(key))
            }
            conversation = Conversation([*prompt, {**response, **reasoning}])
        system = _optional_text(row, self.system)
        if not system or [message["role"] for message in conversation.messages[:1]] == ["system"]:
            return conversation
        messages: list[Message] = [{"role": "system", "content": system}, *conversation.messages]
        return Conversation(messages, {position + 1 for position in conversation.excluded}, conversation.error)

    def responses(self, conversation: Conversation, turns: str) -> list[int]:
        """Return the positions of the assistant messages that become examples.

        Args:
            conversation: the messages of a row. One that cannot be read matters only if an example may come after it.
            turns: `data.turns`. Ignored where the response has its own column or the data are preferences.

        Raises:
            RowError: no_assistant_turn, no_user_message, not_for_training, or why a message cannot be read.
        """
        if not self.messages or self.rejected:
            turns = "last"
        roles = [message["role"] for message in conversation.messages]
        first_user = roles.index("user") if "user" in roles else len(roles)
        answers = [at for at, role in enumerate(roles) if role == "assistant" and at > first_user]
        positions = [at for at in answers if at not in conversation.excluded]
        if conversation.error and (turns == "last" or not positions):
            raise conversation.error
        if "assistant" not in roles:
            raise RowError("no_assistant_turn", "the conversation has no assistant message")
        if not answers:
            raise RowError("no_user_message", "no user message comes before the response")
        if not positions or (self.rejected and len(roles) - 1 in conversation.excluded):
            raise RowError("not_for_training", "the data exclude every response of the conversation from training")
        if turns == "last":
            return positions[-1:]
        return positions[:1] if turns == "first" else positions

    def rejected_response(self, row: dict[str, Any], conversation: Conversation) -> list[Message]:
        """Return the rejected response, which replaces the last message; an empty list without preferences.

        Raises:
            RowError: missing_column, not_text, not_messages, no_assistant_turn.
        """
        if not self.rejected:
            return []
        *prompt, last = conversation.messages
        if last["role"] != "assistant":
            raise RowError("no_assistant_turn", "the conversation does not end with an assistant message")
        value = _field(row, self.rejected)
        if self.messages and has_turns(value):
            value = read_conversation(value, self.rejected, self.ignore).messages
        return [read_response(value, self.rejected, prompt, self.ignore)]

    def tools(self, row: dict[str, Any]) -> list[Any] | None:
        """Return the row's tool schemas for the chat template; None if it has none.

        Raises:
            RowError: bad_tools.
        """
        return None if "tools" in self.ignore else read_tools(row.get("tools"))

    def row_id(self, row: dict[str, Any]) -> str | None:
        """Return the row's id from the data, or None if it is null or missing.

        Raises:
            RowError: bad_id, not_text.
        """
        value = row.get(self.id) if self.id else None
        if isinstance(value, date):  # or a datetime
            value = value.isoformat()
        if value is None or (isinstance(value, float) and is_absent(value)):
            return None
        if isinstance(value, bool) or not isinstance(value, str | bytes | int):
            raise RowError("bad_id", f"the id in {self.id!r} is {kind_of(value)}, not text or a whole number")
        return read_text(value, str(self.id))

    def column_summary(self) -> str:
        """Return which columns of the data set are read, and which are not."""
        read = self._read_columns()
        lists = {"used": [column for column in self.columns if column in read]}
        lists["ignored"] = [column for column in self.columns if column not in read]
        return "; ".join(f"{shortened(', '.join(columns))} ({use})" for use, columns in lists.items() if columns)

    @cached_property
    def _checked(self) -> list[str]:
        """The columns that refuse or exclude a row, unless the layout or data.columns.ignore names them."""
        used = self._named() | {*self.ignore, *(_CONTEXTS if self.messages else ())}
        refused = [column for column in _REFUSED if column not in self._read_columns()]
        return [column for column in (*_FLAGS, *refused) if column not in used]

    def _named(self) -> set[str]:
        named = (self.messages, self.prompt, self.context, self.response, self.rejected, self.system, self.id)
        return {column for column in named if column}

    def _read_columns(self) -> set[str]:
        others = {"tools", *_FLAGS, *(() if self.messages else ("history", *REASONING_COLUMNS))}
        return self._named() | (others - {*self.ignore})

    def _prompt(self, row: dict[str, Any], column: str) -> list[Message]:
        history = None if "history" in self.ignore or column == "history" else row.get("history")
        turns = [] if is_absent(history) else read_history(history, "history", self.ignore)
        prompt, extra = read_prompt(_field(row, column), column, self.ignore), _optional_text(row, self.context)
        if not isinstance(prompt, str):
            if extra:
                raise RowError("unsupported_field", f"{self.context!r} cannot follow {column!r}, which is a list")
            return [*turns, *prompt]
        return [*turns, {"role": "user", "content": f"{prompt}\n\n{extra}" if extra else prompt}]

    def _check_fields(self, row: dict[str, Any]) -> None:
        """Refuse a row with a column that must not be dropped, or that excludes the row.

        Raises:
            RowError: unsupported_field, label_false, not_for_training.
        """
        for column in self._checked:
            if column not in row or is_absent(value := row[column]):
                continue
            if column in _CONTEXTS and isinstance(value, str) and value.strip() in str(row.get(str(self.prompt))):
                continue
            if column in _FLAGS:
                # A label may be a class; 0 is false only where the column is a weight or a switch.
                if value is False or str(value).lower() == "false" or (column in TRAINING_FLAGS and is_false(value)):
                    raise RowError(_FLAGS[column], f"{column!r} is {value}: the response is no example")
            else:
                raise RowError(
                    "unsupported_field",
                    f"{column!r} is not empty: {_REFUSED[column]}; to ignore it, add it to data.columns.ignore",
                )


def check_layout(data: Data) -> None:
    """Check that the columns of .jsonl files are recognized, by their first rows. Other data are not checked.

    Raises:
        DataError: the columns are not recognized, or the data cannot be read.
    """
    files = data_files(data)
    if not files or not all(map(is_read_by_line, files)):
        return
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
    columns = source.columns()
    listing = shortened(", ".join(map(repr, columns)))
    for key, column in named.model_dump(exclude_none=True, exclude={"ignore"}).items():
        if column not in columns:
            near = nearest(column, columns, cutoff=0.6)
            guess = f"; did you mean {near!r}?" if near else ""
            raise DataError(
                f"{source.where}: data.columns.{key} is {column!r}, but the data have no such column{guess} "
                f"(columns: {listing})"
            )
    if named.messages and (named.prompt or named.response):
        raise DataError(
            "data.columns names both messages and a prompt or response: name messages, or prompt and response"
        )
    found = [column for column in columns if column == "rejected" or column not in named.ignore]
    messages, prompt, response = _find_columns(found, named)
    if messages and named.context:
        raise DataError(f"data.columns.context needs a prompt, but {messages!r} holds whole conversations")
    if not messages and (not prompt or not response or prompt == response):
        raise DataError(
            f"{source.where}: cannot tell which columns hold the prompt and the response (columns: {listing}). "
            "Name them: data.columns.prompt and data.columns.response, or "
            "data.columns.messages for a list of messages"
        )
    has_prompt_id = messages is not None and messages in (named.messages, "messages", *_CONVERSATIONS)
    context = _first(found, *_CONTEXTS) if prompt == "instruction" else None
    return Layout(
        messages=messages,
        prompt=prompt,
        context=named.context or (context if context != response else None),
        response=response,
        rejected=named.rejected,
        system=named.system or _first(found, "system", "system_prompt"),
        id=named.id or (_first(found, "prompt_id") if has_prompt_id else None),
        ignore=tuple(named.ignore),
        columns=tuple(columns),
    )


def _find_columns(columns: list[str], named: Columns) -> tuple[str | None, str | None, str | None]:
    """Return the columns of the messages, of the prompt and of the response."""
    prompt, response = named.prompt, named.response
    messages = named.messages or _first(columns, "messages")
    if named.rejected and not messages:
        prompt = prompt or _first(columns, *_PROMPTS, *_CONVERSATIONS)
        response = response or _first(columns, *_PREFERRED)
        if response and not prompt:  # both columns hold whole conversations
            return response, None, None
    if prompt or response:
        return None, prompt or _first(columns, *_PROMPTS), response or _first(columns, *_RESPONSES)
    if messages:
        return messages, None, None
    if pair := _first_pair(columns, _PAIRS):
        return None, *pair
    if messages := _first(columns, *_CONVERSATIONS):
        return messages, None, None
    if pair := _first_pair(columns, _RARER_PAIRS):
        return None, *pair
    return (_first(columns, "chosen") if "rejected" in columns else None), None, None


def _first(columns: list[str], *names: str) -> str | None:
    return next((name for name in names if name in columns), None)


def _first_pair(columns: list[str], pairs: tuple[tuple[str, tuple[str, ...]], ...]) -> tuple[str, str] | None:
    candidates = ((prompt, _first(columns, *responses)) for prompt, responses in pairs if prompt in columns)
    return next(((prompt, response) for prompt, response in candidates if response), None)


def _field(row: dict[str, Any], column: str) -> Any:
    if column not in row:
        raise RowError("missing_column", f"the row has no {column!r}")
    return row[column]


def _optional_text(row: dict[str, Any], column: str | None) -> str:
    """Return the text of a column; an empty string where it is absent, null or blank."""
    value = row.get(column) if column else None
    text = "" if value is None else read_text(value, str(column))
    return text if text.strip() else ""
