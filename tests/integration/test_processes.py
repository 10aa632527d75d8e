"""Several processes on one run give the results of one process. If one is lost, all end, and a rerun continues."""

import json
import math
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import Cli, Process, asleep
from model_server import ModelServer, listen
from runs import RECIPE, SAVE_STEPS, World, assert_whole, fifo, held_by, read_jsons, read_pairs, readme_command, steps
from safetensors.torch import load_file

from models import load_player, naive_logprob
from spinlm.cli.options import read_run
from spinlm.errors import StoppedError
from spinlm.model.run import open_run
from spinlm.rundir.layout import RunDir
from spinlm.stages import reference_logprobs as stage_module

LAST = "iteration-1"
LOST_AFTER = 4  # seconds
TOLERANCE = 1e-4  # between sums in another order, after two iterations

Play = Callable[..., list[Process]]


@pytest.fixture(scope="session")
def plain(world: World, session_cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one process, without dropout, whose random numbers differ between processes."""
    recipe = world.folder / "plain.yaml"
    recipe.write_text(RECIPE.replace(", dropout: 0.1", ""), encoding="utf-8")
    run = tmp_path_factory.mktemp("plain") / "run"
    session_cli("run", recipe, "--run-dir", run, folder=world.folder)
    return run


@pytest.fixture(scope="session")
def together(world: World, session_cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two processes, with dropout. Copy it before changing it."""
    run = tmp_path_factory.mktemp("together") / "run"
    for process in launch(session_cli, world, run):
        assert process.wait().code == 0
    return run


@pytest.fixture
def play(world: World, cli: Cli) -> Play:
    """Start `spinlm run` in two processes."""
    return lambda run, *more, **how: launch(cli, world, run, *more, **how)


def launch(
    cli: Cli,
    world: World,
    run: Path,
    *more: str | Path,
    recipe: Path | None = None,
    of_the_second: tuple[str, tuple[str, ...]] | None = None,
) -> list[Process]:
    """Start two processes as a launcher does, but without supervising them. The second one may get other arguments."""
    given = [(run, more), of_the_second or (run, more)]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [
        cli.start(
            *("run", recipe or world.recipe, *given[rank][1], "--run-dir", given[rank][0]),
            folder=world.folder,
            **place,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            SPINLM_LOST_AFTER=str(LOST_AFTER),
        )
        for rank in range(2)
    ]


def responses(run: Path, iteration: int) -> list[tuple[Any, ...]]:
    rows = read_jsons(run / f"iteration-{iteration}", "generations/*.jsonl")
    return [(row["id"], row["sample"], row["token_ids"], row["finished"]) for row in rows]


def assert_close(run: Path, other: Path) -> None:
    """Both runs have the same responses, and the same players and losses up to rounding."""
    for iteration in range(2):
        assert responses(run, iteration) == responses(other, iteration)
    for name in ("start", "iteration-0", LAST):
        (file,) = (run / name / "player").glob("*model.safetensors")
        ours, theirs = load_file(file), load_file(other / name / "player" / file.name)
        assert ours.keys() == theirs.keys()
        assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) < TOLERANCE
        answers = [(row["id"], row["text"]) for row in read_jsons(run / name, "heldout_greedy.jsonl")]
        assert answers == [(row["id"], row["text"]) for row in read_jsons(other / name, "heldout_greedy.jsonl")]
    ours, theirs = steps(run), steps(other)
    assert len(ours) == len(theirs)
    for one, two in zip(ours, theirs, strict=True):
        for key in ("loss", "grad_norm", "learning_rate", "step"):
            assert one[key] == pytest.approx(two[key], rel=1e-3, abs=TOLERANCE)


def assert_same(run: Path, reference: Path) -> None:
    """Both runs have the same files, to the bit."""
    for folder in ("start", "iteration-0", LAST):
        for name in ("player/adapter_model.safetensors", "heldout_greedy.jsonl", "eval.json"):
            assert (run / folder / name).read_bytes() == (reference / folder / name).read_bytes(), (folder, name)
    for pattern in ("generations/*.jsonl", "pairs/*.arrow"):
        expected = {path.name: path.read_bytes() for path in (reference / LAST).glob(pattern)}
        assert {path.name: path.read_bytes() for path in (run / LAST).glob(pattern)} == expected
    assert not list(run.rglob("*.tmp"))


def error_messages(processes: list[Process]) -> list[str]:
    """Wait for processes that fail without a traceback. Return their messages."""
    results = [process.wait() for process in processes]
    assert all(result.code not in (0, -signal.SIGKILL) for result in results), results
    assert not any("Traceback" in result.err for result in results), results
    return [result.message for result in results if "spinlm: " in result.err]


@pytest.mark.parametrize("sharding", ["none", "shard_grad_op", "full_shard"])
def test_two_processes_do_what_one_does(plain, world, play, tmp_path, sharding):
    run = tmp_path / "run"
    processes = play(run, f"train.fsdp={sharding}", recipe=world.folder / "plain.yaml")
    first, second = (process.wait() for process in processes)
    assert first.code == second.code == 0
    assert "held-out" in first.out and not second.out and not second.err
    assert_close(run, plain)
    assert json.loads((run / "provenance.json").read_text())["processes"] == 2


def test_generations_of_the_same_opponent_are_identical(plain, world, play, tmp_path):
    run = tmp_path / "run"
    more = ("selfplay.iterations=1", "--start-from", plain)
    for process in play(run, *more, recipe=world.folder / "plain.yaml"):
        assert process.wait().code == 0
    for name in ("generations/*.jsonl", "pairs/*.arrow"):
        expected = {path.name: path.read_bytes() for path in (plain / "iteration-0").glob(name)}
        found = {path.name: path.read_bytes() for path in (run / "iteration-0").glob(name)}
        assert found.keys() == expected.keys()
        if "generations" in name:
            assert found == expected


def test_means_over_rows_without_contrast_in_two_processes(plain, world, cli, play, tmp_path):
    """Margin and accuracy are means over the pairs of both processes, whatever share of them each process has."""
    recipe = world.folder / "plain.yaml"
    settings = ("objective.nll_weight=0.2", "opponent.exclude_correct=true", "selfplay.iterations=1", "train.epochs=1")
    command = (*settings, "--start-from", plain)
    cli("run", recipe, *command, "--run-dir", tmp_path / "one", folder=world.folder)
    for process in play(tmp_path / "two", *command, recipe=recipe):
        assert process.wait().code == 0
    assert {pair["contrast"] for pair in read_pairs(tmp_path / "one", 0, "train")} == {True, False}
    trained = [[line for line in steps(tmp_path / name) if line["stage"] == "train"] for name in ("one", "two")]
    assert len(trained[0]) > 2
    for one, two in zip(*trained, strict=True):
        assert one.keys() == two.keys()
        for key in one.keys() & {"loss", "margin", "accuracy", "real_nll"}:
            assert one[key] == pytest.approx(two[key], rel=1e-3, abs=TOLERANCE)


@pytest.fixture(scope="session")
def full(world: World, session_cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one process that trains all weights. Its recipe is next to the run folder."""
    recipe = tmp_path_factory.mktemp("full") / "recipe.yaml"
    text = RECIPE.replace("lora: {r: 4, alpha: 8, dropout: 0.1}\n", "")
    recipe.write_text(text.replace("learning_rate: 2e-3", "learning_rate: 2e-4"), encoding="utf-8")
    session_cli("run", recipe, "--run-dir", recipe.parent / "run", folder=world.folder)
    return recipe.parent / "run"


def test_full_shard_with_all_weights(full, world, cli, play, tmp_path):
    """Checkpoints hold whole tensors: two processes resume from them, then a single one."""
    run, recipe = tmp_path / "run", full.parent / "recipe.yaml"
    what = ("train.fsdp=full_shard", "selfplay.iterations=1")
    processes = play(run, *what, recipe=recipe)
    processes[0].wait_until(lambda: done(run, "train", 0) > SAVE_STEPS)
    processes[1].kill()
    error_messages(processes[:1])
    first, second = (process.wait() for process in play(run, *what, recipe=recipe))
    assert first.code == second.code == 0 and "resuming after step" in first.err
    cli("run", recipe, "--run-dir", run, folder=world.folder)
    assert_close(run, full)


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize(
    ("stage", "held", "when"),
    [
        ("generate", "generations/.train-00003.jsonl.tmp", "generations/train-00002.jsonl"),
        ("reference_logprobs", "pairs/.train-00003.arrow.tmp", "pairs/train-00002.arrow"),
        ("evaluate", ".heldout_greedy.jsonl.tmp", "player"),
    ],
)
def test_a_killed_process_ends_the_others(play, together, rewind, stage, held, when, lost):
    run = rewind(together, 1)
    with fifo(run / LAST / held):  # writing to it waits for a reader
        processes = play(run)
        processes[0].wait_until(lambda: (run / LAST / when).exists() and asleep(processes[0].pid))
        processes[lost].kill()
        (message,) = error_messages([processes[1 - lost]])  # also if that process waits for the reader
    assert "run the same command again" in message
    assert not (run / ".spinlm" / LAST / f"{stage}.done").exists()
    assert_whole(run)
    assert [process.wait().code for process in play(run)] == [0, 0]
    assert_same(run, together)


@pytest.mark.parametrize(("stage", "iteration"), [("sft", -1), ("train", 1)])
@pytest.mark.parametrize("lost", [0, 1])
def test_killed_in_training(play, together, rewind, tmp_path, stage, iteration, lost):
    run = rewind(together, 1) if stage == "train" else tmp_path / "run"
    processes = play(run)
    processes[0].wait_until(lambda: done(run, stage, iteration) > SAVE_STEPS)
    processes[lost].kill()
    (message,) = error_messages([processes[1 - lost]])
    assert "run the same command again" in message
    assert_whole(run)
    again, _ = play(run)
    assert "resuming after step" in again.wait().err
    assert_same(run, together)


def done(run: Path, stage: str, iteration: int) -> int:
    return sum((line["stage"], line["iteration"]) == (stage, iteration) for line in steps(run))


@pytest.mark.parametrize("signaled", [(1,), (0, 1)])
def test_a_signal_to_one_process_stops_all(play, together, rewind, signaled):
    run = rewind(together, 1)
    processes = play(run)
    processes[0].wait_until(lambda: done(run, "train", 1) > 1)
    for rank in signaled:
        processes[rank].send(signal.SIGTERM)
    (message,) = error_messages(processes)
    assert "stopped by a signal" in message
    (checkpoint,) = (run / LAST / "checkpoints").glob("step-*")
    after = done(run, "train", 1)
    assert checkpoint.name == f"step-{after:06d}"
    again, _ = play(run)
    assert f"resuming after step {after}" in again.wait().err
    assert_same(run, together)


@pytest.mark.parametrize("silent", [0, 1])
def test_a_process_without_heartbeat_ends_the_others(play, together, rewind, silent):
    run = rewind(together, 1)
    processes = play(run)
    processes[0].wait_until(lambda: done(run, "train", 1) > 1)
    processes[silent].send(signal.SIGSTOP)
    began = time.monotonic()
    (message,) = error_messages([processes[1 - silent]])
    assert time.monotonic() - began < LOST_AFTER + 20
    assert re.search(r"(no heartbeat from process|no contact with the other processes).* for 4 s", message)
    processes[silent].kill()
    assert [process.wait().code for process in play(run)] == [0, 0]
    assert_same(run, together)


@pytest.mark.parametrize("sharding", ["none", "full_shard"])
def test_an_error_of_all_processes_is_printed_once(play, together, world, tmp_path, sharding):
    settings = ("train.learning_rate=1e30", f"train.fsdp={sharding}")
    (message,) = error_messages(play(tmp_path / "run", *settings, "--start-from", together))
    assert "the loss is" in message and message.startswith(("process 0 on", "process 1 on"))


def test_all_processes_need_the_same_recipe(cli, world, tmp_path):
    other = (str(tmp_path / "run"), ("train.learning_rate=1e-2", "opponent.top_p=0.5"))
    (message,) = error_messages(launch(cli, world, tmp_path / "run", of_the_second=other))
    assert "has another recipe than process 0" in message
    assert "train.learning_rate: was 0.002, is 0.01" in message and "opponent.top_p" in message
    assert not (tmp_path / "run" / "start").exists()


def test_all_processes_need_the_same_run_folder(cli, world, tmp_path):
    (message,) = error_messages(launch(cli, world, tmp_path / "run", of_the_second=(str(tmp_path / "another"), ())))
    assert "process 1 on" in message and "does not see the folder" in message


def test_only_rank_zero_asks_the_server(cli, world, tmp_path):
    """The other processes wait, and train before and after."""
    served = ModelServer("vllm", str(world.model))
    with listen(served.post, served.get) as url:
        server = json.dumps({"api": "vllm", "urls": [f"{url}/v1"]})
        settings = ("opponent.engine=server", f"opponent.server={server}")
        processes = launch(cli, world, tmp_path / "run", *settings)
        assert [process.wait().code for process in processes] == [0, 0]
    assert len(served.loaded) == 2


def test_another_launcher_on_the_same_folder_is_refused(play, together, rewind):
    run = rewind(together, 1)
    with fifo(run / LAST / "generations" / ".train-00000.jsonl.tmp"):
        processes = play(run)
        processes[0].wait_until(lambda: held_by(run, processes[0].pid))
        messages = error_messages(play(run))
        assert len(messages) == 1, messages
        (message,) = messages
        assert f"{run}: in use by another process" in message
        for process in processes:
            process.kill()


def test_torchrun(world, plain, tmp_path):
    """The README's command, with two processes instead of eight."""
    shutil.copytree(world.folder, tmp_path / "here")
    (tmp_path / "here" / "plain.yaml").rename(tmp_path / "here" / "recipe.yaml")
    torchrun, option, eight, *command = readme_command("several GPUs")
    assert (torchrun, option, eight) == ("torchrun", "--nproc-per-node", "8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launcher, *command], cwd=tmp_path / "here", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_close(tmp_path / "here" / "runs" / "recipe", plain)


def test_torchrun_restarts(world, plain, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "spinlm", "run", str(world.folder / "plain.yaml"), "--run-dir", str(tmp_path / "run")]
    log = tmp_path / "log"
    with (
        log.open("w") as file,
        subprocess.Popen(
            [*launcher, "--max-restarts", "1", *command], cwd=world.folder, stdout=file, stderr=file
        ) as torchrun,
    ):
        deadline = time.monotonic() + 120
        while done(tmp_path / "run", "sft", -1) <= SAVE_STEPS and torchrun.poll() is None:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        workers = psutil.Process(torchrun.pid).children()
        workers[-1].kill()
        assert torchrun.wait(timeout=180) == 0, log.read_text()
    assert "resuming after step" in log.read_text()
    assert_close(tmp_path / "run", plain)


def test_commands_for_one_process(world, cli, tmp_path):
    """The README's commands for a laptop and for one GPU."""
    pytest.importorskip("bitsandbytes", reason="needs the extra bitsandbytes")
    for where in ("laptop", "one GPU"):
        folder = shutil.copytree(world.folder, tmp_path / where)
        spinlm, *command = readme_command(where)
        assert spinlm == "spinlm"
        cli(*command, "selfplay.iterations=1", folder=folder)
        assert len(list((folder / "runs").glob("*/best"))) == 1


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_launcher_with_its_own_sharding_is_refused(world, cli, tmp_path, name):
    environment = {f"ACCELERATE_USE_{name}": "true"}
    process = cli.start("run", world.recipe, "--run-dir", tmp_path / "run", folder=world.folder, **environment)
    result = process.wait()
    assert result.code == 2
    assert f"use {name}" in result.message and "train.fsdp: full_shard" in result.message


# A reference that is a mixture of the opponent and the start


@pytest.fixture(scope="module")
def mixed(world: World, session_cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two processes with `objective.reference_mix`, without dropout, with all pairs in each step."""
    run = tmp_path_factory.mktemp("mixed") / "run"
    for process in launch(
        session_cli, world, run, "objective.reference_mix=0.25", "lora.dropout=0.0", "train.batch_size=64"
    ):
        assert process.wait().code == 0
    return run


def test_pairs_of_a_mixed_reference(mixed, world):
    """From iteration 1 on, training pairs also hold log p_θ0; the loss mixes, and the margin stays against θ_t."""
    theta_0, theta_1 = (load_player(world.model, mixed / name / "player") for name in ("start", "iteration-0"))
    assert all(pair["start_real"] is None for pair in read_pairs(mixed, 0, "train") + read_pairs(mixed, 1, "heldout"))
    pairs = read_pairs(mixed, 1, "train")
    for pair in pairs:
        for kind in ("real", "synthetic"):
            ids = pair["prompt_ids"], pair[f"{kind}_ids"]
            assert pair[f"opponent_{kind}"] == pytest.approx(naive_logprob(theta_1, *ids).item(), abs=1e-4)
            assert pair[f"start_{kind}"] == pytest.approx(naive_logprob(theta_0, *ids).item(), abs=1e-4)
    # At step 0 log p_θ = log p_θt, so r = log p_θt − (0.25 log p_θt + 0.75 log p_θ0) = 0.75 (log p_θt − log p_θ0).
    moved = [
        (pair["opponent_real"] - pair["start_real"]) - (pair["opponent_synthetic"] - pair["start_synthetic"])
        for pair in pairs
    ]
    assert max(map(abs, moved)) > 0.05
    expected = statistics.fmean(math.log1p(math.exp(-0.1 * 0.75 * margin)) for margin in moved)
    first = next(line for line in steps(mixed) if line["stage"] == "train" and line["iteration"] == 1)
    assert first["loss"] == pytest.approx(expected, abs=1e-5)
    assert first["margin"] == pytest.approx(0, abs=1e-4)
    rates = RunDir(mixed).metadata("reference_logprobs", 1)["train"]
    assert rates["logprob_mismatch_mean"] < 1e-4


def test_a_mixed_reference_resumes_between_and_within_files(mixed, rewind, monkeypatch):
    """A stage stopped at the third file's θ_0 keeps every log p_θt, and the two files that are complete."""
    run = rewind(mixed, 1, "reference_logprobs")
    folder, recipe = read_run(run)
    add, made = stage_module._add_start_logprobs, []

    def stop(run_object, path):
        if path.name == "train-00002.arrow":
            raise StoppedError("stopped")
        add(run_object, path)

    def count(*arguments):
        made.append(arguments)
        return make(*arguments)

    make = stage_module.choose_train_pairs
    with monkeypatch.context() as patch:
        patch.setattr(stage_module, "_add_start_logprobs", stop)
        with pytest.raises(StoppedError), open_run(recipe, folder) as opened:
            stage_module.reference_logprobs(opened, 1)
    starts = [pair["start_real"] is not None for pair in read_pairs(run, 1, "train")]
    assert any(starts) and not all(starts)
    files = {path.name: path.stat().st_mtime_ns for path in (run / LAST / "pairs").glob("train-0000[01].arrow")}
    monkeypatch.setattr(stage_module, "choose_train_pairs", count)
    with open_run(recipe, folder) as opened:
        stage_module.reference_logprobs(opened, 1)
    assert not made
    assert {name: (run / LAST / "pairs" / name).stat().st_mtime_ns for name in files} == files
    for name in ("train", "heldout"):
        for ours, theirs in zip(read_pairs(run, 1, name), read_pairs(mixed, 1, name), strict=True):
            assert ours.keys() == theirs.keys()
            assert all(ours[key] == theirs[key] or ours[key] == pytest.approx(theirs[key], abs=1e-5) for key in ours)
