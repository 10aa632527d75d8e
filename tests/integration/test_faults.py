"""Faults by the dozen, for `make test-all`: each ends in the right result or in a message, never in a wrong player."""

import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import Process
from runs import assert_whole, contents
from test_bad_input import assert_told_of_full_disk, run_until_full
from test_kill import assert_same_result

pytestmark = pytest.mark.slow

LOGS = ("lock", "metrics.jsonl")  # from which nothing is made
KILLS, SEEDS = 20, 5
LONGEST = 5.0  # seconds until a run is killed: longer than a whole one takes on a quiet machine


@pytest.fixture
def start(world, cli) -> Callable[..., Process]:
    """Starts `spinlm run` on a run folder."""
    return lambda run, **environment: cli.start(
        "run", world.recipe, "--run-dir", run, folder=world.folder, **environment
    )


@pytest.mark.parametrize("seed", range(SEEDS))
def test_killed_at_random_points(start, reference, tmp_path, seed):
    """A run that ends before it is killed counts as none; the kills that are left are given to the next."""
    moments, kills, runs = random.Random(seed), 0, 0
    while kills < KILLS:
        run, runs = tmp_path / f"run-{runs}", runs + 1
        while True:
            process = start(run)
            deadline = time.monotonic() + moments.uniform(0, LONGEST)
            while kills < KILLS and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
            if kills < KILLS:
                process.send(signal.SIGKILL)  # or it has just ended
            code = process.wait().code
            if code != -signal.SIGKILL:
                assert code == 0
                break
            kills += 1
            if run.exists():
                assert_whole(run)
        assert_same_result(run, reference)
    print(f"seed {seed}: {kills} kills in {runs} runs")


def files_to_flip(run: Path) -> Iterator[Path]:
    for path in sorted(run.rglob("*")):
        if path.is_file() and not path.is_symlink() and path.stat().st_size > 0 and path.name not in LOGS:
            yield path


def flip(path: Path, chance: random.Random) -> bytes:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    return bytes(content)


@pytest.mark.parametrize("stage", ["generate", "score", "train", "evaluate", "promote"])
def test_a_flipped_bit_in_any_file(start, reference, rewound, stage):
    """One bit of one file, before a stage of the last iteration: the run refuses it, or nothing else is different."""
    run, chance = rewound(1, stage), random.Random(stage)
    kept = run.with_name("kept")
    shutil.copytree(run, kept, symlinks=True)
    told = silent = 0
    for name in [path.relative_to(run) for path in files_to_flip(run)]:
        flipped = flip(run / name, chance)
        result = start(run).wait()
        if result.code == 0:
            if (run / name).exists() and (run / name).read_bytes() == flipped:
                shutil.copy(kept / name, run / name)
            assert_same_result(run, reference)
            silent += 1
        else:
            assert result.message, name  # one message, and no traceback
            told += 1
        shutil.rmtree(run)
        shutil.copytree(kept, run, symlinks=True)
    print(f"before {stage}: {told} files of {told + silent} refused, the others made no difference")
    assert told > 10


BRIEF = ("data.prompts=8", "data.heldout=4", "train.epochs=1", "warmup_sft.epochs=1", "train.checkpoint_every=1")
FULL_DISKS = int(os.environ.get("FULL_DISKS", "100"))  # a large number tries every point there is


@pytest.mark.parametrize("lasting", [True, False], ids=["full from then on", "full once"])
def test_disk_full_at_any_write(filling, world, tmp_path, lasting):
    """The n-th call that writes fails: open, write, ftruncate, fsync, rename, mkdir, symlink, in whatever language.

    A disk that has room again at once finds out whether a library goes on as if it had written everything.
    """
    reference, log = tmp_path / "reference", tmp_path / "log"
    assert run_until_full(filling, world, reference, 0, *BRIEF, FULL_DISK_LOG=str(log)).code == 0
    assert_every_file_is_seen(reference, log)
    points = len(log.read_text().splitlines())
    count = min(FULL_DISKS, points)
    once = {} if lasting else {"FULL_DISK_ONCE": "yes"}
    refused = 0
    for number in range(count):
        run = tmp_path / "run"
        result = run_until_full(filling, world, run, 1 + number * points // count, *BRIEF, **once)
        if result.code != 0 or lasting:
            assert_told_of_full_disk(result, run)
            refused += 1
            assert run_until_full(filling, world, run, 0, *BRIEF).code == 0
        assert contents(run) == contents(reference), number
        shutil.rmtree(run)
    print(f"{count} of {points} points: {refused} refused, the others made no difference")


def assert_every_file_is_seen(run: Path, log: Path) -> None:
    """What is in the run folder has gone through the calls that can be made to fail, each byte of it."""
    written: Counter[str] = Counter()
    for line in log.read_text().splitlines():
        _, call, count, path = line.split(" ", 3)
        assert call not in ("mmap", "writev"), "bytes that are not counted"
        if call == "write":
            written[re.sub(r"\.([^/]+)\.tmp(?=/)", r"\1", str(Path(path).parent))] += int(count)
    for folder in (run, *(path for path in run.rglob("*") if path.is_dir() and not path.is_symlink())):
        sizes = [path.stat().st_size for path in folder.iterdir() if path.is_file() and not path.is_symlink()]
        assert written[str(folder)] >= sum(sizes), folder
