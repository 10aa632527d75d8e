"""Client for OpenAI-compatible HTTP endpoints: retries, bounded concurrency, and error messages that name the remedy.

An API key is read from the environment when a request is sent. No object that is stored or printed holds a key, and
keys are removed from everything that an endpoint sends back.
"""

import asyncio
import contextvars
import itertools
import os
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from spinlm.errors import SpinError, shortened
from spinlm.utils.console import printable
from spinlm.utils.signals import check_interrupt

if TYPE_CHECKING:
    import httpx
    from tenacity import RetryCallState

MAX_ATTEMPTS = 5
MAX_RETRY_AFTER = 120.0  # seconds; a server that asks for a longer pause is asked again after this one
BACKOFF_SECONDS = 2.0  # before the second attempt; doubles with each further attempt
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
        self.status = status


class _TransientError(Exception):
    """A failure that a later attempt may not have."""

    def __init__(self, message: str, retry_after: float = 0.0):
        super().__init__(message)
        self.retry_after = retry_after  # seconds that the server asks to wait


def run_async(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine to its end, also inside a running event loop (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as thread:
        context = contextvars.copy_context()  # tells a notebook to which cell the output belongs
        return thread.submit(context.run, asyncio.run, coroutine).result()


def probe(url: str, context: ErrorContext) -> "httpx.Response | None":
    """Return the response to a GET request; None if nothing answers."""
    import httpx

    headers = _headers(context)
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


class Endpoint:
    """One model behind one or several URLs, which take turns."""

    def __init__(self, urls: Sequence[str], model: str, timeout: float, max_concurrency: int, context: ErrorContext):
        """
        Args:
            urls: the address of each replica, without the path of a request.
            model: the name of the model for error messages; may be empty.
            timeout: seconds for a whole response.
            max_concurrency: maximum number of requests at the same time.
            context: what error messages mention.
        """
        self.urls, self.model, self.timeout, self.context = urls, model, timeout, context
        self.max_concurrency = max_concurrency
        self._turns = itertools.cycle(range(len(urls)))

    async def run(
        self,
        items: Iterable[Item],
        request: Callable[[Item], Awaitable[Result]],
        record: Callable[[int, Result], None],
    ) -> None:
        """Send the requests of all items, at most `max_concurrency` at once.

        Args:
            items: one for each call of `request`.
            request: calls `self.request` or `self.post` and returns a result.
            record: receives the index of an item and its result as soon as the result arrives.

        Raises:
            SpinError: of the class in `context`; see `request`.
            StoppedError: the user asked to stop.
        """
        import httpx

        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(self.timeout, connect=min(self.timeout, CONNECT_TIMEOUT)),
            limits=httpx.Limits(max_connections=self.max_concurrency),
            headers=_headers(self.context),
            trust_env=not all(map(_is_loopback, self.urls)),
        )
        waiting = deque(enumerate(items))
        running: dict[asyncio.Future[Result], int] = {}
        async with self._client:
            try:
                while waiting or running:
                    check_interrupt()
                    while waiting and len(running) < self.max_concurrency:
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

        Overload (429), server errors (500 and above), lost connections and slow responses are retried, at the next URL
        and after a pause that doubles each time, or that the server asks for (Retry-After).

        Raises:
            RefusedError: the endpoint rejects the request (a status other than 200 that is not retried).
            SpinError: of the class in `context`: the endpoint is unreachable, or fails repeatedly.
        """
        from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt

        first = next(self._turns)
        urls = itertools.cycle([*self.urls[first:], *self.urls[:first]])

        async def send() -> "httpx.Response":
            return await self._send(next(urls) + path, body)

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_TransientError),
            wait=_wait,
            stop=stop_after_attempt(MAX_ATTEMPTS),
            reraise=True,
        )
        try:
            return await retrying(send)
        except _TransientError as error:
            raise self.context.error(f"{error}. {self.context.resume_hint}") from None

    async def _send(self, url: str, body: Mapping[str, Any]) -> "httpx.Response":
        import httpx

        problem = f"{url}: failed {MAX_ATTEMPTS} times in a row. The last error"
        try:
            async with asyncio.timeout(self.timeout):  # httpx's own timeout restarts with every piece that arrives
                response = await self._client.post(url, json=dict(body))
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            remedy = f"Check that the server is running and that {self.context.url_setting} is right"
            raise _TransientError(f"{url}: cannot be reached ({type(error).__name__}). {remedy}") from None
        except (TimeoutError, httpx.TimeoutException):
            limit = f"no reply within {self.timeout:g} seconds; {self.context.timeout_setting} allows more"
            raise _TransientError(f"{problem}: {limit}") from None
        except httpx.RequestError as error:
            raise _TransientError(f"{problem}: {redact(str(error), self.context) or type(error).__name__}") from None
        if response.status_code == 429 or response.status_code >= 500:
            seconds = retry_after(response.headers)
            raise _TransientError(f"{problem}: {response.status_code}: {self._excerpt(response)}", seconds)
        if response.status_code != 200:
            raise RefusedError(response.status_code, self._excerpt(response))
        return response

    def _explain(self, path: str, refused: RefusedError) -> SpinError:
        """Return the error to raise for a rejected request, with its remedy."""
        context = self.context
        if refused.status in (401, 403):
            keys = " or ".join(context.key_variables)
            problem = f"refuses the key ({refused}). Set a key that is valid there in {keys}"
        elif refused.status == 404:
            model = f"Either the server has no model {self.model} ({context.model_setting}), or " if self.model else ""
            problem = f"not found ({refused}). {model}{context.url_setting} has another path; it often ends in /v1"
        else:
            problem = f"refuses the request ({refused})"
        return context.error(f"{self.urls[0]}{path}: {problem}")

    def _excerpt(self, response: "httpx.Response") -> str:
        """Return the beginning of a response body on one line."""
        return shortened(redact(printable(" ".join(response.text.split())), self.context), MAX_EXCERPT)


def retry_after(headers: Mapping[str, str]) -> float:
    """Return the seconds that a server asks to wait, at most MAX_RETRY_AFTER; 0 if it does not ask."""
    value = headers.get("Retry-After", "")
    return min(float(value), MAX_RETRY_AFTER) if value.isdecimal() else 0.0


def backoff(attempts: int, first: float, minimum: float) -> float:
    """Return the seconds to wait: `first` after the first attempt, doubled each time, and at least `minimum`."""
    return max(first * 2.0 ** (attempts - 1), minimum)


def _wait(state: "RetryCallState") -> float:
    """Return the seconds before the next attempt: BACKOFF_SECONDS, doubled each time, or more if the server asks."""
    error = state.outcome.exception() if state.outcome else None
    minimum = error.retry_after if isinstance(error, _TransientError) else 0.0
    return backoff(state.attempt_number, BACKOFF_SECONDS, minimum)


def _is_loopback(url: str) -> bool:
    return urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")


def _headers(context: ErrorContext) -> dict[str, str]:
    """Return the header with the API key; empty if no key is set."""
    key = next(filter(None, (os.environ.get(name, "").strip() for name in context.key_variables)), "")
    if not (key.isascii() and key.isprintable()):
        raise context.error(f"{' or '.join(context.key_variables)}: contains characters that no key has. Set it again")
    return {"Authorization": f"Bearer {key}"} if key else {}
