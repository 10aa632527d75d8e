"""The real command line, in processes that start quickly.

Importing torch and transformers takes seconds. A server imports them once and forks for every command. The child runs
what `python -m spinlm` runs, with separate arguments, standard streams, signals and exit code.
"""

import atexit
import contextlib
import faulthandler
import gc
import importlib.util
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

PRELOADED = (
    *("datasets", "peft", "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto"),
    *("transformers.models.llama.modeling_llama", "transformers.models.gpt_neo.modeling_gpt_neo"),
    *(f"spinlm.{name}" for name in ("chat", "check", "cli.app", "export.player", "plan", "selfplay", "report.summary")),
)
TIMEOUT = 60  # seconds to wait for a process

Request = Callable[[dict[str, Any]], Any]
"""Send a request to the server and return its reply."""


@dataclass
class Result:
    """The outcome of a command."""

    code: int  # negative: the number of the signal that ended it
    out: str
    err: str

    @property
    def message(self) -> str:
        """The one error message of the command."""
        assert "Traceback" not in self.err, self.err
        assert self.err.count("spinlm: ") == 1, self.err
        return self.err[self.err.index("spinlm: ") :].removeprefix("spinlm: ").strip()


class Process:
    """A running command."""

    def __init__(
        self, request: Request, arguments: list[str], folder: Path, streams: Path, environment: dict[str, str]
    ):
        streams.mkdir(parents=True)
        self._request, self._out, self._err = request, streams / "out", streams / "err"
        self.arguments = arguments
        places = {"folder": str(folder), "stdout": str(self._out), "stderr": str(self._err)}
        self.pid: int = request({"arguments": arguments, **places, "environment": environment})
        self._code: int | None = None
        self.timeout = TIMEOUT

    def poll(self) -> int | None:
        """Return the exit code, or None while the command runs."""
        if self._code is None:
            self._code = self._request({"poll": self.pid})
        return self._code

    def send(self, number: signal.Signals) -> None:
        """Send a signal, unless the process has ended and its pid may be reused."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self) -> Result:
        """Wait until the command ends."""
        self.wait_until(lambda: self.poll() is not None, every=0.02)
        assert self._code is not None
        return Result(self._code, self._out.read_text(), self._err.read_text())

    def wait_until(self, condition: Callable[[], bool], every: float = 0.002) -> None:
        """Wait until a condition holds; test it every `every` seconds. Fail if the process ends first."""
        deadline = time.monotonic() + self.timeout
        while not condition():
            ended = self.poll()
            assert ended is None or condition(), f"{self.arguments} ended ({ended}) first:\n{self._err.read_text()}"
            assert time.monotonic() < deadline, f"{self.arguments} is stuck:\n{self._stacks()}"
            time.sleep(every)

    def _stacks(self) -> str:
        """End the process; return its standard error with the stacks of its threads."""
        self.send(signal.SIGABRT)
        deadline = time.monotonic() + 5
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return self._err.read_text()

    def kill(self) -> None:
        """Send SIGKILL, as if the power failed."""
        self.send(signal.SIGKILL)
        assert self.wait().code == -signal.SIGKILL


class Cli:
    """Start commands in a folder."""

    def __init__(self, request: Request, streams: Path):
        self._request, self._streams = request, streams
        self.started: list[Process] = []

    def start(self, *arguments: str | Path, folder: Path, **environment: str) -> Process:
        """Start a command without waiting for it."""
        streams = self._streams / str(len(self.started))
        process = Process(self._request, [str(argument) for argument in arguments], folder, streams, environment)
        self.started.append(process)
        return process

    def __call__(self, *arguments: str | Path, folder: Path, code: int = 0, **environment: str) -> Result:
        """Run a command to its end, and expect this exit code."""
        result = self.start(*arguments, folder=folder, **environment).wait()
        assert result.code == code, f"{arguments}: exit code {result.code}\n{result.out}\n{result.err}"
        return result


def asleep(pid: int) -> bool:
    """Whether a process waits, for example for the reader of a pipe."""
    for _ in range(3):
        if state(pid) != "S":
            return False
        time.sleep(0.005)
    return True


def state(pid: int) -> str:
    """Return the state of a process: R runs, S sleeps, D waits for the disk, T is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@contextlib.contextmanager
def serving(**environment: str) -> Iterator[Request]:
    """Start a server of commands, with changes to the environment."""
    command = [sys.executable, __file__]
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    inherited = {name: value for name, value in os.environ.items() if name != "COLUMNS"}  # pytest's workers set it
    whole = inherited | quiet | environment
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=whole, start_new_session=True
    ) as process:
        assert process.stdin and process.stdout
        assert process.stdout.readline() == "ready\n"

        def send(request: dict[str, Any]) -> Any:
            assert process.stdin and process.stdout
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield send
        process.stdin.close()


def serve() -> None:
    """Serve one JSON request per line: a command is forked and its pid returned, `poll` returns the exit code."""
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # children do not collect these objects
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            reply = os.waitstatus_to_exitcode(status) if pid else None
        else:
            reply = os.fork()
            if reply == 0:
                run_command(**request)
        print(json.dumps(reply), flush=True)


def run_command(arguments: list[str], folder: str, stdout: str, stderr: str, environment: dict[str, str]) -> NoReturn:
    """Run a command in the forked child. Skip the slow teardown of imported modules."""
    for number, path in ((0, "/dev/null"), (1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644), number)
    faulthandler.enable()
    os.chdir(folder)
    os.environ.update(environment)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(":")  # Python reads the variable only when it starts
    sys.argv = ["spinlm", *arguments]
    code: Any = 0
    try:
        runpy.run_module("spinlm", run_name="__main__", alter_sys=True)
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    serve()
