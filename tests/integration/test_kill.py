"""A run that is killed or interrupted anywhere gives, after a rerun, the results of an undisturbed run, to the bit."""

import json
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Cli, Process, asleep, state
from runs import PROMPTS, SAVE_STEPS, World, assert_whole, fifo, held_by, read_rows, steps

LAST = "iteration-1"
MARKER = "../.spinlm/iteration-1/.{}.done.tmp"
STOPPED = "stopped; run the same command again to continue"


@pytest.fixture
def start(world: World, cli: Cli) -> Callable[[Path], Process]:
    """Start `spinlm run` on a run folder."""
    return lambda run: cli.start("run", world.recipe, "--run-dir", run, folder=world.folder)


def assert_same_result(run: Path, reference: Path) -> None:
    """Players, responses and metrics are those of the undisturbed run."""
    for name in ("player/adapter_model.safetensors", "heldout_greedy.jsonl", "eval.json", "selection.json"):
        for folder in ("iteration-0", LAST):
            assert (run / folder / name).read_bytes() == (reference / folder / name).read_bytes(), (folder, name)
    for kind in ("generations/*.jsonl", "pairs/*.arrow"):
        expected = {path.name: path.read_bytes() for path in (reference / LAST).glob(kind)}
        assert {path.name: path.read_bytes() for path in (run / LAST).glob(kind)} == expected
    assert timeless(run) == timeless(reference)
    assert (run / "best").readlink() == (reference / "best").readlink()
    assert not list(run.rglob("*.tmp"))


def timeless(run: Path) -> list[dict[str, float]]:
    """The lines of train_log.jsonl without times."""
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in steps(run)]


def count_steps(run: Path, stage: str, iteration: int) -> int:
    return sum((line["stage"], line["iteration"]) == (stage, iteration) for line in steps(run))


def between_checkpoints(run: Path, stage: str, iteration: int, after: int = 0) -> bool:
    """Whether training is between two checkpoints, the first of them later than step `after`."""
    folder = run / ("start" if iteration < 0 else f"iteration-{iteration}")
    saved = max((int(path.name.removeprefix("step-")) for path in folder.glob("checkpoints/step-*")), default=0)
    done = count_steps(run, stage, iteration)
    return saved > after and done > saved and done % SAVE_STEPS != 0 and not (folder / "player").exists()


def catch(
    start: Callable[[Path], Process], rewind: Callable[[], Path], moment: Callable[[Path], bool]
) -> tuple[Path, Process]:
    """Stop a run with SIGSTOP at a moment. A busy machine can miss the moment: then the run starts again."""
    for _ in range(5):
        run = rewind()
        process = start(run)
        while process.poll() is None:
            process.wait_until(lambda run=run, process=process: moment(run) or process.poll() is not None)
            process.send(signal.SIGSTOP)
            while process.poll() is None and state(process.pid) != "T":
                time.sleep(0.001)
            if process.poll() is None and moment(run):
                return run, process
            process.send(signal.SIGCONT)
        shutil.rmtree(run)
    pytest.fail("never caught the process at the right moment")


@pytest.mark.parametrize(
    ("stage", "held", "when"),
    [
        ("generate", "generations/.train-00003.jsonl.tmp", "generations/train-00002.jsonl"),
        ("reference_logprobs", "pairs/.train-00003.arrow.tmp", "pairs/train-00002.arrow"),
        ("regime", ".regime.json.tmp", f"../.spinlm/{LAST}/reference_logprobs.done"),
        ("evaluate", ".heldout_greedy.jsonl.tmp", "player"),
        ("evaluate", MARKER.format("evaluate"), "eval.json"),
        ("train", MARKER.format("train"), "player"),  # the player is in place, the marker is not
    ],
)
def test_killed_while_writing(start, reference, rewound, stage, held, when):
    run = rewound(1)
    with fifo(run / LAST / held):  # the process waits here for a reader
        process = start(run)
        process.wait_until(lambda: (run / LAST / when).exists() and asleep(process.pid))
        process.kill()
    assert not (run / ".spinlm" / LAST / f"{stage}.done").exists()
    assert_whole(run)
    (run / LAST / held).write_text('{"half a li')  # left by a process that was killed while writing
    assert start(run).wait().code == 0
    assert_same_result(run, reference)


def test_killed_in_training(start, reference, rewound):
    run, process = catch(start, lambda: rewound(1), lambda run: between_checkpoints(run, "train", 1))
    process.kill()
    assert not (run / ".spinlm" / LAST / "train.done").exists()
    done = count_steps(run, "train", 1)
    assert done % SAVE_STEPS
    assert_whole(run)
    # Left by a process that was killed while writing.
    with (run / "train_log.jsonl").open("a") as file:
        file.write('{"stage": "train", "iteration": 1, "st')
    half = run / LAST / "checkpoints" / ".step-000099.tmp"
    half.mkdir()
    (half / "weights.safetensors").write_bytes(b"half")
    (run / LAST / ".player.tmp").mkdir()
    (run / LAST / ".player.tmp" / "adapter_model.safetensors").write_bytes(b"half")

    again = start(run).wait()
    assert re.search(r"resuming after step (\d+)", again.err)[1] == str(done // SAVE_STEPS * SAVE_STEPS)
    assert_same_result(run, reference)


def test_killed_in_sft(start, reference, tmp_path):
    """Killed in the second epoch."""
    epoch = PROMPTS // 4
    run, process = catch(start, lambda: tmp_path / "run", lambda run: between_checkpoints(run, "sft", -1, epoch))
    process.kill()
    assert not (run / ".spinlm" / "start" / "sft.done").exists()
    assert not (run / "iteration-0").exists()
    again = start(run).wait()
    assert "resuming after step" in again.err
    assert again.code == 0
    assert "before it" not in again.err and "after epoch 1\n" not in again.err, "finished epochs are not reported again"
    assert "after epoch 2\n" in again.err and "after epoch 3\n" in again.err
    assert_same_result(run, reference)
    for name in ("player/adapter_model.safetensors", "heldout_greedy.jsonl", "eval.json"):
        assert (run / "start" / name).read_bytes() == (reference / "start" / name).read_bytes(), name
    curves = [
        json.loads((folder / ".spinlm" / "start" / "sft.done").read_text())["heldout_nll_by_epoch"]
        for folder in (run, reference)
    ]
    assert curves[0] == curves[1]
    assert list(curves[0]) == ["0", "1", "2", "3"]
    assert not (run / "start" / "checkpoints").exists()


def test_killed_again_and_again(start, reference, rewound):
    """Killed at arbitrary moments."""
    run = rewound(1)
    for attempt in range(20):
        process = start(run)
        deadline = time.monotonic() + 0.3 + 0.1 * attempt
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        if process.poll() is not None:
            break
        process.send(signal.SIGKILL)
        ended = process.wait()
        if ended.code == 0:  # it ended just before the kill
            break
        assert ended.code == -signal.SIGKILL
        assert_whole(run)
    assert process.wait().code == 0
    assert attempt > 2, "the test means little when the run is not killed"
    assert_same_result(run, reference)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_in_training(start, reference, rewound, number):
    run, process = catch(start, lambda: rewound(1), lambda run: between_checkpoints(run, "train", 1))
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
    assert not (run / ".spinlm" / LAST / "train.done").exists()
    assert_whole(run)
    again = start(run).wait()
    assert f"resuming after step {after}" in again.err
    assert_same_result(run, reference)


def test_interrupted_in_generation(start, reference, rewound):
    def moment(run: Path) -> bool:
        return len(list((run / LAST / "generations").glob("*.jsonl"))) in (2, 3, 4)

    run, process = catch(start, lambda: rewound(1), moment)
    process.send(signal.SIGINT)
    process.send(signal.SIGCONT)
    stopped = process.wait()
    assert stopped.code == 130
    assert stopped.message == STOPPED
    assert not (run / ".spinlm" / LAST / "generate.done").exists()
    assert_whole(run)
    kept = {path: path.stat().st_mtime_ns for path in (run / LAST / "generations").glob("*.jsonl")}
    assert start(run).wait().code == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert_same_result(run, reference)


def test_second_interrupt_stops_at_once(start, reference, rewound):
    run = rewound(1)
    with fifo(run / LAST / "generations" / ".train-00001.jsonl.tmp"):
        process = start(run)
        process.wait_until(lambda: (run / LAST / "generations" / "train-00000.jsonl").exists() and asleep(process.pid))
        process.send(signal.SIGINT)
        time.sleep(0.2)
        assert process.poll() is None, "the first one waits for a safe point, and there is none"
        process.send(signal.SIGINT)
        stopped = process.wait()
    assert stopped.code == 130
    assert "Traceback" not in stopped.err
    assert [path.name for path in (run / LAST / "generations").glob("*.jsonl")] == ["train-00000.jsonl"]
    assert start(run).wait().code == 0
    assert_same_result(run, reference)


def test_lock_ends_with_the_process(start, world, cli, reference, rewound):
    """A second process is refused while the first one runs. After a kill no file has to be removed."""
    run = rewound(1)
    with fifo(run / LAST / "generations" / ".train-00000.jsonl.tmp"):
        process = start(run)
        process.wait_until(lambda: held_by(run, process.pid))
        for command in (("run", world.recipe, "--run-dir", run), ("generate", run, "--iteration", "1")):
            refused = cli(*command, folder=world.folder, code=2)
            assert f"{run}: in use by another process (pid {process.pid} on " in refused.message
            assert "Wait for it to end, or choose another --run-dir" in refused.message
        process.kill()
    assert start(run).wait().code == 0
    assert json.loads((run / LAST / "eval.json").read_text()) == json.loads(
        (reference / LAST / "eval.json").read_text()
    )
    assert len(read_rows(run / "train_log.jsonl")) == len(read_rows(reference / "train_log.jsonl"))
