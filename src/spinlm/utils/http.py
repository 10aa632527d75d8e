"""OpenAI-compatible endpoints over HTTP: requests that are sent again where that may help, and errors in plain words.

A key is read from the environment when requests are sent. It is in no object that is kept or printed, and is taken out
of whatever an endpoint sends back.
"""

import asyncio
import json
import os
import time
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

ATTEMPTS = 5
BACKOFF = 1.0  # seconds before the second attempt, doubled for each that follows
LOOK = 5.0  # seconds a server has to say what it offers
LONGEST_CONNECT = 20.0  # seconds until a connection has to stand
LONGEST_WAIT = 300.0  # seconds an endpoint may ask us to wait


Item = TypeVar("Item")
Result = TypeVar("Result")


SHORTEST_KEY = 4  # characters; what is shorter stands in any text


@dataclass(frozen=True)
class Wording:
    """How messages call the settings of an endpoint, so that they say what to change."""

    error: type[SpinError]
    url: str  # the setting that holds its address
    model: str  # and the model's name
    timeout: str  # and the seconds a reply may take
    keys: tuple[str, ...]  # environment variables, the first that is set holds the key
    goes_on: str  # what becomes of a run that ends here


def fault_of(address: str) -> str | None:
    """What is wrong with the address of an endpoint; None if nothing."""
    import httpx

    if any(mark in address for mark in "@?#"):  # it is not shown: a password or a key may be in it
        return "write the address without a password, ? or #. A key goes into the environment"
    try:
        parsed, host = urlsplit(address.strip()), httpx.URL(address.strip()).host
        bare = parsed.port is None or parsed.port > 0
    except (ValueError, httpx.InvalidURL) as error:
        return f"{address} is not an address ({error})"
    if parsed.scheme not in ("http", "https") or not host or not bare:
        return f"{address} is not an address that begins with http:// or https:// and a host"
    return None


def open_client(urls: Sequence[str], timeout: float, parallel: int) -> "httpx.AsyncClient":
    """A client for some addresses, whose connections suffice for so many requests at once."""
    import httpx

    limits = httpx.Limits(max_connections=parallel, max_keepalive_connections=parallel)
    return httpx.AsyncClient(
        timeout=httpx.Timeout(timeout, connect=min(timeout, LONGEST_CONNECT)),
        limits=limits,
        trust_env=not all(map(_is_here, urls)),
    )


def run_async(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """What comes of a coroutine, also where an event loop runs already, as it does in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()


async def ask_all(
    items: Iterable[Item],
    ask: Callable[[Item], Awaitable[Result]],
    record: Callable[[int, Result], None],
    parallel: int,
) -> None:
    """Ask about every item, `parallel` at once.

    Args:
        items: what to ask about.
        ask: asks about one.
        record: called with the number of an item and what came back, as soon as that is there.
        parallel: requests at once.

    Raises:
        StoppedError: the user asked to stop.
    """
    waiting = deque(enumerate(items))
    running: dict[asyncio.Future[Result], int] = {}
    try:
        while waiting or running:
            check_interrupt()
            while waiting and len(running) < parallel:
                number, item = waiting.popleft()
                running[asyncio.ensure_future(ask(item))] = number
            done, _ = await asyncio.wait(running, timeout=0.2, return_when=asyncio.FIRST_COMPLETED)
            # What was answered is recorded before what failed ends all this.
            for task in sorted(done, key=lambda task: task.exception() is not None):
                record(running.pop(task), task.result())
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def look(address: str, wording: Wording) -> tuple[int, Any] | None:
    """The status and the JSON (or None) at an address; None where nothing answers."""
    import httpx

    try:
        response = httpx.get(address, timeout=LOOK, headers=_headers(_key(wording)), trust_env=not _is_here(address))
    except httpx.HTTPError:
        return None
    try:
        return response.status_code, response.json()
    except ValueError:
        return response.status_code, None


def _is_here(address: str) -> bool:
    """Whether an address is of this machine, which no proxy leads to."""
    return urlsplit(address).hostname in ("localhost", "127.0.0.1", "::1")


def redact(text: str, wording: Wording) -> str:
    """A text without the keys that are set."""
    for name in (*wording.keys, "HF_TOKEN"):
        if len(key := os.environ.get(name, "").strip()) >= SHORTEST_KEY:
            text = text.replace(key, "[key]")
    return text


class RefusedError(Exception):
    """An endpoint does not take a request as it is; `status` and what it `said` tell why."""

    def __init__(self, status: int, said: str):
        super().__init__(f"{status}: {said}")
        self.status, self.said = status, said


@dataclass(eq=False)
class _Host:
    """One address, and how it does."""

    url: str
    busy: int = 0  # requests under way
    missing: bool = False  # nobody was there when it was last asked
    failed: int = 0  # times in a row
    rests_until: float = 0.0  # by the monotonic clock; as long as others do not, they are asked

    def fail(self, asked_to_wait: float) -> None:
        now = time.monotonic()
        if now >= self.rests_until:  # else requests that ran at once have failed at once
            self.rests_until = now + BACKOFF * 2 ** min(self.failed, 8)
            self.failed += 1
        self.rests_until = max(self.rests_until, now + asked_to_wait)

    def succeed(self) -> None:
        self.failed, self.rests_until = 0, 0.0


@dataclass
class Endpoint:
    """One model behind one or several addresses. A request goes to the one that does best and has the least to do, and
    from one that fails to the next."""

    urls: Sequence[str]
    model: str
    client: "httpx.AsyncClient"
    timeout: float  # seconds until a reply has to be there
    wording: Wording
    _hosts: list[_Host] = field(init=False)
    _key: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._hosts = [_Host(url) for url in self.urls]
        self._key = _key(self.wording)

    async def post(self, path: str, body: Mapping[str, Any], *, text: bool = False) -> Any:
        """The JSON, or the text, that comes back for a request.

        Raises:
            RefusedError: the endpoint does not take such a request (a status of 400 to 499 that is about the request).
            SpinError: of the kind that `wording` names: it cannot be reached, or fails again and again.
        """
        import httpx

        problem = address = ""
        for attempt in range(ATTEMPTS):
            untried = list(self._hosts)
            while untried:
                now = time.monotonic()
                host = min(untried, key=lambda host: (host.rests_until > now, host.busy))
                untried.remove(host)
                address, asked_to_wait = host.url + path, 0.0
                host.busy += 1
                try:
                    async with asyncio.timeout(self.timeout):  # httpx's own begins anew with each piece that arrives
                        response = await self.client.post(address, json=dict(body), headers=_headers(self._key))
                except TimeoutError:
                    problem = self._too_slow()
                except httpx.RequestError as error:
                    problem = self._describe(error)
                    host.missing = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
                else:
                    host.missing = False
                    if response.status_code != 429 and response.status_code < 500:
                        host.succeed()
                        return self._read(address, response, text)
                    problem = f"{response.status_code}: {self._excerpt(response)}"
                    asked_to_wait = _retry_after(response)
                finally:
                    host.busy -= 1
                host.fail(asked_to_wait)
            earliest = min(host.rests_until for host in self._hosts) - time.monotonic()
            wait = max(BACKOFF * 2**attempt, earliest)
            if wait > LONGEST_WAIT:
                raise self.wording.error(
                    f"{address}: asks to wait {wait:.0f} seconds ({problem}). {self.wording.goes_on}"
                )
            if attempt + 1 < ATTEMPTS:
                await asyncio.sleep(wait)
        if all(host.missing for host in self._hosts):
            raise self.wording.error(
                f"{address}: cannot be reached ({problem}). Is the server running, and {self.wording.url} right? "
                f"{self.wording.goes_on}"
            )
        raise self.wording.error(
            f"{address}: failed {ATTEMPTS} times in a row, at last with: {problem}. {self.wording.goes_on}"
        )

    def explain(self, path: str, refused: RefusedError) -> SpinError:
        """A refusal in plain words, as the error to raise."""
        wording, where = self.wording, f"{self.urls[0]}{path}"
        if refused.status in (401, 403):
            remedy = "Set it to one that is valid there" if self._key else "It was not sent any"
            keys = " or ".join(wording.keys)
            return wording.error(f"{where}: refuses the key in {keys} ({refused}). {remedy}")
        if refused.status == 404:
            model = f"Either it has no model {self.model}, which {wording.model} names, or " if self.model else ""
            return wording.error(
                f"{where}: not found ({refused}). {model}{wording.url} has another path; it often ends in /v1"
            )
        if 300 <= refused.status < 400:
            return wording.error(
                f"{where}: redirects ({refused.status}), which is not followed. Set {wording.url} to where it leads"
            )
        return wording.error(f"{where}: refuses the request ({refused})")

    def unexpected(self, path: str, what: str, answer: Any) -> SpinError:
        """The error to raise for JSON that has not what it should have."""
        said = self._shorten(json.dumps(answer, ensure_ascii=False))
        return self.wording.error(
            f"{self.urls[0]}{path}: answers with JSON that has no {what} ({said}), so it is no OpenAI-compatible "
            "endpoint, or reports an error in its own way"
        )

    def redact(self, text: str) -> str:
        """A text without the key."""
        return redact(text, self.wording)

    def _read(self, address: str, response: "httpx.Response", text: bool) -> Any:
        """What is in a response that is not worth another attempt."""
        if response.status_code != 200:
            raise RefusedError(response.status_code, self._excerpt(response))
        if text:
            return self._excerpt(response)
        try:
            return json.loads(response.content)
        except ValueError:
            raise self.wording.error(
                f"{address}: answers with something other than JSON ({self._excerpt(response)}), so it is no "
                f"OpenAI-compatible endpoint. {self.wording.url} often ends in /v1"
            ) from None

    def _too_slow(self) -> str:
        return f"no reply within {self.timeout:g} seconds; {self.wording.timeout} allows more"

    def _describe(self, error: "httpx.RequestError") -> str:
        import httpx

        if isinstance(error, httpx.ConnectTimeout):
            return "no connection in time"
        if isinstance(error, httpx.TimeoutException):
            return self._too_slow()
        return self.redact(str(error)) or type(error).__name__

    def _excerpt(self, response: "httpx.Response") -> str:
        """The beginning of what was sent back, or of the error message in it, on one line."""
        text = response.text
        try:
            error = json.loads(text)
            error = error.get("error", error.get("detail"))
            text = text if error is None else str(error["message"] if isinstance(error, dict) else error)
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        return self._shorten(text)

    def _shorten(self, text: str) -> str:
        text = self.redact(" ".join("".join(c if c.isprintable() else " " for c in text).split()))
        return text if len(text) <= 200 else f"{text[:200]}…"


def _key(wording: Wording) -> str:
    """The endpoint's key; empty where there is none."""
    for name in wording.keys:
        key = os.environ.get(name, "").strip()
        if key:
            if not (key.isascii() and key.isprintable()):
                raise wording.error(f"{name}: holds characters that no key has. Set it again")
            return key
    return ""


def _headers(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


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
