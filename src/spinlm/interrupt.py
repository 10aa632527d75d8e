"""Ctrl-C and SIGTERM: stop at the next safe point instead of anywhere."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from spinlm.errors import StoppedError

_asked = False


def stop_if_asked() -> None:
    """Raise StoppedError if the user has asked to stop. Called where stopping loses little."""
    if _asked:
        raise StoppedError("stopped as asked; run the same command again to continue")


@contextlib.contextmanager
def gentle_stop() -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into a request; a second SIGINT stops at once."""
    global _asked
    _asked = False
    if threading.current_thread() is not threading.main_thread():  # only the main one may set handlers
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        global _asked
        _asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked = False
