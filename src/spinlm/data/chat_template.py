"""The chat template of a run: choose it, set its variables, and render conversations as text."""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spinlm.errors import ModelError, RecipeError, RowError, first_line, shortened
from spinlm.rundir.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{{ message['content'] + '\n\n' }}
{%- elif message['role'] == 'user' -%}
{{ '### User:\n' + message['content'] + '\n\n' }}
{%- elif message['role'] == 'assistant' -%}
{{ '### Assistant:\n' + message['content'] }}{{ eos_token }}{{ '\n\n' }}
{%- else -%}
{{ raise_exception('this template supports the roles system, user and assistant') }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '### Assistant:\n' }}
{%- endif -%}
"""
"""For a tokenizer without a template. BOS is added in front if the tokenizer adds BOS to plain text."""

REMEDY = "Give another template in data.chat_template (Jinja text, or a file that holds it)"
FIELD_REMEDY = f"{REMEDY}, or add the field to data.columns.ignore"
_FOLD = "Set data.system: fold to put it into the user's message"

_ARGUMENTS = ("messages", "tools", "add_generation_prompt", "continue_final_message")  # of every rendering


class ChatTemplate:
    """Renders conversations as text.

    `text` is the Jinja template in use. `system_fault` says what the template does to a system message instead of
    rendering it; empty if it renders system messages.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        given: str | None = None,
        variables: Mapping[str, Any] | None = None,
        *,
        fold_system: bool = False,
    ):
        """Choose the template, and set its variables at its head.

        Args:
            tokenizer: its template is the default.
            given: `data.chat_template`: Jinja text or a file; it replaces the tokenizer's own.
            variables: `data.chat_template_kwargs`.
            fold_system: whether `data.system` is `fold`.

        Raises:
            ModelError: there is no such file, or the tokenizer has several templates and no default.
            RecipeError: the template has no such variable.
        """
        self._tokenizer = tokenizer
        self.text = _set_variables(_template(tokenizer, given), variables or {})
        self.fold_system = fold_system
        self.system_fault = ""

    def place_system(self, messages: Sequence[Message]) -> list[Message]:
        """Return the messages with system messages where the template renders them; examples are stored so.

        With `data.system: fold`, the text of a system message goes to the head of the user's next message. An empty
        system message is left out if the template does not render system messages.
        """
        if not self.fold_system and not self.system_fault:
            return [*messages]
        placed: list[Message] = []
        folded: list[Message] = []
        for message in messages:
            if message["role"] == "system" and not message["content"].strip():
                continue
            if message["role"] == "system" and self.fold_system:
                folded.append(message)
                continue
            if message["role"] == "user" and folded:
                texts = [part["content"] for part in (*folded, message)]
                message, folded = {**message, "content": "\n\n".join(texts)}, []
            placed.append(message)
        return placed + folded

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        *,
        generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """Render a conversation.

        Raises:
            RowError: template_refused.
        """
        has_system = any(message["role"] == "system" for message in messages)
        if has_system and self.system_fault == "omits":
            raise RowError("template_refused", f"the chat template omits the system message. {_FOLD}")
        try:
            rendered = self._tokenizer.apply_chat_template(
                list(messages),
                tools=None if tools is None else list(tools),
                chat_template=self.text,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **variables,
            )
        except Exception as error:  # a template is a program and may raise anything
            reason = f"the chat template refuses the conversation: {first_line(error)}"
            if has_system and self.system_fault:
                reason = f"the chat template refuses the system message: {shortened(first_line(error), 80)}. {_FOLD}"
            raise RowError("template_refused", reason) from error
        return str(rendered)

    def try_render(self, messages: Sequence[Message], **options: Any) -> str:
        """Render a conversation; return an empty text if the template refuses it."""
        try:
            return self.render(messages, **options)
        except RowError:
            return ""

    def explain_difference(self, messages: Sequence[Message], prompt: str, whole: str) -> str:
        """Say where a rendered prompt differs from the finished conversation, and the cause if it is known."""
        same = shared_length(prompt, whole)
        ends = [text[max(0, same - 3) :][:12] for text in (prompt, whole)]
        cause = ""
        if self.system_fault and any(message["role"] == "system" for message in messages):
            cause = f". The template moves or omits the system message. {_FOLD}"
        elif any("think" in text for text in ends):
            cause = ". The template renders reasoning differently there"
            if "enable_thinking" in self.text and "set enable_thinking" not in self.text:
                cause += ": try data.chat_template_kwargs: {enable_thinking: false}"
        return (
            f"the prompt is not a prefix of the finished conversation, which has {whole[same:][:24]!r} and not "
            f"{prompt[same:][:24]!r}{cause}"
        )


def shared_length(a: str, b: str) -> int:
    """Return the number of characters at the beginning of two texts that are equal."""
    return next((i for i, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))


def _set_variables(template: str, variables: Mapping[str, Any]) -> str:
    """Return a template with a line at its head that sets each variable.

    The lines make the template the whole record: programs that load a player prompt it in the same way, without
    arguments.
    """
    head, names = "", _names_in(template) if variables else set()
    for name, value in variables.items():
        if name in _ARGUMENTS or name not in names:
            raise RecipeError(
                f"data.chat_template_kwargs.{name}: the chat template has no variable of that name, or spinlm sets it"
            )
        line = rf"\{{%- set {name} = .* %\}}\n"  # the model may be a player of a run that set the variable
        template = re.sub(rf"\A((?:\{{%- set \w+ = .* %\}}\n)*?){line}", r"\1", template)
        head += f"{{%- set {name} = {value!r} %}}\n"  # Jinja reads these literals of Python; it drops the line break
    return head + template


def _names_in(template: str) -> set[str]:
    """Return the names in a template's code. Texts, comments and attributes do not count."""
    from jinja2 import Environment, TemplateSyntaxError

    try:
        tokens = [(kind, text) for _, kind, text in Environment().lex(template) if kind != "whitespace"]
    except TemplateSyntaxError:  # rendering explains it
        return {*re.findall(r"\w+", template)}
    return {text for (_, before), (kind, text) in pairwise([("", ""), *tokens]) if kind == "name" and before != "."}


def _template(tokenizer: "PreTrainedTokenizerBase", given: str | None) -> str:
    if given is None and tokenizer.chat_template:
        try:
            return str(tokenizer.get_chat_template())
        except ValueError as error:  # several templates without a default
            raise ModelError(f"the tokenizer's chat template cannot be used: {error} {REMEDY}") from error
    if given is None:
        bos_id = tokenizer.bos_token_id
        adds_bos = bos_id is not None and tokenizer("a")["input_ids"][:1] == [bos_id]
        return ("{{ bos_token }}" if adds_bos else "") + DEFAULT_TEMPLATE
    if "{" in given or "\n" in given:
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"data.chat_template: {given} is neither Jinja text nor a readable text file ({error})"
        ) from error


def all_texts(value: Any) -> Iterator[str]:
    """Yield every text in a message or in definitions of tools, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key != "role":
                yield key
                yield from all_texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from all_texts(item)


def check_body(answer: Message, fields: Message, body: str) -> None:
    """Check that the rendered response has all texts of the message; white space may differ.

    Raises:
        RowError: field_omitted, response_changed.
    """
    rendered = _squeezed(body)
    for name, text in fields.items():
        if _squeezed(text) not in rendered:
            raise RowError("field_omitted", f"the chat template omits {name!r} of the response. {FIELD_REMEDY}")
    if _squeezed(answer["content"]) not in rendered:
        texts = [shortened(repr(text), 50) for text in (answer["content"], body)]
        raise RowError("response_changed", f"the chat template changes the response {texts[0]} to {texts[1]}. {REMEDY}")


def _squeezed(text: str) -> str:
    return "".join(text.split())
