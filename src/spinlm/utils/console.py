"""What others have written (a model, a data set) on a terminal: to be read, and without the power to command it."""

import os
import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    r"""The text with control characters as their codes (`\x1b`), but for tabs and ends of lines."""
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def console(width: int) -> "Console":
    """Standard output for tables and text that is shown as it is: no markup, no emoji codes, nothing highlighted.

    Args:
        width: where it is no terminal, and COLUMNS does not say how wide it shall be.
    """
    from rich.console import Console

    asked = os.environ.get("COLUMNS", "")
    if asked.isascii() and asked.isdigit() and int(asked) > 0:
        width = int(asked)
    return Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else width)
