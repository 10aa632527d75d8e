"""Progress of a long stage. Only rank 0 shows it.

On a terminal it is a bar, in a notebook one line that is replaced, otherwise a line in the log every 30 seconds.
"""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from spinlm.distributed.processes import SharedCounter, is_main_process
from spinlm.utils.console import quiet_libraries

log = logging.getLogger("spinlm")

Advance = Callable[..., None]
"""`advance(done=1, amount=0, note="")`: `done` more items with `amount` more units (tokens) are complete."""

LOG_SECONDS = 30  # between lines in the log
NOTEBOOK_SECONDS = 0.5  # between updates of the line in a notebook
SYNC_SECONDS = 1  # between exchanges with other processes


def show_progress() -> None:
    """Print the messages and the progress of spinlm to standard output, and silence its libraries.

    The command line does this by itself. Notebooks and scripts call this function after `import spinlm`. A second call
    changes nothing.
    """
    quiet_libraries()
    handler = logging.StreamHandler(sys.stdout)
    handler.name = "spinlm.show_progress"
    log.handlers = [other for other in log.handlers if other.name != handler.name] + [handler]
    log.setLevel(logging.INFO if is_main_process() else logging.ERROR)
    log.propagate = False  # the root logger may have a handler, too


class _NotebookLine:
    """A line of a cell's output that is replaced."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._text = ""

    def show(self, text: str) -> None:
        if text == self._text:
            return
        self._text = text
        if self._handle is None:
            from IPython.display import display

            self._handle = display({"text/plain": text}, raw=True, display_id=True)
        else:
            self._handle.update({"text/plain": text}, raw=True)


def _in_notebook() -> bool:
    """Return whether the code runs in a cell of a notebook."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


@contextlib.contextmanager
def track(
    label: str, total: int, completed: int = 0, unit: str = "tokens", *, shared: bool = False, response_unit: str = ""
) -> Iterator[Advance]:
    """Show completed items, units per second, and the time left.

    Args:
        label: name of the stage.
        total: number of items.
        completed: items that were complete before. They do not count for the rate.
        unit: what the rate counts.
        shared: whether the processes share the items. Otherwise every process does all of them.
        response_unit: name of the items, if they are responses. No time left is shown before a quarter is complete,
            because the responses of a batch end together.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    shown = is_main_process() and log.isEnabledFor(logging.INFO)
    line = _NotebookLine() if shown and _in_notebook() else None
    show_bar = shown and line is None and sys.stderr.isatty() and not console.is_dumb_terminal
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not show_bar,
    )
    item_counter, unit_counter = SharedCounter(shared), SharedCounter(shared)
    new_items = new_units = 0
    started = logged = synced = time.monotonic()
    text = ""
    with bar:
        task = bar.add_task(label, total=total, completed=completed, rate="")

        def advance(done: int = 1, amount: int = 0, note: str = "") -> None:
            nonlocal new_items, new_units, logged, synced, text
            new_items += done
            new_units += amount
            now = time.monotonic()
            if item_counter.shared and now - synced < SYNC_SECONDS:
                return
            synced = now
            items, units = item_counter.add(new_items), unit_counter.add(new_units)
            new_items = new_units = 0
            rate = f"{units / max(now - started, 1e-9):,.0f} {unit}/s" + (f", {note}" if note else "")
            bar.update(task, completed=completed + items, rate=rate)
            if show_bar or not shown:
                return
            seconds_left = (total - completed - items) * (now - started) / max(items, 1)
            hide_time = response_unit and items < (total - completed) / 4
            time_left = "" if hide_time else f", {seconds_left:.0f} s left"
            text = f"{label} {completed + items}/{f'{total} {response_unit}'.strip()}, {rate}{time_left}"
            if now - logged > (LOG_SECONDS if line is None else NOTEBOOK_SECONDS):
                logged = now
                log.info(text) if line is None else line.show(text)

        yield advance
        if line is not None and text:
            line.show(text)
