"""Progress of long stages: a bar on a terminal, a line now and then elsewhere. Of several processes one shows it."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator

from spinlm.distributed import processes

log = logging.getLogger("spinlm")

Advance = Callable[..., None]
"""`advance(done=1, amount=0, note="")`: so many more items are done, with so many more units (tokens), and a note."""

SECONDS_BETWEEN_LINES = 30
SECONDS_BETWEEN_COUNTS = 1  # among several processes


@contextlib.contextmanager
def track(
    what: str, total: int, already: int = 0, unit: str = "tokens", *, shared: bool = False, responses: str = ""
) -> Iterator[Advance]:
    """Show how far a stage has come, its rate in units per second, and when it will end.

    Args:
        what: the stage.
        total: items it has.
        already: items that were done before, which say nothing about the rate.
        unit: what the rate counts.
        shared: whether each process does a part of the items, and not each of them all.
        responses: what the items are called where they are responses, written or read. Those of a batch end late, so
            no line says when all will, before a quarter has.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    shown = (
        sys.stderr.isatty()
        and not console.is_dumb_terminal
        and processes.is_main_process()
        and log.isEnabledFor(logging.INFO)
    )
    begun = time.monotonic()
    spoken = counted = begun
    counter = processes.SharedCounter(shared)
    new_items = new_units = 0
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not shown,
    )
    with bar:
        task = bar.add_task(what, total=total, completed=already, rate="")

        def advance(done: int = 1, amount: int = 0, note: str = "") -> None:
            nonlocal new_items, new_units, spoken, counted
            new_items += done
            new_units += amount
            now = time.monotonic()
            if counter.costs and now - counted < SECONDS_BETWEEN_COUNTS:
                return
            counted = now
            items, units = counter.add(new_items, new_units)
            new_items = new_units = 0
            rate = f"{units / max(now - begun, 1e-9):,.0f} {unit}/s" + (f", {note}" if note else "")
            bar.update(task, completed=already + items, rate=rate)
            if bar.disable and processes.is_main_process() and now - spoken > SECONDS_BETWEEN_LINES:
                spoken = now
                left = (total - already - items) * (now - begun) / max(items, 1)
                ending = "" if responses and items < (total - already) / 4 else f", {left:.0f} s left"
                name = f"{total} {responses}".strip()
                log.info("%s %d/%s, %s%s", what, already + items, name, rate, ending)

        yield advance
