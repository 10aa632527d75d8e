"""The command line: the list of commands, and how errors are shown. Commands import heavy modules when they run."""

import errno
import io
import logging
import os
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from spinlm.cli import benchmark, inspect, run, starter
from spinlm.errors import PeerError, SpinError, is_out_of_memory
from spinlm.utils.atomic import STORAGE_ERRNOS
from spinlm.utils.console import printable, quiet_libraries
from spinlm.utils.hardware import limit_spinning

app = typer.Typer(
    name="spinlm",
    help="Improve a fine-tuned language model by self-play (SPIN, arXiv 2401.01335) on its own training data.",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help starts in half the time
    add_completion=False,
    pretty_exceptions_enable=False,
)

PATH_ERRNOS = (errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG)
"""Errors of a path that names no possible file."""


@app.callback(invoke_without_command=True)
def _root(show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if show_version:
        print(f"spinlm {version('spinlm')}")
        raise typer.Exit


app.command()(starter.init)
app.command()(run.plan)
app.command()(run.check)
app.command()(run.run)
app.command()(inspect.status)
app.command()(inspect.compare)
app.command("list")(inspect.list_runs)
app.command()(inspect.report)
app.command()(inspect.chat)
app.command()(inspect.export)
app.command()(benchmark.benchmark)
app.command()(benchmark.mt_bench)
app.command()(run.extrapolate)
app.command()(run.generate)
app.command()(run.reference_logprobs)
app.command()(run.regime)
app.command()(run.train)
app.command()(run.evaluate)


def main() -> None:
    """Run the command line. Print an error that is meant for the user without a traceback, and exit with its code."""
    _configure_output()
    try:
        app()
    except PeerError as error:  # the process that failed prints the cause
        sys.exit(error.exit_code)
    except (SpinError, RuntimeError, MemoryError, OSError) as error:
        message = _error_message(error)
        if message is None:
            raise
        print(f"spinlm: {message}", file=sys.stderr)
        sys.exit(error.exit_code if isinstance(error, SpinError) else SpinError.exit_code)


def _configure_output() -> None:
    """Set up logging, the encoding of the streams, and the verbosity of libraries."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # spinlm shows its own progress
    quiet_libraries()
    limit_spinning()
    for stream in (sys.stdout, sys.stderr):  # a stream that is not UTF-8 shows ? for what it cannot encode
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    main_process = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s", level=logging.INFO if main_process else logging.ERROR, stream=sys.stderr)


def _error_message(error: Exception) -> str | None:
    """Return the message for the user, or None if the error is a bug and needs a traceback."""
    if isinstance(error, SpinError):
        return printable(str(error))
    if is_out_of_memory(error):
        cause = (str(error) or "MemoryError").splitlines()[0]
        return (
            f"out of memory ({cause}). Lower train.tokens_per_micro_batch or opponent.batch_size, or set "
            "train.gradient_checkpointing: true. Then run the same command again: the run continues"
        )
    if isinstance(error, OSError) and error.errno in STORAGE_ERRNOS:
        path = error.filename or "the run folder"
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fault, remedy = ("the disk is full", "Free space") if full else ("cannot write there", "Correct this")
        return (
            f"{path}: {fault} ({error.strerror}). {remedy} or choose another --run-dir, then run the same command "
            "again: finished work is kept"
        )
    if isinstance(error, OSError) and error.errno in PATH_ERRNOS and error.filename:
        return printable(f"{error.filename}: cannot be used as a path ({error.strerror}). Choose another one")
    return None
