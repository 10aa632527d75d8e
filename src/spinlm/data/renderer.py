"""Render conversations, tokenize them, and decode tokens. No other module does any of this.

A conversation is rendered with the chat template and tokenized as one text. The tokens after the prompt's tokens are
the response. So the opponent responds to exactly the tokens that the main player is trained on, and both players see
what every other program with the same chat template sees.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from spinlm.data.chat_template import FIELD_REMEDY, REMEDY, ChatTemplate, all_texts, check_body, shared_length
from spinlm.errors import ModelError, RowError
from spinlm.rundir.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINK, END_OF_THINK = "<think>", "</think>"
"""Markers around the reasoning of a response. They end no turn, so a response may contain them."""

MIN_CHARACTER_LIMIT = 1_000_000  # any text of this length is tokenized quickly
LENGTH_MARGIN = 4  # a tokenizer's normalizer may shorten a text

_QUESTION: Message = {"role": "user", "content": "What color is the sky?"}
_RESPONSE = "It is blue."
_ANSWER: Message = {"role": "assistant", "content": _RESPONSE}
_SAMPLES: dict[str, list[Message]] = {
    "a question": [_QUESTION],
    "a system message and a question": [{"role": "system", "content": "Be brief."}, _QUESTION],
    "a second question": [_QUESTION, _ANSWER, {"role": "user", "content": "Always?"}],
}
_RESPONSE_FIELDS: tuple[Message, ...] = (
    {},
    {"reasoning_content": "Look up."},
    {"tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"where": "up"}}}]},
)
"""Fields of an assistant message, for which a template may write markers."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt and its response as token ids."""

    prompt_ids: list[int]
    response_ids: list[int]  # ends with `Renderer.end_id`, unless truncated
    truncated: bool  # prompt and response exceeded `max_length`
    text: str  # of the whole response, as `Renderer.decode` gives it
    rendered: str  # the same, with what the template writes around a response, and an open `<think>` of the prompt


class Renderer:
    """Renders with one chat template and tokenizes with one tokenizer.

    `template` is the Jinja text in use. Players are saved with it, so that other programs prompt them in the same way.
    `end_id` ends an assistant turn in training data: the token that the template writes there, or the tokenizer's EOS.
    `stop_ids` end a generated response: `end_id`, the tokenizer's EOS, and the ids passed to the constructor.

    A control token is a special token, a stop token, or an added token that occurs in the template's text (white space
    excepted). A message that contains the text of a control token is refused: its tokens would end or fake a turn.
    Escaping the text would train on tokens that no other program produces from the same text. An assistant's message
    may contain the markers that the template itself writes into assistant messages only, and `<think>`, `</think>`.

    Raises:
        ModelError: the template cannot be read or used, renders a prompt that is no prefix of the finished
            conversation, or writes BOS twice; or nothing ends a turn.
        RecipeError: the template has no variable of a name in `variables`.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        chat_template: str | None = None,
        stop_ids: Iterable[int] = (),
        *,
        variables: Mapping[str, Any] | None = None,
        fold_system: bool = False,
    ):
        self._tokenizer = tokenizer
        self._chat = ChatTemplate(tokenizer, chat_template, variables, fold_system=fold_system)
        self.template = self._chat.text
        self.place_system = self._chat.place_system
        self._special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
        eos_id = tokenizer.eos_token_id
        stops = {*stop_ids} if eos_id is None else {*stop_ids, eos_id}
        tail = self._tail()
        written = self._end_in(tail, stops)
        if written is None and not stops:
            raise ModelError(
                "nothing ends an assistant turn: the chat template writes no special token after a response and the "
                f"tokenizer has no eos_token, so a model could never learn to stop. {REMEDY}, or a tokenizer with an "
                "eos_token"
            )
        self.end_id: int = next(i for i in (written, eos_id, *sorted(stops)) if i is not None)
        self.stop_ids: tuple[int, ...] = tuple(sorted({*stops, self.end_id}))
        self._text_after_response = tail if written is None else ""  # end_id takes its place

        markers = self._response_markers()
        self.special_ids = frozenset(self._special.keys() - markers)
        always = {*self._special, *self.stop_ids}
        control = {i: text for i, text in self._added.items() if i in always or text in self.template}
        self._control = _any_of(control.values())
        self._response_control = _any_of(text for i, text in control.items() if i not in markers)
        self._template_markers = {text for i, text in control.items() if i not in always}
        # Fast tokenizers search for some added tokens in the normalized text.
        normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
        self._normalize: Callable[[str], str] = normalizer.normalize_str if normalizer else str
        self._longest = max(map(len, tokenizer.get_vocab()))
        self._opening = self._closing = ""  # text that the template writes before and after a response
        self._opening_token: int | None = None  # the added token that the opening begins with
        self._check_samples()

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> list[int]:
        """Return the tokens from which a response to these messages is generated.

        Raises:
            RowError: control_token, template_refused.
        """
        return self._tokenize(self._prompt_text(self.place_system(messages), tools))[0]

    def encode(
        self,
        messages: Sequence[Message],
        response: str,
        max_length: int,
        tools: Sequence[Any] | None = None,
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
        answer = {"role": "assistant", "content": response, **(fields or {})}
        self._refuse_control_tokens(answer)
        # A longer text cannot fit into max_length tokens.
        limit = max(MIN_CHARACTER_LIMIT, LENGTH_MARGIN * self._longest * max_length)
        if (characters := sum(len(message["content"]) for message in messages)) > limit:
            raise RowError(
                "prompt_too_long", f"the prompt has {characters} characters, far more than {max_length} tokens"
            )
        answer["content"] = response[:limit]  # the rest would be truncated as tokens
        messages = self.place_system(messages)
        prompt = self._prompt_text(messages, tools)
        whole = self._chat.render([*messages, answer], tools)
        if tools and prompt == self._chat.render(messages, generation_prompt=True):
            raise RowError("field_omitted", f"the chat template omits 'tools'. {FIELD_REMEDY}")
        if not whole.startswith(prompt):
            raise RowError("prompt_not_a_prefix", self._chat.explain_difference(messages, prompt, whole))
        body = whole[len(prompt) :]
        opened = prompt[prompt.rfind(THINK) :] if prompt.rstrip().endswith(THINK) else ""
        check_body(answer, fields or {}, opened + body)
        cause = "a response that has no reasoning" if opened and THINK not in response else "white space there"
        prompt_ids, response_ids = self._split(prompt, whole, cause)
        room = max_length - len(prompt_ids)
        if room < 1:
            raise RowError(
                "prompt_too_long",
                f"the prompt has {len(prompt_ids)} tokens; with at most {max_length} there is no room for a response",
            )
        return Encoded(
            prompt_ids,
            response_ids[:room],
            truncated=len(response_ids) > room,
            text=self.decode(response_ids),
            rendered=opened + self._visible(response_ids),
        )

    def _split(self, prompt: str, whole: str, cause: str) -> tuple[list[int], list[int]]:
        """Tokenize a rendered conversation that begins with this prompt; return the prompt and the response.

        Raises:
            RowError: prompt_not_a_prefix, with its usual cause.
        """
        prompt_ids, whole_ids = self._tokenize(prompt, whole.removesuffix(self._text_after_response))
        if whole_ids[: len(prompt_ids)] != prompt_ids:
            raise RowError(
                "prompt_not_a_prefix",
                f"a token spans the end of the prompt, {prompt[-10:]!r}, and the beginning of the response, "
                f"{whole[len(prompt) :][:10]!r}; the usual cause is {cause}",
            )
        response_ids = whole_ids[len(prompt_ids) :]
        if self.end_id in response_ids:
            del response_ids[response_ids.index(self.end_id) + 1 :]
        else:
            response_ids.append(self.end_id)
        return prompt_ids, response_ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return a response as text: the content of an assistant message that the template renders to these tokens.

        Special tokens, stop tokens, and the text that the template writes around every response are left out, for real
        and synthetic responses alike.
        """
        text = self._visible(ids)
        if self._opening_token is None or [*ids[:1]] == [self._opening_token]:
            if self._opening.startswith(text):  # the first tokens of a response that is being generated
                return ""
            text = text.removeprefix(self._opening)
        return text.removesuffix(self._closing)

    def _visible(self, ids: Iterable[int]) -> str:
        kept = [int(i) for i in ids if i not in self.special_ids and i not in self.stop_ids]
        return str(self._tokenizer.decode(kept, clean_up_tokenization_spaces=False))

    def _prompt_text(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> str:
        for message in ({"role": "system", "tools": tools}, *messages):
            self._refuse_control_tokens(message)
        return self._chat.render(messages, tools, generation_prompt=True)

    def _refuse_control_tokens(self, message: Message) -> None:
        is_response = message["role"] == "assistant"
        control = self._response_control if is_response else self._control
        for text in all_texts(message):
            if found := control.search(text) or control.search(self._normalize(text)):
                marker = found.group() in self._template_markers
                remedy = (
                    "In a template without it (data.chat_template) it is ordinary text"
                    if marker
                    else "Remove it, or give a template in data.chat_template that writes it into responses"
                    if is_response
                    else "Remove it"
                )
                raise RowError("control_token", f"the text contains the control token {found.group()}. {remedy}")

    def _tokenize(self, *texts: str) -> list[list[int]]:
        batch = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return list(batch["input_ids"])

    def _tail(self) -> str:
        """Return the text that the template writes after a response."""
        try:
            whole = self._chat.render([_QUESTION, _ANSWER])
        except RowError as error:
            raise ModelError(
                f"the chat template fails on one user and one assistant message: {error}. {REMEDY}"
            ) from error
        _, found, tail = whole.rpartition(_RESPONSE)
        if not found:
            raise ModelError(f"the chat template omits the assistant message. {REMEDY}")
        return tail

    def _end_in(self, tail: str, stops: set[int]) -> int | None:
        """Return the token that ends a turn: the first stop or special token in this text, or the first added token."""
        ids = self._tokenize(tail)[0]
        written = [i for i in ids if self._added.get(i, "") in tail]  # excludes an <unk> that stands for other text
        strong = [i for i in written if i in stops or i in self._special]
        added = [i for i in written if i in self._added]
        return next(iter(strong + added), None)

    def _response_markers(self) -> set[int]:
        """Return the added tokens that may occur in a response: they neither end nor begin a turn.

        These are `<think>`, `</think>`, and tokens that the template writes into a finished assistant message (around
        its reasoning, tool calls or content) and into no other one.
        """
        think = {i for i, text in self._added.items() if text in (THINK, END_OF_THINK)}
        markers: set[int] = set()
        questions = [messages for messages in _SAMPLES.values() if _ANSWER not in messages]
        turns = set(self._tokenize("".join(map(self._chat.try_render, questions)))[0])
        for fields in _RESPONSE_FIELDS:
            for variables in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
                prompt = self._chat.try_render([_QUESTION], generation_prompt=True, **variables)
                if prompt == self._chat.try_render([_QUESTION], **variables):
                    continue  # the tokens that begin a turn cannot be told from markers
                whole = self._chat.try_render([_QUESTION, _ANSWER | fields], **variables)
                body = whole[shared_length(prompt, whole) :]
                markers.update(takewhile(lambda i: i not in self.stop_ids, self._tokenize(body)[0]))
        return {i for i in (markers - turns | think) - {*self.stop_ids} if i in self._added}

    def _check_samples(self) -> None:
        """Check the template before any data is read. A system message does not have to be supported.

        Raises:
            ModelError: the template cannot be used, or writes BOS twice.
        """
        bos_id = self._tokenizer.bos_token_id
        for name, messages in _SAMPLES.items():
            placed = self.place_system(messages)
            try:
                response = self._sample_response(placed)
                encoded = self.encode(placed, response, max_length=1 << 30)
                prompt = self._prompt_text(placed)
            except RowError as error:
                if placed[0]["role"] == "system":
                    self._chat.system_fault = "refuses"
                elif error.reason != "template_refused" or messages == [_QUESTION]:
                    raise ModelError(
                        f"the chat template cannot be used. On {name}: {error}. A training example must begin with "
                        f"exactly the tokens from which responses are generated. {REMEDY}"
                    ) from error
                continue  # rows of this form are refused one by one
            if bos_id is not None and encoded.prompt_ids[:2] == [bos_id, bos_id]:
                raise ModelError(
                    f"a rendered conversation begins with two BOS tokens: {prompt[:60]!r}. "
                    f"{REMEDY} that writes {self._tokenizer.bos_token} once"
                )
            if messages[0]["role"] == "system" and messages[0]["content"] not in prompt:
                self._chat.system_fault = "omits"
            if messages == [_QUESTION] and response == _RESPONSE:
                self._set_frame(encoded)

    def _sample_response(self, messages: Sequence[Message]) -> str:
        """Return a response with reasoning if the template opens the reasoning in the prompt, else one without."""
        prompt = self._prompt_text(messages)
        whole = self._chat.try_render([*messages, _ANSWER])
        opens = prompt.rstrip().endswith(THINK) and whole.startswith(prompt)
        return f"{THINK}\nLook up.\n{END_OF_THINK}\n\n{_RESPONSE}" if opens else _RESPONSE

    def _set_frame(self, encoded: Encoded) -> None:
        """Record the text that the template writes before and after the response of a sample."""
        before, found, after = self._visible(encoded.response_ids).partition(_RESPONSE)
        if found:
            self._opening, self._closing = before, after
            first = encoded.response_ids[0]
            self._opening_token = first if before and first in self._added else None


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(texts))) or "(?!)")
