"""The vLLM engine and its processes, with a package that stands in for vLLM, which needs a GPU."""

import signal
import time
from pathlib import Path

import pytest
from commands import Cli
from runs import World, assert_whole, read_jsons

STAND_IN = str(Path(__file__).parent / "stand_in")
ENGINE = ("opponent.engine=vllm", "opponent.temperature=0", "selfplay.iterations=1")


def workers(run: Path) -> list[str]:
    """Return the ids of a run's worker processes that are alive."""
    logs = [str(path) for path in run.glob("*/vllm-*.log")]
    alive = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"vllm_worker" in (process / "cmdline").read_bytes() and str((process / "fd" / "2").readlink()) in logs:
                alive.append(process.name)
        except OSError:
            continue
    return alive


@pytest.mark.parametrize("more", [(), ("lora=null", "train.learning_rate=2e-4", "opponent.vllm={data_parallel: 2}")])
def test_responses_equal_those_of_the_local_engine(
    cli: Cli, world: World, tmp_path: Path, more: tuple[str, ...]
) -> None:
    """Greedy responses equal those of the local engine, with an adapter and with a whole model; no process remains."""
    local, vllm = tmp_path / "local", tmp_path / "vllm"
    cli("run", world.recipe, *ENGINE, *more, "--run-dir", vllm, folder=world.folder, PYTHONPATH=STAND_IN)
    changes = [change for change in (*ENGINE, *more) if "vllm" not in change]
    cli("run", world.recipe, *changes, "--run-dir", local, folder=world.folder)
    rows = [read_jsons(run / "iteration-0", "generations/*.jsonl") for run in (local, vllm)]
    assert len(rows[0]) > 20
    for expected, row in zip(*rows, strict=True):
        assert {**row, "logprob": 0} == {**expected, "logprob": 0}
        assert row["logprob"] == pytest.approx(expected["logprob"], abs=1e-3)
    assert len(list((vllm / "iteration-0").glob("vllm-*.log"))) == (2 if more else 1)
    assert not workers(vllm)
    assert_whole(vllm)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("driver", "driver is too old"),
        ("memory", "opponent.vllm.gpu_memory_utilization"),
        ("die", "exited with code 7"),
    ],
)
def test_errors_of_vllm(cli: Cli, world: World, tmp_path: Path, fault: str, message: str) -> None:
    run = tmp_path / "run"
    where = {"folder": world.folder, "PYTHONPATH": STAND_IN, "VLLM_STAND_IN": fault}
    process = cli.start("run", world.recipe, *ENGINE, "--run-dir", run, **where)
    result = process.wait()
    assert result.code == 2
    assert message in result.message and str(run / "iteration-0" / "vllm-0.log") in result.message
    assert not workers(run)


def test_without_vllm(cli: Cli, world: World, tmp_path: Path) -> None:
    result = cli("run", world.recipe, *ENGINE, "--run-dir", tmp_path / "run", folder=world.folder, code=2)
    assert "pip install 'spinlm[vllm]'" in result.message


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_vllm_stops_when_spinlm_is_killed(cli: Cli, world: World, tmp_path: Path, number: signal.Signals) -> None:
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
