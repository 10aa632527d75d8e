"""A judge: a language model behind any OpenAI-compatible chat endpoint, and the verdicts in what it writes."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from spinlm.errors import SpinError
from spinlm.evals.mt_bench.prompts import OWN_PROMPTS, JudgePrompt, read_prompts
from spinlm.rundir.records import Message
from spinlm.utils.atomic import short_digest
from spinlm.utils.http import Endpoint, ErrorContext, gather_bounded, open_client, redact, run_async, url_fault

PATH = "/chat/completions"

REMINDER = (
    "Your reply has no decision in the form that was asked for. Write it now and nothing else: what you decided, "
    "inside two pairs of square brackets."
)

Value = TypeVar("Value", float, str)


class JudgeError(SpinError, RuntimeError):
    """A judge cannot be reached, refuses, or is of no use."""


ERRORS = ErrorContext(
    error=JudgeError,
    url_setting="--judge-url",
    model_setting="--judge-model",
    timeout_setting="--judge-timeout",
    key_variables=("SPINLM_JUDGE_KEY", "OPENAI_API_KEY"),
    resume_hint="The verdicts so far are kept: run the same command again to continue",
)


def read_mark(reply: str) -> float | None:
    """The mark, 1 to 10, that a reply gives as [[7]], [[7.5]] or, where there is none such, [7].

    None where it gives none, one out of range, or several that differ.
    """
    reply = _spoken(reply)
    number = r"\s*(\d+(?:\.\d+)?)\s*"
    marks = {float(mark) for mark in re.findall(rf"\[\[{number}\]\]", reply) or re.findall(rf"\[{number}\]", reply)}
    return marks.pop() if len(marks) == 1 and 1 <= min(marks) <= 10 else None


def read_choice(reply: str) -> str | None:
    """A, B or C as a reply gives it in [[A]]; None where it gives none of them, or several."""
    choices = set(re.findall(r"\[\[\s*([ABC])\s*\]\]", _spoken(reply)))
    return choices.pop() if len(choices) == 1 else None


def _spoken(reply: str) -> str:
    """A reply without the thoughts that some models write before it."""
    return reply.rpartition("</think>")[2]


@dataclass(frozen=True)
class Verdict(Generic[Value]):
    """What a judge decided; None where no reply could be read. It is asked a second time where the first could not."""

    value: Value | None
    replies: tuple[str, ...]


@dataclass(frozen=True)
class Judge:
    """A model behind an endpoint, and how it is asked."""

    url: str  # up to /chat/completions
    model: str
    prompts: Mapping[str, JudgePrompt]
    max_tokens: int = 2048  # of a reply
    parallel: int = 4  # requests at once
    timeout: float = 300.0  # seconds until a reply has to be there
    options: Mapping[str, Any] = field(default_factory=dict)  # further fields of a request; None leaves one out

    @classmethod
    def of(cls, url: str | None, model: str | None, prompts: Path | None = None, **how: Any) -> "Judge":
        """A judge from what the command line says; `how` are further fields.

        Raises:
            JudgeError: something is missing or no address.
            DataError: the prompts cannot be used.
        """
        if not url:
            raise JudgeError(
                "no judge: name an OpenAI-compatible endpoint with --judge-url, for example http://127.0.0.1:8000/v1"
            )
        if not model:
            raise JudgeError("no judge: name the model that the endpoint is to use with --judge-model")
        if fault := url_fault(url):
            raise JudgeError(f"--judge-url: {fault}")
        address = url.strip().rstrip("/").removesuffix("/chat/completions")
        return cls(address, model, read_prompts(prompts) if prompts else OWN_PROMPTS, **how)

    @property
    def host(self) -> str:
        """Host and port of the endpoint."""
        return self.url.partition("://")[2].partition("/")[0]

    @property
    def prompts_digest(self) -> str:
        """What stands for the wording of the prompts."""
        return short_digest({name: [prompt.system, prompt.template] for name, prompt in self.prompts.items()})

    def check(self) -> None:
        """Find out, with one short request, whether the endpoint, the key and the model are good.

        Raises:
            JudgeError: they are not.
        """
        question: list[Message] = [{"role": "user", "content": "Are you there?"}]
        replace(self, max_tokens=16).ask([question], lambda reply: 1.0, lambda number, verdict: None)

    def ask(
        self,
        conversations: Sequence[list[Message]],
        read: Callable[[str], Value | None],
        record: Callable[[int, Verdict[Value]], None],
    ) -> None:
        """Have each conversation answered, `parallel` at once.

        Args:
            conversations: what to ask.
            read: finds the decision in a reply. Where it finds none the judge is reminded, once.
            record: called with the number of a conversation and its verdict, as soon as that is there.

        Raises:
            JudgeError: the endpoint cannot be reached, refuses, or does not answer as such an endpoint does.
            StoppedError: the user asked to stop.
        """
        run_async(self._ask(conversations, read, record))

    async def _ask(
        self,
        conversations: Sequence[list[Message]],
        read: Callable[[str], Value | None],
        record: Callable[[int, Verdict[Value]], None],
    ) -> None:
        async with open_client([self.url], self.timeout, self.parallel) as client:
            endpoint = Endpoint([self.url], self.model, client, self.timeout, ERRORS)
            await gather_bounded(
                conversations, lambda messages: self._judge(endpoint, messages, read), record, self.parallel
            )

    async def _judge(
        self, endpoint: Endpoint, messages: list[Message], read: Callable[[str], Value | None]
    ) -> Verdict[Value]:
        first = await self._reply(endpoint, messages)
        if (value := read(first)) is not None:
            return Verdict(value, (first,))
        reminded = [*messages, {"role": "assistant", "content": first}, {"role": "user", "content": REMINDER}]
        second = await self._reply(endpoint, reminded)
        return Verdict(read(second), (first, second))

    async def _reply(self, endpoint: Endpoint, messages: list[Message]) -> str:
        """What the model says to a conversation."""
        asked = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": self.max_tokens}
        body = {name: value for name, value in (asked | dict(self.options)).items() if value is not None}
        content = await endpoint.request(
            PATH, body, lambda reply: reply["choices"][0]["message"]["content"], "choices[0].message.content"
        )
        return redact(content, ERRORS) if isinstance(content, str) else ""


def read_options(text: str | None) -> dict[str, Any]:
    """Further fields of a request, from a JSON object.

    Raises:
        JudgeError: it is none, or names what has a place of its own.
    """
    if not text:
        return {}
    try:
        options = json.loads(text)
    except ValueError as error:
        raise JudgeError(f"--judge-options: not JSON ({error}). Write it like '{{\"seed\": 1}}'") from error
    if not isinstance(options, dict) or options.keys() & {"model", "messages", "stream", "n"}:
        raise JudgeError("--judge-options: write a JSON object, without model, messages, stream or n")
    return options
