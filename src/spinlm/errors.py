"""Errors for the user. A message says what happened, where, and what to do.

The command line prints the message without a traceback and exits with `exit_code`.
"""


class SpinError(Exception):
    """Base class of all errors for the user."""

    exit_code = 2

    def _render_traceback_(self) -> list[str]:
        """Let notebooks show the message without a traceback."""
        return [f"{type(self).__name__}: {self}"]


class RecipeError(SpinError, ValueError):
    """The recipe, or an override on the command line, is wrong."""


class DataError(SpinError, ValueError):
    """A data file, or a row of it, cannot be used."""


class ModelError(SpinError, ValueError):
    """The model or its tokenizer cannot be used."""


class RunError(SpinError, RuntimeError):
    """The run folder is in use, damaged, or was made from something else."""


class PeerError(RunError):
    """Another process of the run failed. That process prints the error."""


class TrainingError(SpinError, ArithmeticError):
    """Training produced NaN or an infinity."""


class MissingPackageError(SpinError, ImportError):
    """An optional package is not installed. The message holds the install command."""


class StoppedError(SpinError):
    """Ctrl-C or SIGTERM stopped the run. The run can be continued."""

    exit_code = 130


class RowError(Exception):
    """A row cannot be used, but the rest of the data can. `reason` is the snake_case name under which it is counted."""

    def __init__(self, reason: str, detail: str):
        super().__init__(shortened(detail, 240))
        self.reason = reason


def shortened(text: str, limit: int = 200) -> str:
    """Cut a text to `limit` characters."""
    return text if len(text) <= limit else f"{text[:limit]}…"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means too little memory, on a GPU or for a CPU tensor."""
    signs = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(sign in str(error) for sign in signs)
    )
