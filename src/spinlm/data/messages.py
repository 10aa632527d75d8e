"""The messages, prompts and responses that a row holds, in the forms in which data sets write them."""

import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from spinlm.data.readers import WrittenFloat, parse_json
from spinlm.data.sources import kind_of
from spinlm.errors import RowError
from spinlm.rundir.records import Message

NOT_AN_EXAMPLE = ("label_false", "not_for_training")
"""Reasons for which the data exclude a row or a turn from training. Such rows are counted, and are not errors."""

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Fields of a message that the chat template gets, and has to write before a response."""

REASONING_COLUMNS = REASONING_FIELDS[:2]
"""Columns with the reasoning of a response that has its own column. A column `reasoning` may explain anything."""

_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
}
_TOOL_ROLES = (
    *("tool", "function", "ipython", "observation", "function_call", "tool_call"),
    *("function_response", "tool_response", "tool_result"),
)
TEXT_ONLY = "self-play uses text alone"
TOOL_CALLS = "self-play does not support tool calls"
DOCUMENTS = "the chat template would not see them"
MASK = "masks are not read. Give messages that are no examples the weight 0"

REFUSED_MESSAGE_FIELDS = {
    "tool_calls": TOOL_CALLS,
    "function_call": TOOL_CALLS,
    "tool_call_id": TOOL_CALLS,
    "images": TEXT_ONLY,
    "image": TEXT_ONLY,
    "audio": TEXT_ONLY,
    "videos": TEXT_ONLY,
    "documents": DOCUMENTS,
    "refusal": "the response is a refusal",
    "train_detail": "parts of a message cannot be excluded from training",
    "mask": MASK,
}
"""Fields of a message that must not be dropped, because its meaning depends on them. `name`, `id`, `annotations` and
unknown fields are metadata."""

TRAINING_FLAGS = ("weight", "train", "training", "loss")
"""Fields of a message or a row. 0 or false excludes the message from training; later prompts contain it."""

_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):[ \t]*")


@dataclass(frozen=True)
class Conversation:
    """The messages of a row, up to the first that cannot be read."""

    messages: list[Message]
    excluded: set[int] = field(default_factory=set)  # positions of messages that the data exclude from training
    error: RowError | None = None  # why the next message cannot be read


def read_conversation(value: Any, name: str, ignore: Collection[str]) -> Conversation:
    """Read messages: a list, its JSON text, an object with a list of roles and a list of contents, or text with Human:
    and Assistant:.

    Args:
        value: the value of a column.
        name: the name of the column, for messages.
        ignore: fields of a message to drop.

    Raises:
        RowError: not_messages.
    """
    messages: list[Message] = []
    excluded: set[int] = set()
    for index, item in enumerate(_message_list(value, name)):
        try:
            message, is_trained = _message(item, f"{name}[{index}]", ignore)
        except RowError as error:
            return Conversation(messages, excluded, error)
        if not is_trained:
            excluded.add(index)
        messages.append(message)
    return Conversation(messages, excluded)


def read_messages(value: Any, name: str, ignore: Collection[str]) -> list[Message]:
    """Read a list of messages as a whole.

    Raises:
        RowError: not_messages, not_text, unknown_role, tool_call, unsupported_field.
    """
    conversation = read_conversation(value, name, ignore)
    if conversation.error:
        raise conversation.error
    return conversation.messages


def read_history(value: Any, name: str, ignore: Collection[str]) -> list[Message]:
    """Read earlier turns: pairs of a question and an answer, or messages.

    Raises:
        RowError: not_messages, or as `read_messages`.
    """
    value = _parsed(value)
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        return read_messages(value, name, ignore)
    turns: list[Message] = []
    for index, (question, answer) in enumerate(value):
        turns.append({"role": "user", "content": read_text(question, f"{name}[{index}][0]")})
        turns.append({"role": "assistant", "content": read_text(answer, f"{name}[{index}][1]")})
    return turns


def read_prompt(value: Any, name: str, ignore: Collection[str]) -> list[Message] | str:
    """Read a prompt: messages, text that ends in "Assistant:", or other text, which is returned as it is.

    Raises:
        RowError: not_text, or as `read_messages`.
    """
    if isinstance(value, list | dict):
        return read_messages(value, name, ignore)
    text = read_text(value, name)
    if text.startswith("\n\nHuman:") and text.rstrip().endswith("\n\nAssistant:"):
        return read_messages(_turns(text)[:-1], name, ignore)
    return text


def read_response(value: Any, name: str, prompt: list[Message], ignore: Collection[str]) -> Message:
    """Read a response given as text, as a list of one, or as the last message of the whole conversation.

    Raises:
        RowError: several_responses, not_for_training, not_text, or as `read_messages`.
    """
    if isinstance(value, dict) and isinstance(value.get("text"), list):  # SQuAD's answers
        value = value["text"]
    elif isinstance(value, dict) and value.keys() & {"role", "from"}:
        value = [value] if isinstance(value.get("role", value.get("from")), str) else _message_list(value, name)
    if isinstance(value, list) and value and not any(isinstance(item, dict) for item in value):
        if len(texts := list(dict.fromkeys(read_text(item, f"{name}[{at}]") for at, item in enumerate(value)))) > 1:
            raise RowError(
                "several_responses", f"{name!r} has {len(texts)} responses. Write a row for each, or keep one"
            )
        value = texts[0]
    if not isinstance(value, list):
        return {"role": "assistant", "content": read_text(value, name)}
    conversation = read_conversation(value, name, ignore)
    if conversation.error:
        raise conversation.error
    messages = conversation.messages
    without_system = [message for message in prompt if message["role"] != "system"]
    if not messages or messages[-1]["role"] != "assistant" or messages[:-1] not in ([], prompt, without_system):
        raise RowError(
            "not_messages",
            f"{name!r} must be text or a list that ends with one assistant message; only the messages of the prompt "
            "may come before it",
        )
    if len(messages) - 1 in conversation.excluded:
        raise RowError("not_for_training", f"{name!r} is a message that the data exclude from training")
    return messages[-1]


def read_text(value: Any, name: str) -> str:
    """Read text, or a number as it is written.

    Raises:
        RowError: not_text.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = _number_text(value, name)
    if not isinstance(value, str):
        remedy = ". Write the word that the model should write" if isinstance(value, bool) else ""
        raise RowError("not_text", f"{name!r} is {kind_of(value)}, not text{remedy}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError("not_text", f"{name!r} is not valid UTF-8, or holds half a character: {error}") from error
    return value


def is_absent(value: Any) -> bool:
    """Return whether a field is null, NaN, empty or blank, or is the JSON text of an empty list or object."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}")
    return value is None or value in ([], {}) or (isinstance(value, float) and math.isnan(value))


def is_false(value: Any) -> bool:
    """Return whether a flag is false or 0, or the text of one of these, as in a CSV file."""
    return str(value).strip().lower() in ("false", "0", "0.0")


def read_tools(value: Any) -> list[Any] | None:
    """Read tool schemas: a list of objects or their JSON text; None if there are none.

    Objects lose keys that are null: Arrow adds to each object the keys of all others.

    Raises:
        RowError: bad_tools.
    """
    tools = None if is_absent(value) else _parsed(value)
    if isinstance(tools, list):
        tools = [_without_nulls(_parsed(tool)) for tool in tools]
    if tools is None or (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        return tools or None
    raise RowError("bad_tools", "'tools' must be a list of objects, or such a list as JSON text")


def _number_text(value: float, name: str) -> str:
    if isinstance(value, WrittenFloat):
        return value.text
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        raise RowError("not_text", f"{name!r} is {value}, not text: perhaps it is missing")
    if value.is_integer():
        raise RowError(
            "not_text",
            f"{name!r} is {value}: where a value is missing, a column of whole numbers has 1.0 for 1. Write the column "
            "as text",
        )
    return repr(value)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _parsed(value: Any) -> Any:
    """Parse text that holds a JSON list or object. Other values are returned unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return parse_json(value)
        except (ValueError, RecursionError):
            return value
    return value


def has_turns(value: Any) -> bool:
    """Return whether a value is text such as Human: …, empty line, Assistant: …"""
    if not isinstance(value, str) or not value.lstrip().startswith("Human:"):
        return False
    return "Assistant" in _TURN.findall(value)


def _turns(text: str) -> list[dict[str, str]]:
    _, *parts = _TURN.split(text)
    return [{"from": role.lower(), "value": text.strip()} for role, text in zip(parts[::2], parts[1::2], strict=True)]


def _message_list(value: Any, name: str) -> list[Any]:
    """Return the messages of a value as a list.

    Raises:
        RowError: not_messages.
    """
    value = _parsed(value)
    if has_turns(value):
        return _turns(value)
    if isinstance(value, dict):
        lists = {key: items for key, items in value.items() if isinstance(items, list)}
        if lists.keys() & {"role", "from"} and len({len(items) for items in lists.values()}) == 1:
            return [dict(zip(lists, items, strict=True)) for items in zip(*lists.values(), strict=True)]
    if not isinstance(value, list):
        raise RowError(
            "not_messages", f"{name!r} is {kind_of(value)}, not a list of messages (objects with role and content)"
        )
    if value and all(isinstance(item, dict) and item.keys() == {"human", "assistant"} for item in value):
        return [{"role": role, "content": item[role]} for item in value for role in ("human", "assistant")]
    return value


def _message(value: Any, name: str, ignore: Collection[str]) -> tuple[Message, bool]:
    """Return a message, and whether it may be trained on.

    Raises:
        RowError: not_messages, not_text, unknown_role, tool_call, unsupported_field.
    """
    value = _parsed(value)  # a list of JSON texts, as `datasets` stores messages of many shapes
    role_key, content_key = ("role", "content") if isinstance(value, dict) and "role" in value else ("from", "value")
    if not isinstance(value, dict) or not value.keys() >= {role_key, content_key}:
        raise RowError("not_messages", f"{name!r} is not a message: an object with role and content, or from and value")
    role = value[role_key]
    known = role.lower() if isinstance(role, str) else ""
    if known in _TOOL_ROLES:
        raise RowError("tool_call", f"{name!r} has the role {role!r}: {TOOL_CALLS}")
    if known not in _ROLES:
        raise RowError("unknown_role", f"{name!r} has the role {role!r}; known: {', '.join(_ROLES)}")
    others = value.keys() - {role_key, content_key, *ignore}
    if others:
        _check_fields(value, others, name)
    content = value[content_key]
    if isinstance(content, list):
        content = "".join(_text_parts(content, name))
    message = {"role": _ROLES[known], "content": read_text(content, f"{name}.{content_key}")}
    if not others:
        return message, True
    for key in REASONING_FIELDS:
        if key in others and not is_absent(value[key]):
            message[key] = read_text(value[key], f"{name}.{key}")
    return message, all(_is_trained(key, value[key], name) for key in TRAINING_FLAGS if key in others)


def _check_fields(message: dict[str, Any], fields: Collection[str], name: str) -> None:
    """Refuse a message with a field that must not be dropped.

    Raises:
        RowError: tool_call, unsupported_field.
    """
    for key, why in REFUSED_MESSAGE_FIELDS.items():
        if key in fields and not is_absent(message[key]):
            reason = "tool_call" if key in ("tool_calls", "function_call") else "unsupported_field"
            raise RowError(reason, f"{name!r} has {key!r}: {why}; to ignore it, add it to data.columns.ignore")


def _is_trained(key: str, value: Any, name: str) -> bool:
    if is_absent(value) or is_false(value):
        return is_absent(value)
    if key == "weight" and value != 1:
        raise RowError("unsupported_field", f"{name!r} has the weight {value!r}: only 0 and 1 are supported")
    return True


def _text_parts(parts: list[Any], name: str) -> Iterator[str]:
    for part in parts:
        if not isinstance(part, dict):
            raise RowError("not_text", f"{name!r} has a part that is {kind_of(part)}, not an object with type and text")
        if (kind := part.get("type")) != "text":
            raise RowError("not_text", f"{name!r} has a part of the type {kind!r}, not text")
        yield read_text(part.get("text"), f"{name}.content")
