"""Print text that a model or a data set wrote, without letting it control the terminal."""

import os
import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    r"""Replace control characters by their codes (`\x1b`), except tabs and line feeds."""
    return CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def console(width: int) -> "Console":
    """Return a console on standard output that prints text literally: no markup, no emoji codes, no highlighting.

    Args:
        width: characters, if standard output is not a terminal and COLUMNS is not a positive number.
    """
    from rich.console import Console

    columns = os.environ.get("COLUMNS", "")
    if columns.isascii() and columns.isdigit() and int(columns) > 0:
        width = int(columns)
    return Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else width)
