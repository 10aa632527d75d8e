"""A judge: a language model behind any OpenAI-compatible chat endpoint, and the verdicts in what it writes.

The endpoint's key is read from the environment when requests are sent. It is in no object that is kept or printed, and
is taken out of whatever the endpoint sends back.
"""

import asyncio
import json
import os
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from spinlm.errors import SpinError
from spinlm.evals.mt_bench.prompts import OWN_PROMPTS, JudgePrompt, read_prompts
from spinlm.files import short_digest
from spinlm.interrupt import stop_if_asked
from spinlm.records import Message

if TYPE_CHECKING:
    import httpx

KEYS = ("SPINLM_JUDGE_KEY", "OPENAI_API_KEY")
ATTEMPTS = 5
BACKOFF = 1.0  # seconds before the second attempt, doubled for each that follows
LONGEST_CONNECT = 20.0  # seconds until a connection has to stand
LONGEST_WAIT = 300.0  # seconds an endpoint may ask us to wait

GOES_ON = "The verdicts so far are kept: run the same command again to go on"

REMINDER = (
    "Your reply has no decision in the form that was asked for. Write it now and nothing else: what you decided, "
    "inside two pairs of square brackets."
)

Value = TypeVar("Value", float, str)


class JudgeError(SpinError, RuntimeError):
    """A judge cannot be reached, refuses, or is of no use."""


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
        import httpx

        if not url:
            raise JudgeError(
                "no judge: name an OpenAI-compatible endpoint with --judge-url, for example http://127.0.0.1:8000/v1"
            )
        if not model:
            raise JudgeError("no judge: name the model that the endpoint is to use with --judge-model")
        try:
            parsed = httpx.URL(url.strip())
        except httpx.InvalidURL as error:
            raise JudgeError(f"--judge-url: not an address ({error})") from error
        if parsed.userinfo or parsed.query or parsed.fragment:
            raise JudgeError(
                f"--judge-url: write the address without a password, ? or #. The key goes into {KEYS[0]} in the "
                "environment"
            )
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise JudgeError(f"--judge-url: {url} is not an address that begins with http:// or https:// and a host")
        address = str(parsed).rstrip("/").removesuffix("/chat/completions")
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
        asyncio.run(self._ask(conversations, read, record))

    async def _ask(
        self,
        conversations: Sequence[list[Message]],
        read: Callable[[str], Value | None],
        record: Callable[[int, Verdict[Value]], None],
    ) -> None:
        import httpx

        key = _key()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        waiting = deque(enumerate(conversations))
        running: dict[asyncio.Task[Verdict[Value]], int] = {}
        timeout = httpx.Timeout(self.timeout, connect=min(self.timeout, LONGEST_CONNECT))
        async with httpx.AsyncClient(timeout=timeout, headers=headers) as client:
            endpoint = _Endpoint(self, client, key)
            try:
                while waiting or running:
                    stop_if_asked()
                    while waiting and len(running) < self.parallel:
                        number, messages = waiting.popleft()
                        running[asyncio.create_task(_judge(endpoint, messages, read))] = number
                    done, _ = await asyncio.wait(running, timeout=0.2, return_when=asyncio.FIRST_COMPLETED)
                    # What was answered is recorded before what failed ends all this.
                    for task in sorted(done, key=lambda task: task.exception() is not None):
                        record(running.pop(task), task.result())
            finally:
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)


async def _judge(endpoint: "_Endpoint", messages: list[Message], read: Callable[[str], Value | None]) -> Verdict[Value]:
    first = await endpoint.reply(messages)
    if (value := read(first)) is not None:
        return Verdict(value, (first,))
    reminded = [*messages, {"role": "assistant", "content": first}, {"role": "user", "content": REMINDER}]
    second = await endpoint.reply(reminded)
    return Verdict(read(second), (first, second))


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


def _key() -> str:
    """The endpoint's key; empty where there is none."""
    for name in KEYS:
        key = os.environ.get(name, "").strip()
        if key:
            if not (key.isascii() and key.isprintable()):
                raise JudgeError(f"{name}: holds characters that no key has. Set it again")
            return key
    return ""


class _Endpoint:
    """Sends requests, again where that may help, and says in words what went wrong."""

    def __init__(self, judge: Judge, client: "httpx.AsyncClient", key: str):
        self.judge = judge
        self.address = f"{judge.url}/chat/completions"
        self._client = client
        self._key = key
        self._reached = False  # by any request so far

    async def reply(self, messages: list[Message]) -> str:
        """What the model says to a conversation.

        Raises:
            JudgeError: nothing, and why.
        """
        import httpx

        judge = self.judge
        asked = {"model": judge.model, "messages": messages, "temperature": 0, "max_tokens": judge.max_tokens}
        body = {name: value for name, value in (asked | dict(judge.options)).items() if value is not None}
        problem = ""
        for attempt in range(ATTEMPTS):
            wait = BACKOFF * 2**attempt
            try:
                async with asyncio.timeout(judge.timeout):  # httpx's own begins anew with each piece that arrives
                    response = await self._client.post(self.address, json=body)
            except TimeoutError:
                problem = f"no reply within {judge.timeout:g} seconds; --judge-timeout allows more"
            except httpx.RequestError as error:
                problem = self._describe(error)
                if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout) and not self._reached:
                    raise JudgeError(
                        f"{self.address}: cannot be reached ({problem}). Is the server running, and --judge-url right?"
                    ) from None
            else:
                self._reached = True
                if response.status_code != 429 and response.status_code < 500:
                    return self._content(response)
                problem = f"{response.status_code}: {self._excerpt(response)}"
                wait = max(wait, _retry_after(response))
            if wait > LONGEST_WAIT:
                raise JudgeError(f"{self.address}: asks to wait {wait:.0f} seconds ({problem}). {GOES_ON}")
            if attempt + 1 < ATTEMPTS:
                await asyncio.sleep(wait)
        raise JudgeError(f"{self.address}: failed {ATTEMPTS} times in a row, at last with: {problem}. {GOES_ON}")

    def _content(self, response: "httpx.Response") -> str:
        """The text in a response that is not worth another attempt."""
        said = self._excerpt(response)
        status = response.status_code
        if status in (401, 403):
            remedy = "Set it to one that is valid there" if self._key else "It was not sent any"
            raise JudgeError(f"{self.address}: refuses the key in {' or '.join(KEYS)} ({status}: {said}). {remedy}")
        if status == 404:
            raise JudgeError(
                f"{self.address}: not found (404: {said}). Either it has no model {self.judge.model}, which "
                "--judge-model names, or --judge-url has another path; it often ends in /v1"
            )
        if status != 200:
            raise JudgeError(f"{self.address}: refuses the request ({status}: {said})")
        try:
            answer = json.loads(response.content)
        except ValueError:
            raise JudgeError(
                f"{self.address}: answers with something other than JSON ({said}), so it is no OpenAI-compatible "
                "endpoint. --judge-url often ends in /v1"
            ) from None
        try:
            content = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise JudgeError(
                f"{self.address}: answers with JSON that has no choices[0].message.content ({said}), so it is no "
                "OpenAI-compatible chat endpoint, or reports an error in its own way"
            ) from None
        return self._redact(content) if isinstance(content, str) else ""

    def _describe(self, error: "httpx.RequestError") -> str:
        import httpx

        if isinstance(error, httpx.ConnectTimeout):
            return "no connection in time"
        if isinstance(error, httpx.TimeoutException):
            return f"no reply within {self.judge.timeout:g} seconds; --judge-timeout allows more"
        return self._redact(str(error)) or type(error).__name__

    def _excerpt(self, response: "httpx.Response") -> str:
        """The beginning of what was sent back, or of the error message in it, on one line."""
        text = response.text
        try:
            error = json.loads(text)["error"]
            text = str(error["message"] if isinstance(error, dict) else error)
        except (ValueError, KeyError, TypeError):
            pass
        text = self._redact(" ".join("".join(c if c.isprintable() else " " for c in text).split()))
        return text if len(text) <= 200 else f"{text[:200]}…"

    def _redact(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


def _retry_after(response: "httpx.Response") -> float:
    """Seconds that the endpoint asks us to wait; 0 where it says nothing that can be read."""
    from datetime import UTC, datetime
    from email.utils import parsedate_to_datetime

    header = response.headers.get("Retry-After", "")
    try:
        return float(header)
    except ValueError:
        pass
    try:
        return (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):
        return 0.0
