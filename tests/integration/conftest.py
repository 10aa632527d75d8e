"""A tiny model, one finished run, and the command line."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import Cli, Request, serving
from runs import ITERATIONS, RECIPE, World, rows, steps, write_rows

from models import save_tiny_model


@pytest.fixture(scope="session")
def server() -> Iterator[Request]:
    with serving() as ask:
        yield ask


@pytest.fixture(scope="session")
def session_cli(server, tmp_path_factory) -> Iterator[Cli]:
    """As `cli`, for fixtures with session scope."""
    yield from _cli(server, tmp_path_factory.mktemp("streams"))


@pytest.fixture
def cli(server, tmp_path_factory) -> Iterator[Cli]:
    """Run commands. Processes still running after the test are killed."""
    yield from _cli(server, tmp_path_factory.mktemp("streams"))


@pytest.fixture(scope="session")
def filling(tmp_path_factory) -> Iterator[Cli]:
    """Run commands on a disk that fills up as their environment says: see full_disk.c."""
    yield from _under("full_disk", tmp_path_factory)


@pytest.fixture(scope="session")
def jumping(tmp_path_factory) -> Iterator[Cli]:
    """Run commands with a clock that jumps as their environment says: see jumping_clock.c."""
    yield from _under("jumping_clock", tmp_path_factory)


def _under(name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    """Run commands with a preloaded library that replaces system calls."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler and Linux, to replace system calls")
    source, library = Path(__file__).with_name(f"{name}.c"), tmp_path_factory.mktemp(name) / f"{name}.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    with serving(LD_PRELOAD=str(library)) as ask:
        yield from _cli(ask, tmp_path_factory.mktemp("streams"))


def _cli(server: Any, streams: Path) -> Iterator[Cli]:
    cli = Cli(server, streams)
    yield cli
    for process in cli.started:
        process.send(signal.SIGKILL)


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    """Shared by all tests: do not write to it."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_model(folder / "model")
    write_rows(folder / "data.jsonl", rows())
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return World(folder, folder / "recipe.yaml", folder / "model")


@pytest.fixture(scope="session")
def reference(world, tmp_path_factory) -> Path:
    """A finished, undisturbed run. Copy it before changing it."""
    run = tmp_path_factory.mktemp("reference") / "run"
    command = [sys.executable, "-m", "spinlm", "run", str(world.recipe), "--run-dir", str(run)]
    done = subprocess.run(command, cwd=world.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture
def rewind(tmp_path) -> Callable[..., Path]:
    """Copy a finished run and undo it back to an iteration, or to a stage of it."""

    def rewind(reference: Path, iteration: int, stage: str = "generate") -> Path:
        run = tmp_path / "run"
        shutil.copytree(reference, run, symlinks=True)
        for later in range(iteration + 1, ITERATIONS):
            shutil.rmtree(run / f"iteration-{later}")
            shutil.rmtree(run / ".spinlm" / f"iteration-{later}")
        stages = ("generate", "reference_logprobs", "regime", "train", "evaluate", "promote")
        for undone in stages[stages.index(stage) :]:
            (run / ".spinlm" / f"iteration-{iteration}" / f"{undone}.done").unlink()
            for name in UNDO[undone]:
                path = run / f"iteration-{iteration}" / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        before = [line for line in steps(run) if line["stage"] != "train" or line["iteration"] < iteration]
        kept = [line for line in steps(run) if line["iteration"] == iteration] if stage in stages[4:] else []
        write_rows(run / "train_log.jsonl", before + kept)
        (run / "best").unlink()
        if iteration > 0:
            best = json.loads((run / ".spinlm" / f"iteration-{iteration - 1}" / "promote.done").read_text())["best"]
            (run / "best").symlink_to("start" if best < 0 else f"iteration-{best}")
        return run

    return rewind


@pytest.fixture
def rewound(reference, rewind) -> Callable[..., Path]:
    """As `rewind`, from the reference run."""
    return lambda iteration, stage="generate": rewind(reference, iteration, stage)


@pytest.fixture
def stopped_in_training(world, cli, rewound) -> Path:
    """A run killed in the last training, with a checkpoint."""
    from test_kill import between_checkpoints, catch

    command = ("run", world.recipe, "--run-dir")
    run, process = catch(
        lambda run: cli.start(*command, run, folder=world.folder),
        lambda: rewound(1),
        lambda run: between_checkpoints(run, "train", 1),
    )
    process.kill()
    return run


UNDO = {
    "generate": ("generations",),
    "reference_logprobs": ("pairs",),
    "regime": ("regime.json",),
    "train": ("player",),
    "evaluate": ("heldout_greedy.jsonl", "heldout_sampled.jsonl", "eval.json"),
    "promote": ("selection.json",),
}
