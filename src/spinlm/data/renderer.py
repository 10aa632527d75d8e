"""The only place that renders conversations, turns them into tokens, and turns tokens back into text.

A conversation is rendered with the chat template and tokenised as one text; the response is what follows the prompt's
tokens. So the opponent answers exactly the tokens that the main player is trained on, and what both see is what every
other program that uses the model's chat template sees.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spinlm.errors import ModelError, shortened
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
{{ raise_exception('this template knows the roles system, user and assistant') }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '### Assistant:\n' }}
{%- endif -%}
"""
"""For a tokenizer that has no template. Where the tokenizer puts BOS before plain text, BOS is written first."""

_REMEDY = "Give another template in data.chat_template (Jinja text, or a file that holds it)"

QUICK = 1_000_000  # characters that are soon tokens, however they come
TIMES_TOO_LONG = 4  # a tokeniser may shorten text before it makes tokens of it

_QUESTION: Message = {"role": "user", "content": "What colour is the sky?"}
_ANSWER = "It is blue."
_SAMPLES: dict[str, list[Message]] = {
    "a question": [_QUESTION],
    "a system message and a question": [{"role": "system", "content": "Be brief."}, _QUESTION],
    "a second question": [_QUESTION, {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": "Always?"}],
}


class RowError(Exception):
    """One row cannot be used; the rest of the data can. `reason` is a snake_case name to count it under."""

    def __init__(self, reason: str, detail: str):
        super().__init__(shortened(detail))
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt and its response as token ids."""

    prompt_ids: list[int]
    response_ids: list[int]  # ends with `Renderer.end_id`, unless it was cut
    cut: bool  # longer than the room it had


class Renderer:
    """Renders with one chat template and tokenises with one tokenizer.

    `template` is the Jinja text in use; a player that is saved with it is prompted elsewhere as it was here.
    `end_id` ends an assistant turn in training data: the token the template writes there, else the tokenizer's eos.
    `stop_ids` end a generated response: `end_id`, the tokenizer's eos, and those given.

    A control token is a special token, one that stops, or an added token in the template's text (white space excepted).
    A message that spells one is refused: tokenised, it would end or fake a turn, and escaping it would train on tokens
    that no other program makes of the same text.

    Raises:
        ModelError: the template cannot be read or used, does not begin a finished conversation with the prompt it
            generates from, or writes BOS twice; or nothing ends a turn.
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
                "nothing ends an assistant turn: the chat template writes no special token after an answer and the "
                f"tokenizer has no eos_token, so a model could never learn to stop. {_REMEDY}, or a tokenizer with an "
                "eos_token"
            )
        self.end_id: int = next(i for i in (written, eos_id, *sorted(stops)) if i is not None)
        self.stop_ids: tuple[int, ...] = tuple(sorted({*stops, self.end_id}))
        self._text_after_answer = tail if written is None else ""  # end_id takes its place

        self.special_ids = frozenset(self._special)
        always = {*self._special, *self.stop_ids}
        control = sorted(text for i, text in self._added.items() if i in always or text in self.template)
        self._control = re.compile("|".join(map(re.escape, control)) or "(?!)")
        # Tokenisers of the Rust kind look for some added tokens in the text as they have normalised it.
        normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
        self._normalize: Callable[[str], str] = normalizer.normalize_str if normalizer else str
        self._longest = max(map(len, tokenizer.get_vocab()))
        self._drops_system = False
        self._check_samples()

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The tokens a response to these messages is generated from.

        Raises:
            RowError: control_token, template_refused.
        """
        return self._tokenize(self._prompt_text(messages))[0]

    def encode(self, messages: Sequence[Message], response: str, max_length: int) -> Encoded:
        """Tokens of a prompt and of the response to it, together at most `max_length`.

        The response ends with `end_id`, once; what the template writes after it is left out. A response that does not
        fit is cut and not given an end.

        Raises:
            RowError: control_token, template_refused, response_changed, prompt_not_a_prefix, prompt_too_long.
        """
        self._refuse_control_tokens(response)
        most = max(QUICK, TIMES_TOO_LONG * self._longest * max_length)  # characters: with more it surely is too long
        if (signs := sum(len(message["content"]) for message in messages)) > most:
            raise RowError("prompt_too_long", f"the prompt has {signs} characters, far more than {max_length} tokens")
        response = response[:most]  # what is left out would be cut
        prompt = self._prompt_text(messages)
        whole = self._render([*messages, {"role": "assistant", "content": response}])
        if not whole.startswith(prompt):
            raise RowError(
                "prompt_not_a_prefix",
                f"rendered with its response, the conversation does not begin with the prompt, which ends in "
                f"{prompt[-40:]!r}",
            )
        if response.strip() not in whole[len(prompt) :]:
            raise RowError("response_changed", "the chat template does not write the response as it stands in the data")
        prompt_ids, whole_ids = self._tokenize(prompt, whole.removesuffix(self._text_after_answer))
        if whole_ids[: len(prompt_ids)] != prompt_ids:
            raise RowError(
                "prompt_not_a_prefix",
                f"the tokenizer joins the end of the prompt, {prompt[-10:]!r}, with the beginning of the response, "
                f"{whole[len(prompt) :][:10]!r}; white space there is the usual cause",
            )
        response_ids = whole_ids[len(prompt_ids) :]
        if self.end_id in response_ids:
            del response_ids[response_ids.index(self.end_id) + 1 :]
        else:
            response_ids.append(self.end_id)
        room = max_length - len(prompt_ids)
        if room < 1:
            raise RowError(
                "prompt_too_long", f"the prompt has {len(prompt_ids)} tokens, which leaves no room within {max_length}"
            )
        return Encoded(prompt_ids, response_ids[:room], cut=len(response_ids) > room)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of a response, without special tokens and without the tokens that end it."""
        kept = [int(i) for i in ids if i not in self._special and i not in self.stop_ids]
        return str(self._tokenizer.decode(kept, clean_up_tokenization_spaces=False))

    def as_text(self, prompt_ids: Sequence[int]) -> tuple[str, bool]:
        """A prompt as text, for a program that tokenises it itself, with the special tokens that the tokenizer adds by
        default; and whether the same tokens come of it."""
        text = self._raw(prompt_ids)
        for candidate in (text, text.removeprefix(self._tokenizer.bos_token or "")):
            if list(self._tokenizer(candidate, verbose=False)["input_ids"]) == list(prompt_ids):
                return candidate, True
        return text, False

    def continuation_ids(self, prompt_ids: Sequence[int], text: str) -> list[int]:
        """Tokens of a text that continues a prompt, as training would have them."""
        whole = self._tokenize(self._raw(prompt_ids) + text)[0]
        count = len(prompt_ids)
        return whole[count:] if whole[:count] == list(prompt_ids) else self._tokenize(text)[0]

    def _raw(self, ids: Sequence[int]) -> str:
        """Text of tokens, special ones and all."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _prompt_text(self, messages: Sequence[Message]) -> str:
        for message in messages:
            self._refuse_control_tokens(message["content"])
            if self._drops_system and message["role"] == "system":
                raise RowError("template_refused", "the chat template leaves the system message out")
        return self._render(messages, generation_prompt=True)

    def _refuse_control_tokens(self, text: str) -> None:
        if found := self._control.search(text) or self._control.search(self._normalize(text)):
            raise RowError("control_token", f"the text contains the control token {found.group()}")

    def _render(self, messages: Sequence[Message], generation_prompt: bool = False) -> str:
        try:
            rendered = self._tokenizer.apply_chat_template(
                list(messages), chat_template=self.template, tokenize=False, add_generation_prompt=generation_prompt
            )
        except Exception as error:  # a template is a program: anything may come out of it
            raise RowError("template_refused", f"the chat template refuses the conversation: {error}") from error
        return str(rendered)

    def _tokenize(self, *texts: str) -> list[list[int]]:
        batch = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return list(batch["input_ids"])

    def _tail(self) -> str:
        """What the template writes after an answer."""
        try:
            whole = self._render([_QUESTION, {"role": "assistant", "content": _ANSWER}])
        except RowError as error:
            raise ModelError(f"the chat template fails on a plain question and answer: {error}. {_REMEDY}") from error
        _, found, tail = whole.rpartition(_ANSWER)
        if not found:
            raise ModelError(f"the chat template leaves out what the assistant says. {_REMEDY}")
        return tail

    def _end_in(self, tail: str, stops: set[int]) -> int | None:
        """The token in this text that ends a turn: the first that stops or is special, else the first added one."""
        ids = self._tokenize(tail)[0]
        written = [i for i in ids if self._added.get(i, "") in tail]  # not an <unk> for some other text
        strong = [i for i in written if i in stops or i in self._special]
        added = [i for i in written if i in self._added]
        return next(iter(strong + added), None)

    def _check_samples(self) -> None:
        """Hold the template to its promises before any data is read. Only the first sample has to be supported."""
        bos_id = self._tokenizer.bos_token_id
        for name, messages in _SAMPLES.items():
            try:
                encoded = self.encode(messages, _ANSWER, max_length=1 << 30)
                prompt = self._prompt_text(messages)
            except RowError as error:
                if error.reason == "template_refused" and messages != [_QUESTION]:
                    continue  # rows that need it are refused one by one
                raise ModelError(
                    f"the chat template cannot be used. On {name}: {error}. Training must continue exactly the tokens "
                    f"that generation starts from, or the model learns from prompts it never sees. {_REMEDY}"
                ) from error
            if bos_id is not None and encoded.prompt_ids[:2] == [bos_id, bos_id]:
                raise ModelError(
                    f"a rendered conversation begins with BOS twice, which no model is trained on: {prompt[:60]!r}. "
                    f"{_REMEDY} that writes {self._tokenizer.bos_token} once"
                )
            if messages[0]["role"] == "system" and messages[0]["content"] not in prompt:
                self._drops_system = True


def _choose_template(tokenizer: "PreTrainedTokenizerBase", given: str | None) -> str:
    if given is None and tokenizer.chat_template:
        try:
            return str(tokenizer.get_chat_template())
        except ValueError as error:  # several, none of them the default
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
            f"data.chat_template: {given} is neither Jinja text nor a text file that can be read ({error})"
        ) from error
