"""A tiny model, a recipe, one finished run, and the real command line in processes of its own.

Importing torch and transformers takes seconds. So a server imports them once and forks for every command; the child runs
`python -m spinlm` from there, with its own arguments, standard streams, signals and exit code. The finished run that
others are compared with comes from a plain `python -m spinlm`.
"""

import contextlib
import hashlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PATIENCE = 60  # seconds until a process that should have got somewhere counts as stuck


# The server: this file, run as a program


def serve() -> None:
    """Obey one JSON request a line: `start` forks a command and answers its pid, `poll` answers its exit code."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import datasets  # noqa: F401
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import spinlm.chat
    import spinlm.check
    import spinlm.cli
    import spinlm.export
    import spinlm.plan
    import spinlm.selfplay
    import spinlm.summary  # noqa: F401
    from models import save_tiny_model

    with tempfile.TemporaryDirectory() as folder:  # the first model a process loads takes longer than the second
        save_tiny_model(Path(folder))
        AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
        model(torch.zeros(1, 2, dtype=torch.long)).logits.sum().backward()
        model.save_pretrained(folder)

    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
            continue
        child = os.fork()
        if child == 0:
            for number, path in ((0, "/dev/null"), (1, request["stdout"]), (2, request["stderr"])):
                os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644), number)
            os.chdir(request["folder"])
            sys.argv = ["spinlm", *request["arguments"]]
            return runpy.run_module("spinlm", run_name="__main__", alter_sys=True)
        print(json.dumps(child), flush=True)


if __name__ == "__main__":
    serve()
    sys.exit()


# Processes


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

    def __init__(self, ask: Callable[[dict[str, Any]], Any], arguments: list[str], folder: Path, streams: Path):
        streams.mkdir(parents=True)
        self._ask, self._out, self._err = ask, streams / "out", streams / "err"
        self.arguments = arguments
        request = {"arguments": arguments, "folder": str(folder), "stdout": str(self._out), "stderr": str(self._err)}
        self.pid: int = ask({"start": True, **request})
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
            assert time.monotonic() < deadline, f"{self.arguments} is stuck:\n{self._err.read_text()}"
            time.sleep(every)

    def kill(self) -> None:
        """SIGKILL, as the power going out would do it to a process."""
        self.send(signal.SIGKILL)
        assert self.wait().code == -signal.SIGKILL


class Cli:
    """Starts commands in a folder."""

    def __init__(self, ask: Callable[[dict[str, Any]], Any], streams: Path):
        self._ask, self._streams = ask, streams
        self.started: list[Process] = []

    def start(self, *arguments: str | Path, folder: Path) -> Process:
        """Start a command without waiting for it."""
        streams = self._streams / str(len(self.started))
        process = Process(self._ask, [str(argument) for argument in arguments], folder, streams)
        self.started.append(process)
        return process

    def __call__(self, *arguments: str | Path, folder: Path, code: int = 0) -> Result:
        """Run a command to its end, and expect this exit code."""
        result = self.start(*arguments, folder=folder).wait()
        assert result.code == code, f"{arguments}: exit code {result.code}\n{result.out}\n{result.err}"
        return result


@pytest.fixture(scope="session")
def server() -> Iterator[Callable[[dict[str, Any]], Any]]:
    command = [sys.executable, __file__]
    environment = os.environ | {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
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


@pytest.fixture(scope="session")
def session_cli(server, tmp_path_factory) -> Iterator[Cli]:
    """As `cli`, for fixtures that live as long as the session."""
    yield from _cli(server, tmp_path_factory.mktemp("streams"))


@pytest.fixture
def cli(server, tmp_path_factory) -> Iterator[Cli]:
    """Runs commands; what a test leaves running is killed."""
    yield from _cli(server, tmp_path_factory.mktemp("streams"))


def _cli(server: Any, streams: Path) -> Iterator[Cli]:
    cli = Cli(server, streams)
    yield cli
    for process in cli.started:
        process.send(signal.SIGKILL)


# A model, data and a recipe

RECIPE = """\
# a tiny recipe
model: {path: model}
lora: {r: 4, alpha: 8, dropout: 0.1}
data: {path: data.jsonl, prompts: 24, heldout: 10}
warmup_sft: {epochs: 3, learning_rate: 2e-2, batch_size: 4}
opponent: {max_new_tokens: 6, shard_size: 4, batch_size: 4, temperature: 0.4}
selfplay: {iterations: 2}
train:
  {epochs: 2, batch_size: 4, learning_rate: 2e-3, optimizer: adamw, max_length: 64, tokens_per_micro_batch: 128,
   checkpoint_every: 5}
evaluate: {scorer: exact_match}
"""
PROMPTS, HELDOUT, ITERATIONS, CHECKPOINT_EVERY, SHARDS = 24, 10, 2, 5, 6


def write_rows(path: Path, rows: list[Any]) -> Path:
    """A JSON-lines file; a row that is text already is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def rows() -> list[dict[str, str]]:
    """48 rows, of which twelve repeat the prompt of another with another response."""
    answers = ("Paris", "Yes", "red", "three")
    first = [{"prompt": f"What is {n}?", "response": answers[n % 4]} for n in range(36)]
    return first + [{"prompt": f"What is {n}?", "response": "green"} for n in range(0, 36, 3)]


@dataclass(frozen=True)
class World:
    """A folder with a model, data and a recipe, as a user would have it."""

    folder: Path
    recipe: Path
    model: Path


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    """Shared by all tests, so nobody writes to it. Runs go elsewhere."""
    from models import save_tiny_model

    folder = tmp_path_factory.mktemp("world")
    save_tiny_model(folder / "model")
    write_rows(folder / "data.jsonl", rows())
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return World(folder, folder / "recipe.yaml", folder / "model")


@pytest.fixture(scope="session")
def reference(world, tmp_path_factory) -> Path:
    """A finished run, by a process that nobody disturbed. Copy it before you change it."""
    run = tmp_path_factory.mktemp("reference") / "run"
    command = [sys.executable, "-m", "spinlm", "run", str(world.recipe), "--run-dir", str(run)]
    done = subprocess.run(command, cwd=world.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture
def rewound(reference, tmp_path) -> Callable[..., Path]:
    """Makes a run that stopped before an iteration, or before a stage of it."""

    def rewind(iteration: int, stage: str = "generate") -> Path:
        run = tmp_path / "run"
        shutil.copytree(reference, run, symlinks=True)
        for later in range(iteration + 1, ITERATIONS):
            shutil.rmtree(run / f"iteration-{later}")
        stages = ("generate", "score", "train", "evaluate", "promote")
        for undone in stages[stages.index(stage) :]:
            for name in UNDO[undone]:
                path = run / f"iteration-{iteration}" / name
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        before = [line for line in steps(run) if line["stage"] != "train" or line["iteration"] < iteration]
        kept = [line for line in steps(run) if line["iteration"] == iteration] if stage in stages[3:] else []
        write_rows(run / "metrics.jsonl", before + kept)
        (run / "best").unlink()
        if iteration > 0:
            best = json.loads((run / f"iteration-{iteration - 1}" / "promote.done").read_text())["best"]
            (run / "best").symlink_to("start" if best < 0 else f"iteration-{best}")
        return run

    return rewind


UNDO = {
    "generate": ("generations", "generate.done"),
    "score": ("pairs", "score.done"),
    "train": ("checkpoints", "player", "train.done"),
    "evaluate": ("answers.jsonl", "metrics.json", "evaluate.done"),
    "promote": ("promotion.json", "promote.done"),
}


# Looking at run folders


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_jsons(folder: Path, pattern: str) -> list[dict[str, Any]]:
    """The records of all files that match, in order."""
    return [row for path in sorted(folder.glob(pattern)) for row in read_rows(path)]


def read_pairs(run: Path, iteration: int, split: str) -> list[dict[str, Any]]:
    import datasets

    files = sorted((run / f"iteration-{iteration}" / "pairs").glob(f"{split}-*.arrow"))
    return [dict(row) for file in files for row in datasets.Dataset.from_file(str(file))]


def steps(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, as far as they are complete."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def contents(run: Path) -> dict[str, str]:
    """Digest of every file of a run, without what a clock or a process number decides."""
    found = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file() and name not in ("lock", "provenance.json", "metrics.jsonl"):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    timeless = [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in steps(run)]
    return found | {"metrics.jsonl": json.dumps(timeless)}


def assert_whole(run: Path) -> None:
    """Every file under its final name is complete."""
    from safetensors.torch import load_file

    for path in run.rglob("*"):
        if path.is_dir() or any(part.startswith(".") for part in path.relative_to(run).parts):
            continue
        if path.suffix == ".jsonl":
            text = path.read_text(encoding="utf-8")
            assert not text or text.endswith("\n"), path
            read_rows(path)
        elif path.suffix in (".json", ".done"):
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".arrow":
            import datasets

            datasets.Dataset.from_file(str(path))


@contextlib.contextmanager
def fifo(path: Path) -> Iterator[Path]:
    """A pipe without a reader: whoever opens it to write stops there, until it is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


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
