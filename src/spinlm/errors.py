"""Everything that can go wrong on the user's side, as one family of exceptions.

An error says what happened, where, and what to do. The command line shows it without a traceback and exits with
`exit_code`.
"""


class SpinError(Exception):
    """Base of every error that is meant to be read by a user."""

    exit_code = 2


class RecipeError(SpinError, ValueError):
    """The recipe, or an override on the command line, is wrong."""


class DataError(SpinError, ValueError):
    """A data file or a row of it cannot be used."""


class ModelError(SpinError, ValueError):
    """The model or its tokenizer cannot be used."""


class RunError(SpinError, RuntimeError):
    """The run folder is in use, damaged, or was made from something else."""


class PeerError(RunError):
    """Another process of the run has ended it; that one says why."""


class TrainingError(SpinError, ArithmeticError):
    """Training produced a number that is not finite."""


class MissingPackageError(SpinError, ImportError):
    """An optional package is needed; the message holds the install command."""


class StoppedError(SpinError):
    """The user pressed Ctrl-C or the process was asked to end; the run can be continued."""

    exit_code = 130


class RowError(Exception):
    """A row cannot be used, but the rest of the data can. `reason` is the snake_case name under which it is counted."""

    def __init__(self, reason: str, detail: str):
        super().__init__(shortened(detail))
        self.reason = reason


def shortened(text: str, most: int = 200) -> str:
    """The beginning of a text that may be as long as its author liked."""
    return text if len(text) <= most else f"{text[:most]}…"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether too little memory was found, on a GPU or for a CPU tensor, by whichever library."""
    signs = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(sign in str(error) for sign in signs)
    )
