"""Faults by the dozen, for `make test-all`: each ends in the right result or in a message, never in a wrong player."""

import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import Process
from runs import assert_whole
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
