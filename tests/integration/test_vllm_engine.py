"""The opponent in vLLM: its processes, with a package that stands in for vLLM, which cannot run on every machine."""

import signal
import time
from pathlib import Path

import pytest
from commands import Cli
from runs import World, assert_whole, read_jsons

STAND_IN = str(Path(__file__).parent / "stand_in")
ENGINE = ("opponent.engine=vllm", "opponent.temperature=0", "selfplay.iterations=1")


def workers(run: Path) -> list[str]:
    """Processes that were started for a run and are still there."""
    logs = [str(path) for path in run.glob("*/vllm-*.log")]
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"vllm_worker" in (process / "cmdline").read_bytes() and str((process / "fd" / "2").readlink()) in logs:
                found.append(process.name)
        except OSError:
            continue
    return found


@pytest.mark.parametrize("more", [(), ("lora=null", "train.learning_rate=2e-4", "opponent.vllm={data_parallel: 2}")])
def test_vllm_has_the_opponent(cli: Cli, world: World, tmp_path: Path, more: tuple[str, ...]) -> None:
    """Greedy answers are those of the local engine, by an adapter or by a whole model, and nothing is left."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    cli("run", world.recipe, *ENGINE, *more, "--run-dir", theirs, folder=world.folder, PYTHONPATH=STAND_IN)
    without = [one for one in (*ENGINE, *more) if "vllm" not in one]
    cli("run", world.recipe, *without, "--run-dir", ours, folder=world.folder)
    rows = [read_jsons(run / "iteration-0", "generations/*.jsonl") for run in (ours, theirs)]
    assert len(rows[0]) > 20
    for one, two in zip(*rows, strict=True):
        assert {**one, "logprob": 0} == {**two, "logprob": 0}
        assert two["logprob"] == pytest.approx(one["logprob"], abs=1e-3)
    assert len(list((theirs / "iteration-0").glob("vllm-*.log"))) == (2 if more else 1)
    assert not workers(theirs)
    assert_whole(theirs)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("driver", "the GPU's driver is too old for this vLLM"),
        ("memory", "too little free GPU memory: lower opponent.vllm.gpu_memory_utilization"),
        ("die", "vLLM's process has ended (exit code 7)"),
    ],
)
def test_what_goes_wrong_in_vllm_is_said(cli: Cli, world: World, tmp_path: Path, fault: str, said: str) -> None:
    run = tmp_path / "run"
    where = {"folder": world.folder, "PYTHONPATH": STAND_IN, "VLLM_STAND_IN": fault}
    process = cli.start("run", world.recipe, *ENGINE, "--run-dir", run, **where)
    result = process.wait()
    assert result.code == 2
    assert said in result.message and str(run / "iteration-0" / "vllm-0.log") in result.message
    assert not workers(run)


def test_without_vllm(cli: Cli, world: World, tmp_path: Path) -> None:
    result = cli("run", world.recipe, *ENGINE, "--run-dir", tmp_path / "run", folder=world.folder, code=2)
    assert "pip install 'spinlm[vllm]'" in result.message


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_vllm_ends_with_us(cli: Cli, world: World, tmp_path: Path, number: signal.Signals) -> None:
    run = tmp_path / "run"
    where = {"folder": world.folder, "PYTHONPATH": STAND_IN, "VLLM_STAND_IN": "hang"}
    process = cli.start("run", world.recipe, *ENGINE, "--run-dir", run, **where)
    process.wait_until(lambda: any("prints" in log.read_text() for log in run.glob("*/vllm-0.log")))
    process.send(number)
    code = process.wait().code
    assert code == (130 if number == signal.SIGTERM else -number)
    deadline = time.monotonic() + 40
    while workers(run):
        assert time.monotonic() < deadline
        time.sleep(0.2)
