"""The real command line, in processes of its own that start quickly.

Importing torch and transformers takes seconds. So a server imports them once and forks for every command. The child
runs what `python -m spinlm` runs, with its own arguments, standard streams, signals and exit code.
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
PATIENCE = 60  # seconds until a process that should have got somewhere counts as stuck

Ask = Callable[[dict[str, Any]], Any]
"""Sends a request to the server and returns its answer."""


@dataclass
class Result:
    """How a command ended."""

    code: int  # minus the signal's number if one ended it
    out: str
    err: str

    @property
    def message(self) -> str:
        """What the command told the user about its failure: the one message, to its end."""
        assert "Traceback" not in self.err, self.err
        assert self.err.count("spinlm: ") == 1, self.err
        return self.err[self.err.index("spinlm: ") :].removeprefix("spinlm: ").strip()


class Process:
    """A command that is running."""

    def __init__(self, ask: Ask, arguments: list[str], folder: Path, streams: Path, environment: dict[str, str]):
        streams.mkdir(parents=True)
        self._ask, self._out, self._err = ask, streams / "out", streams / "err"
        self.arguments = arguments
        places = {"folder": str(folder), "stdout": str(self._out), "stderr": str(self._err)}
        self.pid: int = ask({"arguments": arguments, **places, "environment": environment})
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self._code is None:
            self._code = self._ask({"poll": self.pid})
        return self._code

    def send(self, number: signal.Signals) -> None:
        """Send a signal, unless the process has ended (its number might be another's by now)."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self) -> Result:
        """Wait for the end."""
        self.wait_until(lambda: self.poll() is not None, every=0.02)
        assert self._code is not None
        return Result(self._code, self._out.read_text(), self._err.read_text())

    def wait_until(self, happened: Callable[[], bool], every: float = 0.002) -> None:
        """Wait for something that this process is to bring about, and look for it so often (in seconds)."""
        deadline = time.monotonic() + PATIENCE
        while not happened():
            ended = self.poll()
            assert ended is None or happened(), f"{self.arguments} ended ({ended}) first:\n{self._err.read_text()}"
            assert time.monotonic() < deadline, f"{self.arguments} is stuck:\n{self._stacks()}"
            time.sleep(every)

    def _stacks(self) -> str:
        """What the process has said, and where its threads are; ends it."""
        self.send(signal.SIGABRT)
        deadline = time.monotonic() + 5
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return self._err.read_text()

    def kill(self) -> None:
        """SIGKILL, as the power going out would do it to a process."""
        self.send(signal.SIGKILL)
        assert self.wait().code == -signal.SIGKILL


class Cli:
    """Starts commands in a folder."""

    def __init__(self, ask: Ask, streams: Path):
        self._ask, self._streams = ask, streams
        self.started: list[Process] = []

    def start(self, *arguments: str | Path, folder: Path, **environment: str) -> Process:
        """Start a command without waiting for it."""
        streams = self._streams / str(len(self.started))
        process = Process(self._ask, [str(argument) for argument in arguments], folder, streams, environment)
        self.started.append(process)
        return process

    def __call__(self, *arguments: str | Path, folder: Path, code: int = 0, **environment: str) -> Result:
        """Run a command to its end, and expect this exit code."""
        result = self.start(*arguments, folder=folder, **environment).wait()
        assert result.code == code, f"{arguments}: exit code {result.code}\n{result.out}\n{result.err}"
        return result


def asleep(pid: int) -> bool:
    """Whether a process waits for something, such as the reader of a pipe, rather than computes."""
    for _ in range(3):
        if state(pid) != "S":
            return False
        time.sleep(0.005)
    return True


def state(pid: int) -> str:
    """R runs, S sleeps, D waits for the disk, T is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@contextlib.contextmanager
def serving(**environment: str) -> Iterator[Ask]:
    """A server of commands, with changes to the environment."""
    command = [sys.executable, __file__]
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    inherited = {name: value for name, value in os.environ.items() if name != "COLUMNS"}  # which pytest's workers have
    whole = inherited | quiet | environment
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=whole, start_new_session=True
    ) as process:
        assert process.stdin and process.stdout
        assert process.stdout.readline() == "ready\n"

        def ask(request: dict[str, Any]) -> Any:
            assert process.stdin and process.stdout
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()


def serve() -> None:
    """Obey one JSON request a line: `start` forks a command and answers its pid, `poll` answers its exit code."""
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # children need not look at all this again
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                obey(**request)
        print(json.dumps(answer), flush=True)


def obey(arguments: list[str], folder: str, stdout: str, stderr: str, environment: dict[str, str]) -> NoReturn:
    """Become a command. Taking the imported modules down would last longer than most commands, so that is left out."""
    for number, path in ((0, "/dev/null"), (1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644), number)
    faulthandler.enable()
    os.chdir(folder)
    os.environ.update(environment)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(":")  # which is read when Python starts
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
