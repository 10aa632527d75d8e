"""What appears on the terminal: no control characters from a model or a data set, and no noise of libraries."""

import logging
import os
import re
import sys
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

QUIET_LIBRARIES = (
    *("transformers", "huggingface_hub", "httpx", "httpx2", "accelerate", "datasets", "peft", "lm_eval"),
    "bitsandbytes",
)
"""Libraries whose log lines are shown only if they are errors."""

ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",  # hides a line for every retry
    "TOKENIZERS_PARALLELISM": "false",
}
"""Variables that make libraries quiet, unless the user has set them."""

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


def quiet_libraries() -> None:
    """Silence progress bars, warnings and log lines of libraries. Call this before the libraries are imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning)  # libraries warn about each other
    warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm, in a notebook without ipywidgets
    for library in QUIET_LIBRARIES:
        logging.getLogger(library).setLevel(logging.ERROR)
