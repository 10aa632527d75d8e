"""A run that is killed or interrupted anywhere and started again ends as if nothing had happened, to the bit."""

import json
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Cli, Process, asleep, state
from runs import CHECKPOINT_EVERY, World, assert_whole, fifo, read_rows, steps

LAST = "iteration-1"
STOPPED = "stopped as asked; run the same command again to continue"


@pytest.fixture
def start(world: World, cli: Cli) -> Callable[[Path], Process]:
    """Starts `spinlm run` on a run folder."""
    return lambda run: cli.start("run", world.recipe, "--run-dir", run, folder=world.folder)


def assert_same_result(run: Path, reference: Path) -> None:
    """The last player, its answers and what was measured are those of the run that nobody disturbed."""
    for name in ("player/adapter_model.safetensors", "answers.jsonl", "metrics.json", "promotion.json"):
        for folder in ("iteration-0", LAST):
            assert (run / folder / name).read_bytes() == (reference / folder / name).read_bytes(), (folder, name)
    for kind in ("generations/*.jsonl", "pairs/*.arrow"):
        expected = {path.name: path.read_bytes() for path in (reference / LAST).glob(kind)}
        assert {path.name: path.read_bytes() for path in (run / LAST).glob(kind)} == expected
    assert timeless(run) == timeless(reference)
    assert (run / "best").readlink() == (reference / "best").readlink()
    assert not [path for path in run.rglob("*.tmp")]


def timeless(run: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, each step once and in order."""
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in steps(run)]


def count_steps(run: Path, stage: str, iteration: int) -> int:
    return sum((line["stage"], line["iteration"]) == (stage, iteration) for line in steps(run))


def stop_between_checkpoints(process: Process, run: Path, stage: str, iteration: int) -> bool:
    """Hold a process still when it has trained beyond a checkpoint and is not at the next; False if it was too fast."""
    folder = run / ("start" if iteration < 0 else f"iteration-{iteration}")

    def checkpoint() -> int:
        return max((int(path.name.removeprefix("step-")) for path in folder.glob("checkpoints/step-*")), default=0)

    while not (folder / f"{stage}.done").exists():
        process.wait_until(lambda: count_steps(run, stage, iteration) > checkpoint() > 0 or process.poll() is not None)
        if process.poll() is not None:
            return False
        process.send(signal.SIGSTOP)
        process.wait_until(lambda: state(process.pid) == "T")
        if count_steps(run, stage, iteration) % CHECKPOINT_EVERY and checkpoint() and not (folder / "player").exists():
            return True
        process.send(signal.SIGCONT)
        time.sleep(0.002)
    return False


def in_training(
    start: Callable[[Path], Process], rewind: Callable[[], Path], stage: str, iteration: int
) -> tuple[Path, Process]:
    """A run that is held still in the middle of training. A machine may be too busy to catch it: then try again."""
    for _ in range(5):
        run = rewind()
        process = start(run)
        if stop_between_checkpoints(process, run, stage, iteration):
            return run, process
        process.wait()
    pytest.fail("never caught the process in the middle of training")


@pytest.mark.parametrize(
    ("stage", "held", "when"),
    [
        ("generate", "generations/.train-00003.jsonl.tmp", "generations/train-00002.jsonl"),
        ("score", "pairs/.train-00003.arrow.tmp", "pairs/train-00002.arrow"),
        ("evaluate", ".answers.jsonl.tmp", "train.done"),
        ("evaluate", ".evaluate.done.tmp", "metrics.json"),
        ("train", ".train.done.tmp", "player"),  # the player is in place, the marker is not
    ],
)
def test_killed_while_writing(start, reference, rewound, stage, held, when):
    run = rewound(iteration=1)
    with fifo(run / LAST / held):  # the process waits there for a reader, so it cannot get past this point
        process = start(run)
        process.wait_until(lambda: (run / LAST / when).exists() and asleep(process.pid))
        process.kill()
    assert not (run / LAST / f"{stage}.done").exists()
    assert_whole(run)
    (run / LAST / held).write_text('{"half a li')  # what a process leaves that is killed in the middle of a write
    assert start(run).wait().code == 0
    assert_same_result(run, reference)


def test_killed_in_training(start, reference, rewound, tmp_path):
    def rewind() -> Path:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return rewound(iteration=1)

    run, process = in_training(start, rewind, "train", 1)
    process.kill()
    assert not (run / LAST / "train.done").exists()
    done = count_steps(run, "train", 1)
    epoch = 24 // 2
    assert done % CHECKPOINT_EVERY and done % epoch, "in the middle of an epoch and between checkpoints"
    assert_whole(run)
    # What a process leaves that is killed in the middle of a write.
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "train", "iteration": 1, "st')
    half = run / LAST / "checkpoints" / ".step-000099.tmp"
    half.mkdir()
    (half / "weights.safetensors").write_bytes(b"half")
    (run / LAST / ".player.tmp").mkdir()
    (run / LAST / ".player.tmp" / "adapter_model.safetensors").write_bytes(b"half")

    again = start(run).wait()
    assert re.search(r"resuming after step (\d+)", again.err)[1] == str(done // CHECKPOINT_EVERY * CHECKPOINT_EVERY)
    shutil.rmtree(half)
    assert_same_result(run, reference)


def test_killed_in_warmup(start, world, reference, tmp_path):
    def rewind() -> Path:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return tmp_path / "run"

    run, process = in_training(start, rewind, "warmup", -1)
    process.kill()
    assert not (run / "start" / "warmup.done").exists()
    assert not (run / "iteration-0").exists()
    again = start(run).wait()
    assert "resuming after step" in again.err
    assert again.code == 0
    assert_same_result(run, reference)
    for name in ("player/adapter_model.safetensors", "warmup.done", "answers.jsonl"):
        assert (run / "start" / name).read_bytes() == (reference / "start" / name).read_bytes(), name


def test_killed_again_and_again(start, reference, rewound):
    """At no particular moment."""
    run = rewound(iteration=1)
    for attempt in range(20):
        process = start(run)
        deadline = time.monotonic() + 0.3 + 0.1 * attempt
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        if process.poll() is not None:
            break
        process.kill()
        assert_whole(run)
    assert process.wait().code == 0
    assert attempt > 2, "the test means little when the run is not killed"
    assert_same_result(run, reference)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_in_training(start, reference, rewound, tmp_path, number):
    def rewind() -> Path:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return rewound(iteration=1)

    run, process = in_training(start, rewind, "train", 1)
    done = count_steps(run, "train", 1)
    process.send(number)
    process.send(signal.SIGCONT)
    stopped = process.wait()
    assert stopped.code == 130
    assert stopped.message == STOPPED
    after = count_steps(run, "train", 1)
    assert done <= after <= done + 1, "a step that was under way is finished or dropped, and no other begun"
    (checkpoint,) = (run / LAST / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{after:06d}"
    assert not (run / LAST / "train.done").exists()
    assert_whole(run)
    again = start(run).wait()
    assert f"resuming after step {after}" in again.err
    assert_same_result(run, reference)


def test_interrupted_in_generation(start, reference, rewound):
    run = rewound(iteration=1)
    with fifo(run / LAST / "generations" / ".train-00001.jsonl.tmp") as pipe:
        process = start(run)
        process.wait_until(lambda: (run / LAST / "generations" / "train-00000.jsonl").exists() and asleep(process.pid))
        process.send(signal.SIGTERM)
        time.sleep(0.1)
        pipe.unlink()
        process.send(signal.SIGINT)  # the first of its kind: still no reason to be rude
        process.wait_until(lambda: process.poll() is not None)
    stopped = process.wait()
    assert (stopped.code, stopped.err.count("Traceback")) == (130, 0), stopped.err
    assert not (run / LAST / "generate.done").exists()
    assert [path.name for path in (run / LAST / "generations").glob("*.jsonl")] == ["train-00000.jsonl"]
    assert start(run).wait().code == 0
    assert_same_result(run, reference)


def test_a_run_that_was_killed_between_stages_goes_on(start, reference, rewound):
    for stage in ("score", "train", "evaluate", "promote"):
        run = rewound(iteration=1, stage=stage)
        assert start(run).wait().code == 0
        assert_same_result(run, reference)
        shutil.rmtree(run)


def test_lock_goes_with_the_process(start, world, cli, reference, rewound):
    """Nobody has to remove anything after a kill; while it runs, a second process is refused."""
    run = rewound(iteration=1)
    with fifo(run / LAST / "generations" / ".train-00000.jsonl.tmp"):
        process = start(run)
        process.wait_until(lambda: (run / LAST / "generations").exists() and asleep(process.pid))
        for command in (("run", world.recipe, "--run-dir", run), ("generate", run, "--iteration", "1")):
            refused = cli(*command, folder=world.folder, code=2)
            assert f"{run}: in use by another process (pid {process.pid} on " in refused.message
            assert "Wait for it to end, or choose another --run-dir" in refused.message
        process.kill()
    assert start(run).wait().code == 0
    assert json.loads((run / LAST / "metrics.json").read_text()) == json.loads(
        (reference / LAST / "metrics.json").read_text()
    )
    assert len(read_rows(run / "metrics.jsonl")) == len(read_rows(reference / "metrics.jsonl"))
