"""Client for OpenAI-compatible HTTP endpoints: retries, bounded concurrency, and error messages that name the remedy.

An API key is read from the environment when a request is sent. No object that is stored or printed holds a key, and
keys are removed from everything that an endpoint sends back.
"""

import asyncio
import itertools
import json
import os
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from spinlm.errors import SpinError
from spinlm.utils.signals import check_interrupt

if TYPE_CHECKING:
    import httpx
    from tenacity import RetryCallState

MAX_ATTEMPTS = 5  # per URL
BACKOFF_SECONDS = 1.0  # before the second attempt; doubles with each further attempt
MAX_WAIT_SECONDS = 300.0  # a longer Retry-After is an error
CONNECT_TIMEOUT = 20.0
PROBE_TIMEOUT = 5.0
MIN_KEY_LENGTH = 4  # a shorter key is not redacted: any text may contain it
MAX_EXCERPT = 200  # characters of a response body in an error message

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class ErrorContext:
    """The error class and the names of the settings that error messages about an endpoint mention."""

    error: type[SpinError]
    url_setting: str
    model_setting: str
    timeout_setting: str
    key_variables: tuple[str, ...]  # environment variables; the first that is set holds the key
    resume_hint: str  # how to continue after the error


class RefusedError(Exception):
    """An endpoint rejected a request, and would reject it again."""

    def __init__(self, status: int, message: str):
        super().__init__(f"{status}: {message}")
        self.status, self.message = status, message


class _TransientError(Exception):
    """A failure that the next attempt may not have."""

    def __init__(self, problem: str, url: str, *, unreachable: bool = False, retry_after: float = 0.0):
        super().__init__(problem)
        self.url, self.unreachable, self.retry_after = url, unreachable, retry_after


def open_client(urls: Sequence[str], timeout: float, max_concurrency: int) -> "httpx.AsyncClient":
    """Open a client. It ignores proxy settings if all URLs are on this machine."""
    import httpx

    return httpx.AsyncClient(
        timeout=httpx.Timeout(timeout, connect=min(timeout, CONNECT_TIMEOUT)),
        limits=httpx.Limits(max_connections=max_concurrency, max_keepalive_connections=max_concurrency),
        trust_env=not all(map(_is_loopback, urls)),
    )


def run_async(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine to its end, also inside a running event loop (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()


async def gather_bounded(
    items: Iterable[Item],
    request: Callable[[Item], Awaitable[Result]],
    record: Callable[[int, Result], None],
    max_concurrency: int,
) -> None:
    """Send a request for every item, at most `max_concurrency` at once.

    `record` receives the index of an item and its result as soon as the result arrives.

    Raises:
        StoppedError: the user asked to stop.
    """
    waiting = deque(enumerate(items))
    running: dict[asyncio.Future[Result], int] = {}
    try:
        while waiting or running:
            check_interrupt()
            while waiting and len(running) < max_concurrency:
                index, item = waiting.popleft()
                running[asyncio.ensure_future(request(item))] = index
            done, _ = await asyncio.wait(running, timeout=0.2, return_when=asyncio.FIRST_COMPLETED)
            # Record the results before a failure ends the loop.
            for task in sorted(done, key=lambda task: task.exception() is not None):
                record(running.pop(task), task.result())
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def probe(url: str, context: ErrorContext) -> "httpx.Response | None":
    """Return the response to a GET request; None if nothing answers."""
    import httpx

    headers = _headers(_read_key(context))
    try:
        return httpx.get(url, timeout=PROBE_TIMEOUT, headers=headers, trust_env=not _is_loopback(url))
    except httpx.HTTPError:
        return None


def redact(text: str, context: ErrorContext) -> str:
    """Replace the API keys in a text."""
    for name in (*context.key_variables, "HF_TOKEN"):
        if len(key := os.environ.get(name, "").strip()) >= MIN_KEY_LENGTH:
            text = text.replace(key, "[key]")
    return text


@dataclass
class Endpoint:
    """One model behind one or several URLs, which take turns."""

    urls: Sequence[str]
    model: str
    client: "httpx.AsyncClient"
    timeout: float  # seconds for a whole response
    context: ErrorContext
    _turns: "itertools.count[int]" = field(init=False, repr=False, default_factory=itertools.count)
    _key: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._key = _read_key(self.context)

    async def request(
        self, path: str, body: Mapping[str, Any], parse: Callable[[Any], Result], expected: str
    ) -> Result:
        """Post a request and parse the JSON of the response.

        Args:
            path: follows the URL.
            body: sent as JSON.
            parse: reads the JSON; raises KeyError, IndexError, TypeError, ValueError or AttributeError if it cannot.
            expected: the field that the response must have, for the error message.

        Raises:
            SpinError: of the class in `context`: the endpoint is unreachable, fails repeatedly, rejects the request, or
                its response cannot be parsed.
        """
        try:
            response = await self.post(path, body)
        except RefusedError as refused:
            raise self._explain(path, refused) from None
        try:
            return parse(response.json())
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise self.context.error(
                f"{self.urls[0]}{path}: the response has no {expected} ({self._excerpt(response)}), so this is not an "
                f"OpenAI-compatible endpoint, or {self.context.url_setting} has another path; it often ends in /v1"
            ) from None

    async def post(self, path: str, body: Mapping[str, Any]) -> "httpx.Response":
        """Post a request and return the response.

        Overload (429), server errors (500 and above), lost connections and slow responses are retried: first at the
        other URLs, then after a pause that doubles each time, or after the Retry-After of the endpoint.

        Raises:
            RefusedError: the endpoint rejects the request (a status other than 200 that is not retried).
            SpinError: of the class in `context`: the endpoint is unreachable, or fails repeatedly.
        """
        from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt

        count, first = len(self.urls), next(self._turns)
        urls = (self.urls[(first + attempt) % count] for attempt in itertools.count())
        last_attempt = stop_after_attempt(MAX_ATTEMPTS * count)

        async def send() -> "httpx.Response":
            return await self._send(next(urls) + path, body)

        def pause(state: "RetryCallState") -> float:
            assert state.outcome is not None
            retry_after = getattr(state.outcome.exception(), "retry_after", 0.0)
            rounds, rest = divmod(state.attempt_number, count)
            return 0.0 if rest else max(BACKOFF_SECONDS * 2 ** (rounds - 1), retry_after)

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_TransientError),
            wait=pause,
            stop=lambda state: state.upcoming_sleep > MAX_WAIT_SECONDS or last_attempt(state),
            reraise=True,
        )
        try:
            return await retrying(send)
        except _TransientError as error:
            raise self.context.error(f"{self._describe(error)} {self.context.resume_hint}") from None

    async def _send(self, url: str, body: Mapping[str, Any]) -> "httpx.Response":
        import httpx

        try:
            async with asyncio.timeout(self.timeout):  # httpx's own timeout restarts with every piece that arrives
                response = await self.client.post(url, json=dict(body), headers=_headers(self._key))
        except httpx.ConnectTimeout:
            raise _TransientError("no connection in time", url, unreachable=True) from None
        except (TimeoutError, httpx.TimeoutException):
            problem = f"no reply within {self.timeout:g} seconds; {self.context.timeout_setting} allows more"
            raise _TransientError(problem, url) from None
        except httpx.RequestError as error:
            problem = redact(str(error), self.context) or type(error).__name__
            raise _TransientError(problem, url, unreachable=isinstance(error, httpx.ConnectError)) from None
        if response.status_code == 429 or response.status_code >= 500:
            problem = f"{response.status_code}: {self._excerpt(response)}"
            raise _TransientError(problem, url, retry_after=_retry_after(response))
        if response.status_code != 200:
            raise RefusedError(response.status_code, self._excerpt(response))
        return response

    def _describe(self, error: _TransientError) -> str:
        if error.retry_after > MAX_WAIT_SECONDS:
            return f"{error.url}: asks to wait {error.retry_after:.0f} seconds ({error})."
        if error.unreachable:
            question = f"Is the server running, and is {self.context.url_setting} right?"
            return f"{error.url}: cannot be reached ({error}). {question}"
        return f"{error.url}: failed {MAX_ATTEMPTS} times in a row. The last error: {error}."

    def _explain(self, path: str, refused: RefusedError) -> SpinError:
        """Return the error to raise for a rejected request, with its remedy."""
        context = self.context
        if refused.status in (401, 403):
            remedy = "Set a key that is valid there" if self._key else "No key was sent"
            problem = f"refuses the key in {' or '.join(context.key_variables)} ({refused}). {remedy}"
        elif refused.status == 404:
            model = f"Either the server has no model {self.model} ({context.model_setting}), or " if self.model else ""
            problem = f"not found ({refused}). {model}{context.url_setting} has another path; it often ends in /v1"
        elif 300 <= refused.status < 400:
            problem = f"redirects ({refused}). Redirects are not followed: set {context.url_setting} to the target"
        else:
            problem = f"refuses the request ({refused})"
        return context.error(f"{self.urls[0]}{path}: {problem}")

    def _excerpt(self, response: "httpx.Response") -> str:
        """Return the beginning of a response body, or of the error message in it, on one line."""
        text = response.text
        try:
            body = json.loads(text)
            error = body.get("error", body.get("detail"))
            text = text if error is None else str(error["message"] if isinstance(error, dict) else error)
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        printable = "".join(c if c.isprintable() else " " for c in text)
        text = redact(" ".join(printable.split()), self.context)
        return text if len(text) <= MAX_EXCERPT else f"{text[:MAX_EXCERPT]}…"


def _is_loopback(url: str) -> bool:
    return urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")


def _read_key(context: ErrorContext) -> str:
    """Return the API key; an empty string if none is set."""
    key = next(filter(None, (os.environ.get(name, "").strip() for name in context.key_variables)), "")
    if not (key.isascii() and key.isprintable()):
        raise context.error(f"{' or '.join(context.key_variables)}: contains characters that no key has. Set it again")
    return key


def _headers(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def _retry_after(response: "httpx.Response") -> float:
    """Return the seconds in Retry-After; 0 if the header is absent or is a date."""
    try:
        return float(response.headers.get("Retry-After", ""))
    except ValueError:
        return 0.0
