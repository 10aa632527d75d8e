"""Progress of a long stage: a bar on a terminal, otherwise a line in the log every 30 seconds. Only rank 0 shows it."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator

from spinlm.distributed.processes import SharedCounter, is_main_process

log = logging.getLogger("spinlm")

Advance = Callable[..., None]
"""`advance(done=1, amount=0, note="")`: `done` more items with `amount` more units (tokens) are complete."""

LOG_SECONDS = 30  # between lines in the log
SYNC_SECONDS = 1  # between exchanges with other processes


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
    show_bar = (
        sys.stderr.isatty() and not console.is_dumb_terminal and is_main_process() and log.isEnabledFor(logging.INFO)
    )
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
    with bar:
        task = bar.add_task(label, total=total, completed=completed, rate="")

        def advance(done: int = 1, amount: int = 0, note: str = "") -> None:
            nonlocal new_items, new_units, logged, synced
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
            if bar.disable and is_main_process() and now - logged > LOG_SECONDS:
                logged = now
                seconds_left = (total - completed - items) * (now - started) / max(items, 1)
                hide_time = response_unit and items < (total - completed) / 4
                time_left = "" if hide_time else f", {seconds_left:.0f} s left"
                log.info(
                    "%s %d/%s, %s%s", label, completed + items, f"{total} {response_unit}".strip(), rate, time_left
                )

        yield advance
