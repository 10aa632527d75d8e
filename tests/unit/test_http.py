"""URLs, redaction, and coroutines; tests/integration/test_server.py sends real requests."""

import asyncio
from collections.abc import Awaitable

import pytest
from tenacity import RetryCallState

from spinlm.errors import SpinError
from spinlm.utils.http import ErrorContext, _TransientError, _wait, redact, run_async
from spinlm.utils.urls import url_fault

CONTEXT = ErrorContext(SpinError, "url", "model", "timeout", ("SPINLM_SERVER_KEY",), "Run again")


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("http://127.0.0.1:8000/v1", None),
        (" https://api.example.com/v1 ", None),
        ("http://[::1]:8000", None),
        ("localhost:8000", "begins with http"),
        ("http://me:secret@a", "without a password"),
        ("http://me:secret@a:port", "without a password"),
        ("http://a/?key=secret", "without a password"),
        ("http://a:port", "is not a URL"),
        ("http://[::1", "is not a URL"),
        ("http://a\tb", "is not a URL"),
        ("http://xn--", "is not a URL"),
    ],
)
def test_urls(url: str, fault: str | None) -> None:
    reported = url_fault(url)
    assert (reported is None) if fault is None else (fault in (reported or ""))
    assert "secret" not in (reported or "")


def test_keys_are_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPINLM_SERVER_KEY", " sk-1234 ")
    monkeypatch.setenv("HF_TOKEN", "abc")  # too short to be a key: "abc" may stand in any text
    assert redact("sk-1234 and abc", CONTEXT) == "[key] and abc"


def test_run_async_inside_an_event_loop() -> None:
    async def three(delay: Awaitable[None]) -> int:
        await delay
        return 3

    async def notebook() -> int:
        return run_async(three(asyncio.sleep(0)))

    assert asyncio.run(notebook()) == run_async(three(asyncio.sleep(0))) == 3


def test_a_pause_that_the_server_asks_for_is_kept_and_bounded() -> None:
    def wait(attempt: int, retry_after: float) -> float:
        state = RetryCallState(None, None, (), {})  # type: ignore[arg-type]
        state.attempt_number = attempt
        state.set_exception((_TransientError, _TransientError("busy", retry_after), None))
        return _wait(state)

    assert [wait(attempt, 0) for attempt in (1, 2, 3)] == [2, 4, 8]
    assert [wait(1, 30), wait(3, 1)] == [30, 8]
