"""Self-play over a base in 4 bits, through the command line."""

import math
import shutil
from pathlib import Path

import pytest
from runs import contents, read_rows, steps

pytest.importorskip("bitsandbytes", reason="4 bits need the extra `bitsandbytes`")

QUANTIZE = "model.load_in_4bit=true"
LN2 = math.log(2)


@pytest.fixture(scope="module")
def quantised(world, session_cli, tmp_path_factory) -> Path:
    """A finished run."""
    run = tmp_path_factory.mktemp("quantised") / "run"
    session_cli("run", world.recipe, QUANTIZE, "lora.dropout=0.0", "--run-dir", run, folder=world.folder)
    return run


def test_a_run_in_four_bits(quantised):
    first = [line for line in steps(quantised) if line["stage"] == "train" and line["step"] == 1]
    assert [line["loss"] for line in first] == pytest.approx([LN2, LN2], abs=1e-5)
    pairs = [line for line in steps(quantised) if line["stage"] == "train" and line["iteration"] == 0]
    assert pairs[-1]["margin"] > 0.01
    for player in sorted(quantised.glob("*/player")):
        assert {path.name for path in player.glob("*.safetensors")} == {"adapter_model.safetensors"}
        assert "over the base in 4 bits" in (player / "README.md").read_text()
    sampled = read_rows(quantised / "iteration-0" / "generations" / "train-00000.jsonl")
    assert sampled


def test_a_run_in_four_bits_goes_on_where_it_was_killed(quantised, world, cli, tmp_path):
    run = tmp_path / "run"
    command = ("run", world.recipe, QUANTIZE, "lora.dropout=0.0", "--run-dir", run)
    process = cli.start(*command, folder=world.folder)
    process.wait_until(lambda: sum(line["stage"] == "train" for line in steps(run)) > 6)
    process.kill()
    cli(*command, folder=world.folder)
    assert contents(run) == contents(quantised)


def test_check_says_what_four_bits_change(world, cli):
    said = cli("check", world.recipe, QUANTIZE, folder=world.folder).out
    assert " in 4 bits; loaded in " in " ".join(said.split())
    (line,) = [line for line in said.splitlines() if line.startswith("4 bits: ")]
    assert "log-probabilities differ from those of the model as it came by" in line


def test_merged_export_says_that_it_is_another_base(quantised, world, cli, tmp_path):
    result = cli("export", quantised, "--iteration", "0", "--merge", "--output", tmp_path / "out", folder=world.folder)
    assert "merged into the base in torch.float32" in " ".join((result.out + result.err).split())
    shutil.rmtree(tmp_path / "out")
