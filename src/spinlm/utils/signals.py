"""Ctrl-C, SIGTERM, and other reasons to end: stop at the next safe point instead of anywhere."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from spinlm.errors import SpinError, StoppedError

_reason: SpinError | None = None
_must_finish = False


def check_interrupt() -> None:
    """Raise StoppedError if the user has asked to stop, or what else came up. Called where stopping loses little."""
    if _reason is not None and not _must_finish:
        raise _reason


@contextlib.contextmanager
def defer_interrupts() -> Iterator[None]:
    """Within the block nothing is a safe point to stop at: what is being saved because of a stop is saved."""
    global _must_finish
    _must_finish = True
    try:
        yield
    finally:
        _must_finish = False


def interrupt_requested() -> bool:
    """Whether `check_interrupt` would raise."""
    return _reason is not None


def request_stop(error: SpinError) -> None:
    """Let the main thread raise an error at the next safe point."""
    global _reason
    _reason = error


@contextlib.contextmanager
def graceful_shutdown() -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into a request; a second SIGINT stops at once."""
    global _reason
    _reason = None
    if threading.current_thread() is not threading.main_thread():  # only the main one may set handlers
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if _reason is None:
            request_stop(StoppedError("stopped as asked; run the same command again to continue"))
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _reason = None
