"""Ctrl-C, SIGTERM and other reasons to stop: the main thread stops at the next safe point."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from spinlm.errors import SpinError, StoppedError

STOPPING = b"\nstopping when the current step is complete; Ctrl-C again stops at once\n"
STDERR = 2  # written to directly: a signal may arrive while Python writes to its stream

_stop_error: SpinError | None = None
_deferred = False


def check_interrupt() -> None:
    """Raise the requested error, if any. Call this at safe points: where stopping loses little work."""
    if _stop_error is not None and not _deferred:
        raise _stop_error


@contextlib.contextmanager
def defer_interrupts() -> Iterator[None]:
    """Within the block, `check_interrupt` does nothing. For saving a checkpoint before stopping."""
    global _deferred
    _deferred = True
    try:
        yield
    finally:
        _deferred = False


def interrupt_requested() -> bool:
    """Whether a stop was requested."""
    return _stop_error is not None


def request_stop(error: SpinError) -> None:
    """Make the main thread raise an error at its next safe point."""
    global _stop_error
    _stop_error = error


@contextlib.contextmanager
def graceful_shutdown() -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into a request to stop. A second SIGINT stops at once."""
    global _stop_error
    _stop_error = None
    if threading.current_thread() is not threading.main_thread():  # other threads cannot set signal handlers
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if _stop_error is None:
            request_stop(StoppedError("stopped; run the same command again to continue"))
            if number == signal.SIGINT and os.isatty(STDERR) and os.environ.get("RANK", "0") == "0":
                os.write(STDERR, STOPPING)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _stop_error = None
