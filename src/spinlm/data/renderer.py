"""Render conversations, tokenize them, and decode tokens. No other module does any of this.

A conversation is rendered with the chat template and tokenized as one text. The tokens after the prompt's tokens are
the response. So the opponent responds to exactly the tokens that the main player is trained on, and both players see
what every other program with the same chat template sees.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spinlm.errors import ModelError, RowError
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

_REMEDY = "Give another template in data.chat_template (Jinja text, or a file that holds it)"

_FIELD_REMEDY = f"{_REMEDY}, or add the field to data.columns.ignore"

MIN_CHARACTER_LIMIT = 1_000_000  # any text of this length is tokenized quickly
LENGTH_MARGIN = 4  # a tokenizer's normalizer may shorten a text

_QUESTION: Message = {"role": "user", "content": "What color is the sky?"}
_RESPONSE = "It is blue."
_SAMPLES: dict[str, list[Message]] = {
    "a question": [_QUESTION],
    "a system message and a question": [{"role": "system", "content": "Be brief."}, _QUESTION],
    "a second question": [
        _QUESTION,
        {"role": "assistant", "content": _RESPONSE},
        {"role": "user", "content": "Always?"},
    ],
}


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt and its response as token ids."""

    prompt_ids: list[int]
    response_ids: list[int]  # ends with `Renderer.end_id`, unless truncated
    truncated: bool  # prompt and response exceeded `max_length`


class Renderer:
    """Renders with one chat template and tokenizes with one tokenizer.

    `template` is the Jinja text in use. Players are saved with it, so that other programs prompt them in the same way.
    `end_id` ends an assistant turn in training data: the token that the template writes there, or the tokenizer's EOS.
    `stop_ids` end a generated response: `end_id`, the tokenizer's EOS, and the ids passed to the constructor.

    A control token is a special token, a stop token, or an added token that occurs in the template's text (white space
    excepted). A message that contains the text of a control token is refused: its tokens would end or fake a turn.
    Escaping the text would train on tokens that no other program produces from the same text.

    Raises:
        ModelError: the template cannot be read or used, renders a prompt that is no prefix of the finished
            conversation, or writes BOS twice; or nothing ends a turn.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", chat_template: str | None = None, stop_ids: Iterable[int] = ()
    ):
        self._tokenizer = tokenizer
        self.template = _choose_template(tokenizer, chat_template)
        self._special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
        eos_id = tokenizer.eos_token_id
        stops = {*stop_ids} if eos_id is None else {*stop_ids, eos_id}
        tail = self._tail()
        written = self._end_in(tail, stops)
        if written is None and not stops:
            raise ModelError(
                "nothing ends an assistant turn: the chat template writes no special token after a response and the "
                f"tokenizer has no eos_token, so a model could never learn to stop. {_REMEDY}, or a tokenizer with an "
                "eos_token"
            )
        self.end_id: int = next(i for i in (written, eos_id, *sorted(stops)) if i is not None)
        self.stop_ids: tuple[int, ...] = tuple(sorted({*stops, self.end_id}))
        self._text_after_response = tail if written is None else ""  # end_id takes its place

        self.special_ids = frozenset(self._special)
        always = {*self._special, *self.stop_ids}
        control = sorted(text for i, text in self._added.items() if i in always or text in self.template)
        self._control = re.compile("|".join(map(re.escape, control)) or "(?!)")
        # Fast tokenizers search for some added tokens in the normalized text.
        normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
        self._normalize: Callable[[str], str] = normalizer.normalize_str if normalizer else str
        self._longest = max(map(len, tokenizer.get_vocab()))
        self._drops_system = False
        self._check_samples()

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens from which a response to these messages is generated.

        Raises:
            RowError: control_token, template_refused.
        """
        return self._tokenize(self._prompt_text(messages))[0]

    def encode(
        self,
        messages: Sequence[Message],
        response: str,
        max_length: int,
        tools: list[Any] | None = None,
        fields: Message | None = None,
    ) -> Encoded:
        """Tokenize a prompt and its response, together at most `max_length` tokens.

        The response ends with `end_id`, once; the template's text after that token is left out. A response that is too
        long is truncated and does not end with `end_id`.

        Args:
            messages: the prompt.
            response: the text of the response.
            max_length: maximum tokens of both.
            tools: tool schemas for the template, which has to write them.
            fields: other texts of the response, such as reasoning_content, which the template has to write.

        Raises:
            RowError: control_token, template_refused, response_changed, prompt_not_a_prefix, prompt_too_long,
                field_omitted.
        """
        fields = fields or {}
        for text in (response, *fields.values(), *([json.dumps(tools, ensure_ascii=False)] if tools else [])):
            self._refuse_control_tokens(text)
        # A longer text cannot fit into max_length tokens.
        limit = max(MIN_CHARACTER_LIMIT, LENGTH_MARGIN * self._longest * max_length)
        if (characters := sum(len(message["content"]) for message in messages)) > limit:
            raise RowError(
                "prompt_too_long", f"the prompt has {characters} characters, far more than {max_length} tokens"
            )
        response = response[:limit]  # the rest would be truncated as tokens
        prompt = self._prompt_text(messages, tools)
        whole = self._render([*messages, {"role": "assistant", "content": response, **fields}], tools=tools)
        if tools and prompt == self._render(messages, generation_prompt=True):
            raise RowError("field_omitted", f"the chat template omits 'tools'. {_FIELD_REMEDY}")
        if not whole.startswith(prompt):
            raise RowError(
                "prompt_not_a_prefix",
                f"the prompt, which ends in {prompt[-40:]!r}, is not a prefix of the conversation rendered with its "
                "response",
            )
        for name, text in fields.items():
            if text.strip() not in whole[len(prompt) :]:
                raise RowError("field_omitted", f"the chat template omits {name!r} of the response. {_FIELD_REMEDY}")
        if response.strip() not in whole[len(prompt) :]:
            raise RowError("response_changed", "the chat template changes the text of the response")
        prompt_ids, whole_ids = self._tokenize(prompt, whole.removesuffix(self._text_after_response))
        if whole_ids[: len(prompt_ids)] != prompt_ids:
            raise RowError(
                "prompt_not_a_prefix",
                f"a token spans the end of the prompt, {prompt[-10:]!r}, and the beginning of the response, "
                f"{whole[len(prompt) :][:10]!r}; the usual cause is white space there",
            )
        response_ids = whole_ids[len(prompt_ids) :]
        if self.end_id in response_ids:
            del response_ids[response_ids.index(self.end_id) + 1 :]
        else:
            response_ids.append(self.end_id)
        room = max_length - len(prompt_ids)
        if room < 1:
            raise RowError(
                "prompt_too_long",
                f"the prompt has {len(prompt_ids)} tokens; with at most {max_length} there is no room for a response",
            )
        return Encoded(prompt_ids, response_ids[:room], truncated=len(response_ids) > room)

    def decode(self, ids: Iterable[int]) -> str:
        """Return a response as text, without special tokens and stop tokens."""
        kept = [int(i) for i in ids if i not in self._special and i not in self.stop_ids]
        return str(self._tokenizer.decode(kept, clean_up_tokenization_spaces=False))

    def _prompt_text(self, messages: Sequence[Message], tools: list[Any] | None = None) -> str:
        for message in messages:
            for text in message.values():
                self._refuse_control_tokens(text)
            if self._drops_system and message["role"] == "system":
                raise RowError("template_refused", "the chat template omits the system message")
        return self._render(messages, generation_prompt=True, tools=tools)

    def _refuse_control_tokens(self, text: str) -> None:
        if found := self._control.search(text) or self._control.search(self._normalize(text)):
            raise RowError("control_token", f"the text contains the control token {found.group()}")

    def _render(
        self, messages: Sequence[Message], generation_prompt: bool = False, tools: list[Any] | None = None
    ) -> str:
        try:
            rendered = self._tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=generation_prompt,
            )
        except Exception as error:  # a template is a program and may raise anything
            raise RowError("template_refused", f"the chat template refuses the conversation: {error}") from error
        return str(rendered)

    def _tokenize(self, *texts: str) -> list[list[int]]:
        batch = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return list(batch["input_ids"])

    def _tail(self) -> str:
        """Return the text that the template writes after a response."""
        try:
            whole = self._render([_QUESTION, {"role": "assistant", "content": _RESPONSE}])
        except RowError as error:
            raise ModelError(
                f"the chat template fails on one user and one assistant message: {error}. {_REMEDY}"
            ) from error
        _, found, tail = whole.rpartition(_RESPONSE)
        if not found:
            raise ModelError(f"the chat template omits the assistant message. {_REMEDY}")
        return tail

    def _end_in(self, tail: str, stops: set[int]) -> int | None:
        """Return the token that ends a turn: the first stop or special token in this text, or the first added token."""
        ids = self._tokenize(tail)[0]
        written = [i for i in ids if self._added.get(i, "") in tail]  # excludes an <unk> that stands for other text
        strong = [i for i in written if i in stops or i in self._special]
        added = [i for i in written if i in self._added]
        return next(iter(strong + added), None)

    def _check_samples(self) -> None:
        """Check the template before any data is read. Only the first sample has to be supported.

        Raises:
            ModelError: the template cannot be used, or writes BOS twice.
        """
        bos_id = self._tokenizer.bos_token_id
        for name, messages in _SAMPLES.items():
            try:
                encoded = self.encode(messages, _RESPONSE, max_length=1 << 30)
                prompt = self._prompt_text(messages)
            except RowError as error:
                if error.reason == "template_refused" and messages != [_QUESTION]:
                    continue  # rows of this form are refused one by one
                raise ModelError(
                    f"the chat template cannot be used. On {name}: {error}. A training example must begin with exactly "
                    f"the tokens from which responses are generated. {_REMEDY}"
                ) from error
            if bos_id is not None and encoded.prompt_ids[:2] == [bos_id, bos_id]:
                raise ModelError(
                    f"a rendered conversation begins with two BOS tokens: {prompt[:60]!r}. "
                    f"{_REMEDY} that writes {self._tokenizer.bos_token} once"
                )
            if messages[0]["role"] == "system" and messages[0]["content"] not in prompt:
                self._drops_system = True


def _choose_template(tokenizer: "PreTrainedTokenizerBase", given: str | None) -> str:
    if given is None and tokenizer.chat_template:
        try:
            return str(tokenizer.get_chat_template())
        except ValueError as error:  # several templates without a default
            raise ModelError(f"the tokenizer's chat template cannot be used: {error} {_REMEDY}") from error
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
