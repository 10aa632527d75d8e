"""Many faults, for `make test-all`: each one ends in the right result or in a message, never in a wrong player."""

import errno
import json
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Process
from runs import assert_whole, contents, rewrite_markers, without
from safetensors.torch import load_file, save_file
from test_bad_input import assert_full_disk_message, run_until_full
from test_kill import assert_same_result, between_checkpoints, catch

from spinlm.recipe.fingerprint import recipe_fingerprint
from spinlm.recipe.load import parse_recipe
from spinlm.rundir.layout import RunDir
from spinlm.rundir.provenance import read_recipe
from spinlm.rundir.records import read_pairs
from spinlm.utils.atomic import file_digest, short_digest

pytestmark = pytest.mark.slow

LOGS = ("lock", "train_log.jsonl")  # nothing is made from these files
KILLS, SEEDS = 20, 5
LONGEST = 5.0  # seconds until a run is killed: longer than a complete run on an idle machine


@pytest.fixture
def start(world, cli) -> Callable[..., Process]:
    """Start `spinlm run` on a run folder."""
    return lambda run, **environment: cli.start(
        "run", world.recipe, "--run-dir", run, folder=world.folder, **environment
    )


@pytest.mark.parametrize("seed", range(SEEDS))
def test_killed_at_random_points(start, reference, tmp_path, seed):
    """If a run ends before all kills are used, the next run gets the rest."""
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


@pytest.mark.parametrize("stage", ["generate", "reference_logprobs", "regime", "train", "evaluate", "promote"])
def test_a_flipped_bit_in_any_file(start, reference, rewound, stage):
    """One bit of one file, before a stage of the last iteration: the run refuses it, or gives the same result."""
    run, chance = rewound(1, stage), random.Random(stage)
    kept = run.with_name("kept")
    shutil.copytree(run, kept, symlinks=True)
    refused = silent = 0
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
            refused += 1
        shutil.rmtree(run)
        shutil.copytree(kept, run, symlinks=True)
    print(f"before {stage}: {refused} files of {refused + silent} refused, the others made no difference")
    assert refused > 10


@pytest.mark.parametrize(("stage", "folder"), [("generate", "generations"), ("reference_logprobs", "pairs")])
def test_a_flipped_bit_in_a_shard_of_an_unfinished_stage(start, reference, rewound, stage, folder):
    """The damaged shard is written again, the others are kept."""
    run, chance = RunDir(rewound(1, stage)), random.Random(stage)
    shards = run.iteration(1) / folder
    source = reference / "iteration-1" / folder
    run.begin(stage, 1, recipe_fingerprint(parse_recipe(read_recipe(run)), 1))
    written = sorted(path.name for path in source.glob("[!.]*"))[:5]
    for damaged in (None, *written):
        kept = Path(shutil.copytree(run.root, run.root.with_name("kept"), symlinks=True))
        shards.mkdir()
        for name in written:
            shutil.copy(source / name, shards)
            run.record_digest(shards / name)
        if damaged:
            flip(shards / damaged, chance)
        before = {name: (shards / name).stat().st_ino for name in written}
        assert start(run.root).wait().code == 0
        assert_same_result(run.root, reference)
        assert {name for name in written if (shards / name).stat().st_ino != before[name]} == {damaged} - {None}
        shutil.rmtree(run.root)
        kept.rename(run.root)


BRIEF = ("data.prompts=8", "data.heldout=4", "train.epochs=1", "sft.epochs=1", "train.save_steps=1")
FULL_DISKS = int(os.environ.get("FULL_DISKS", "40"))  # a large number tries every point there is


@pytest.mark.parametrize(
    ("error", "lasting", "what"),
    [
        (errno.ENOSPC, True, "the disk is full"),
        (errno.ENOSPC, False, "the disk is full"),
        (errno.EROFS, True, "cannot write there"),
        (errno.EIO, True, "cannot write there"),
    ],
)
def test_disk_that_fails_at_any_write(filling, world, tmp_path, error, lasting, what):
    """The n-th call that writes fails: open, write, ftruncate, fsync, rename, mkdir, symlink.

    If only that call fails, a library must not continue as if it had written everything.
    """
    reference, log = tmp_path / "reference", tmp_path / "log"
    assert run_until_full(filling, world, reference, 0, *BRIEF, FULL_DISK_LOG=str(log)).code == 0
    assert_every_file_is_seen(reference, log)
    points = len(log.read_text().splitlines())
    count = min(FULL_DISKS, points)
    fault = {"FULL_DISK_ERROR": str(error)} | ({} if lasting else {"FULL_DISK_ONCE": "yes"})
    refused = 0
    for number in range(count):
        run = tmp_path / "run"
        result = run_until_full(filling, world, run, 1 + number * points // count, *BRIEF, **fault)
        if result.code != 0 or lasting:
            assert_full_disk_message(result, run, what)
            refused += 1
            assert run_until_full(filling, world, run, 0, *BRIEF).code == 0
        assert contents(run) == contents(reference), number
        shutil.rmtree(run)
    print(f"{count} of {points} points: {refused} refused, the others made no difference")


def assert_every_file_is_seen(run: Path, log: Path) -> None:
    """Every byte in the run folder was written by calls that can be made to fail."""
    written: Counter[str] = Counter()
    for line in log.read_text().splitlines():
        _, call, count, path = line.split(" ", 3)
        assert call not in ("mmap", "writev"), "bytes that are not counted"
        if call == "write":
            written[re.sub(r"\.([^/]+)\.tmp(?=/|$)", r"\1", str(Path(path).parent))] += int(count)
    for folder in (run, *(path for path in run.rglob("*") if path.is_dir() and not path.is_symlink())):
        sizes = [path.stat().st_size for path in folder.iterdir() if path.is_file() and not path.is_symlink()]
        assert written[str(folder)] >= sum(sizes), folder


# NaN weights


def poison(path: Path, chance: random.Random) -> None:
    """Make one number of one tensor NaN."""
    tensors = load_file(path)
    name = chance.choice(sorted(name for name, tensor in tensors.items() if tensor.is_floating_point()))
    flat = tensors[name].view(-1)
    flat[chance.randrange(len(flat))] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})


def assert_numbers(folder: Path) -> None:
    """No file in a folder holds NaN or infinity."""
    for path in folder.rglob("*.json*"):
        assert not {"NaN", "Infinity"} & set(re.findall(r"\w+", path.read_text(encoding="utf-8"))), path
    for path in folder.rglob("*.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values()), path
    for path in folder.rglob("*.arrow"):
        table = read_pairs([path])
        assert all(np.isfinite(table.column(name).to_numpy()).all() for name in ("opponent_real", "opponent_synthetic"))


def made(run: Path) -> dict[str, str]:
    """Files of the last iteration, without markers."""
    return contents(run / "iteration-1")


@pytest.mark.parametrize("kind", ["adapter", "whole model"])
def test_nan_weight_of_a_player(cli, world, rewind, tmp_path, kind):
    """Before each stage of the last iteration, in each player, with matching markers."""
    changes = (*BRIEF, *(() if kind == "adapter" else ("lora=null",)))
    reference, chance = tmp_path / "reference", random.Random(kind)
    cli("run", world.recipe, *changes, "--run-dir", reference, folder=world.folder)
    refused = silent = 0
    for stage in ("generate", "reference_logprobs", "regime", "train", "evaluate"):
        for player in ("start", "iteration-0", *(["iteration-1"] if stage == "evaluate" else [])):
            for _ in range(3):
                run = rewind(reference, 1, stage)
                (weights,) = (run / player / "player").glob("*.safetensors")
                poison(weights, chance)
                rewrite_markers(run)
                result = cli.start("run", world.recipe, *changes, "--run-dir", run, folder=world.folder).wait()
                if result.code == 0:
                    assert made(run) == made(reference)
                    silent += 1
                else:
                    assert "not finite" in result.message
                    assert not (run / ".spinlm" / "iteration-1" / "promote.done").exists()
                    refused += 1
                weights.unlink()
                assert_numbers(run)
                shutil.rmtree(run)
    print(f"{kind}: {refused} of {refused + silent} places refused, the others made no difference")
    assert refused > silent


def test_nan_weight_of_the_base(cli, world, tmp_path):
    """The players are adapters. The weight may belong to a token that is never used."""
    own = shutil.copytree(world.folder, tmp_path / "world")
    command = ("run", own / "recipe.yaml", *BRIEF, "--run-dir")
    cli(*command, own / "reference", folder=own)
    refused = silent = 0
    chance, kept = random.Random(0), (own / "model" / "model.safetensors").read_bytes()
    for _ in range(10):
        poison(own / "model" / "model.safetensors", chance)
        result = cli.start(*command, own / "run", folder=own).wait()
        if result.code == 0:
            assert made(own / "run") == made(own / "reference")
            silent += 1
        else:
            assert "not finite" in result.message
            refused += 1
        assert_numbers(own / "run")
        shutil.rmtree(own / "run")
        (own / "model" / "model.safetensors").write_bytes(kept)
    print(f"{refused} of {refused + silent} places refused, the others made no difference")
    assert refused > silent


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "state.json"])
def test_changed_checkpoint(start, stopped_in_training, file):
    """One bit, or one NaN with matching digests."""
    run, chance, flips = stopped_in_training, random.Random(file), 20
    (checkpoint,) = (run / "iteration-1" / "checkpoints").glob("step-*")
    kept = (checkpoint / file).read_bytes()
    for _ in range(flips):
        flip(checkpoint / file, chance)
        message = start(run).wait().message
        assert message.startswith(f"{checkpoint}") and "damaged" in message
        (checkpoint / file).write_bytes(kept)
    if file != "state.json":
        poison(checkpoint / file, chance)
        state = json.loads((checkpoint / "state.json").read_text())
        state["files"][file] = file_digest(checkpoint / file)
        state["sum"] = short_digest(without(state, "sum"))
        (checkpoint / "state.json").write_text(json.dumps(state))
        message = start(run).wait().message
        assert message.startswith(f"{checkpoint}: damaged checkpoint (1 weights are not finite")
    assert not (run / "iteration-1" / "player").exists()


# The clock


@pytest.mark.parametrize("year", [1980, 2040])
@pytest.mark.parametrize("killed", [True, False])
def test_clock_that_is_set(start, reference, rewound, year, killed):
    """During training, or after a kill: all files seem old, or from the future."""
    run, process = catch(start, lambda: rewound(1), lambda run: between_checkpoints(run, "train", 1))
    if killed:
        process.kill()
    seconds = (year - 1970) * 365.25 * 86400
    for number, path in enumerate([run, *sorted(run.rglob("*"), reverse=True)]):  # newer ones seem older
        os.utime(path, (seconds + number, seconds + number), follow_symlinks=False)
    if killed:
        process = start(run)
    else:
        process.send(signal.SIGCONT)
    assert process.wait().code == 0
    assert_same_result(run, reference)


@pytest.mark.parametrize("every", [1, 7, 50])
def test_clock_that_jumps(jumping, world, reference, tmp_path, every):
    """The clock jumps by years, forward and back, during the whole run."""
    run, log = tmp_path / "run", tmp_path / "log"
    clock = {"JUMPING_CLOCK": str(every), "JUMPING_CLOCK_LOG": str(log)}
    process = jumping.start("run", world.recipe, "--run-dir", run, folder=world.folder, **clock)
    assert process.wait().code == 0
    assert_same_result(run, reference)
    assert all(json.loads(path.read_text())["seconds"] >= 0 for path in run.rglob("*.done"))
    jumps = len(log.read_text().splitlines())
    assert jumps > 3
    print(f"{jumps} jumps")
