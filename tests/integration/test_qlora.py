"""Self-play with a 4-bit base, through the command line."""

import math
from pathlib import Path

import pytest
from runs import contents, read_rows, steps

pytest.importorskip("bitsandbytes", reason="4 bits need the extra `bitsandbytes`")

IN_4BIT = ("model.load_in_4bit=true", "lora.dropout=0.0")


@pytest.fixture(scope="module")
def finished(world, session_cli, tmp_path_factory) -> Path:
    """The folder of a finished run."""
    run = tmp_path_factory.mktemp("qlora") / "run"
    session_cli("run", world.recipe, *IN_4BIT, "--run-dir", run, folder=world.folder)
    return run


def test_a_run(finished):
    rows = [row for row in steps(finished) if row["stage"] == "train"]
    assert [row["loss"] for row in rows if row["step"] == 1] == pytest.approx([math.log(2)] * 2, abs=1e-5)
    assert [row for row in rows if row["iteration"] == 0][-1]["margin"] > 0.01
    for player in sorted(finished.glob("*/player")):
        assert {path.name for path in player.glob("*.safetensors")} == {"adapter_model.safetensors"}
    assert read_rows(finished / "iteration-0" / "generations" / "train-00000.jsonl")


def test_a_killed_run_resumes(finished, world, cli, tmp_path):
    run = tmp_path / "run"
    command = ("run", world.recipe, *IN_4BIT, "--run-dir", run)
    process = cli.start(*command, folder=world.folder)
    process.wait_until(lambda: sum(row["stage"] == "train" for row in steps(run)) > 6)
    process.kill()
    cli(*command, folder=world.folder)
    assert contents(run) == contents(finished)


def test_check_compares_with_the_unquantized_model(world, cli):
    output = cli("check", world.recipe, *IN_4BIT, folder=world.folder).out
    assert any(line.startswith("4 bits: ") and "nats per token" in line for line in output.splitlines())


def test_a_merged_export_is_unquantized(finished, world, cli, tmp_path):
    result = cli("export", finished, "--iteration", "0", "--merge", "--output", tmp_path / "out", folder=world.folder)
    assert "into the base in float32" in result.err
