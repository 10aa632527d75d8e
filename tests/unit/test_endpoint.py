"""Addresses, hosts that rest, and coroutines."""

import asyncio
from collections.abc import Awaitable

import pytest

import spinlm.utils.http
from spinlm.utils.http import _Host, fault_of, run_async


@pytest.mark.parametrize(
    ("address", "fault"),
    [
        ("http://127.0.0.1:8000/v1", None),
        (" https://api.example.com/v1 ", None),
        ("http://[::1]:8000", None),
        ("localhost:8000", "begins with http"),
        ("http://me:secret@a", "without a password"),
        ("http://me:secret@a:port", "without a password"),
        ("http://a/?key=secret", "without a password"),
        ("http://a:port", "is not an address"),
        ("http://[::1", "is not an address"),
        ("http://a\tb", "is not an address"),
        ("http://xn--", "is not an address"),
    ],
)
def test_addresses(address: str, fault: str | None) -> None:
    found = fault_of(address)
    assert (found is None) if fault is None else (fault in (found or ""))
    assert "secret" not in (found or "")


def test_failures_at_the_same_time_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(spinlm.utils.http.time, "monotonic", lambda: now)
    host = _Host("http://a")
    for _ in range(32):
        host.fail(0)
    assert (host.failed, host.rests_until) == (1, 101)
    now = 101.0
    host.fail(0)
    assert (host.failed, host.rests_until) == (2, 103)
    host.fail(50)
    assert (host.failed, host.rests_until) == (2, 151)
    host.succeed()
    assert (host.failed, host.rests_until) == (0, 0)


def test_a_coroutine_where_a_loop_runs() -> None:
    async def value(after: Awaitable[None]) -> int:
        await after
        return 3

    async def notebook() -> int:
        return run_async(value(asyncio.sleep(0)))

    assert asyncio.run(notebook()) == run_async(value(asyncio.sleep(0))) == 3
