"""A run that begins with the start of another one must go on as if it had made that start itself."""

import json
import shlex
import shutil
from unittest.mock import Mock

import pytest
from runs import change_marker, contents

from spinlm import load_recipe
from spinlm.rundir.fork import fork_from
from spinlm.rundir.layout import RunDir


def played(run):
    """What the iterations of a run left, and its starting player."""
    found = contents(run)
    kept = {
        name: digest
        for name, digest in found.items()
        if name.startswith(("iteration-", "examples/", "base/", ".spinlm/iteration-"))
    }
    start = {
        name: found[name] for name in ("start/heldout_greedy.jsonl", "start/eval.json", ".spinlm/start/evaluate.done")
    }
    return kept | start


@pytest.fixture
def branch(world, cli, tmp_path, reference):
    def run(*arguments, code=0, name="branch", source=reference):
        command = ("run", world.recipe, *arguments, "--run-dir", tmp_path / name, "--start-from", source)
        return cli(*command, folder=world.folder, code=code)

    return run


def test_a_branch_plays_on_as_the_run_it_left(branch, reference, tmp_path):
    branch()
    assert played(tmp_path / "branch") == played(reference)
    ours, theirs = (json.loads((run / "provenance.json").read_text()) for run in (tmp_path / "branch", reference))
    assert ours["start_from"] == str(reference) and ours["inputs"] == theirs["inputs"]
    assert "--start-from" in ours["command"] and "--start-from" not in theirs["command"]
    lines = (tmp_path / "branch" / "train_log.jsonl").read_text().splitlines()
    assert {json.loads(line)["stage"] for line in lines} == {"train"}  # the warm-up was not done again
    before = contents(tmp_path / "branch")
    branch()
    assert contents(tmp_path / "branch") == before


def test_the_control_that_a_run_names_can_be_run(world, cli, reference, tmp_path):
    source = shutil.copytree(reference, tmp_path / "a run", symlinks=True)
    said = cli("run", world.recipe, "--run-dir", source, folder=world.folder).out
    line = next(line for line in said.splitlines() if "objective={name: sft}" in line)
    command = shlex.split(line, comments=True)
    command = command[command.index("run") :]  # after `spinlm` or `python -m spinlm`
    said = cli(*command, "selfplay.iterations=1", folder=tmp_path).out
    assert (tmp_path / "a run-control" / ".spinlm" / "iteration-0" / "promote.done").exists()
    assert "More supervised fine-tuning" in said and "objective=" not in said
    told = json.loads(cli("status", "a run-control", "--json", folder=tmp_path).out)
    markers = (tmp_path / "a run-control" / ".spinlm" / "iteration-0").glob("*.done")
    assert told["seconds"] == pytest.approx(sum(json.loads(path.read_text())["seconds"] for path in markers))
    cli("report", "a run-control", folder=tmp_path)
    page = (tmp_path / "a run-control" / "report.html").read_text()
    assert page.count("made by another run; not counted") == 1
    line = next(line for line in said.splitlines() if "--baseline" in line)
    command = shlex.split(line, comments=True)
    said = cli(*command[command.index("status") :], folder=tmp_path).out
    assert "a run vs a run-control after iteration 0: " in " ".join(said.split())


def test_a_branch_may_play_otherwise(branch, reference, tmp_path):
    changes = ("objective={name: sft}", "selfplay.iterations=1", "train.epochs=1", "train.learning_rate=1e-3")
    branch(*changes)
    ours, theirs = played(tmp_path / "branch"), played(reference)
    assert ours["start/heldout_greedy.jsonl"] == theirs["start/heldout_greedy.jsonl"]
    name = "iteration-0/player/adapter_model.safetensors"
    assert ours[name] != theirs[name]


def test_a_branch_leaves_the_other_run_alone(branch, reference, tmp_path):
    source = shutil.copytree(reference, tmp_path / "source", symlinks=True)
    before = contents(source)
    branch("selfplay.iterations=1", source=source)
    assert contents(source) == before


def test_a_start_that_cannot_be_taken_costs_nothing(world, cli, branch, reference, tmp_path):
    """Neither with --overwrite, which deletes, nor where source and folder are the same."""
    own = shutil.copytree(reference, tmp_path / "own", symlinks=True)
    before = contents(own)
    assert "is the run folder itself" in branch("--overwrite", name="own", source=own, code=2).message
    assert "was made with other settings" in branch("--overwrite", "data.prompts=5", name="own", code=2).message
    assert (
        "no evaluated starting player" in branch("--overwrite", name="own", source=tmp_path / "nothing", code=2).message
    )
    assert contents(own) == before


def test_a_branch_that_was_cut_short_is_completed(branch, reference, tmp_path):
    """Markers come last, so a folder without one is filled again."""
    branch("selfplay.iterations=1")
    run = tmp_path / "branch"
    shutil.rmtree(run / "iteration-0")
    shutil.rmtree(run / ".spinlm" / "iteration-0")
    (run / "best").unlink()
    for name in (".spinlm/start/evaluate.done", ".spinlm/start/sft.done", "start/heldout_greedy.jsonl"):
        (run / name).unlink()
    branch()
    assert played(run) == played(reference)


@pytest.mark.parametrize(
    "change", ["data.heldout=9", "seed=1", "lora.r=2", "sft.epochs=2", "train.max_length=63", "lora=null"]
)
def test_another_start_is_refused(branch, tmp_path, change):
    said = branch(change, code=2).message
    assert "its start was made with other settings" in said
    assert f"\n  {change.partition('=')[0]}" in said


def test_a_run_without_a_start_is_refused(branch, tmp_path):
    assert "no evaluated starting player" in branch(source=tmp_path / "nothing", code=2).message


def test_a_folder_that_has_another_start_is_refused(branch, world, cli, reference, tmp_path):
    source = shutil.copytree(reference, tmp_path / "source", symlinks=True)
    branch("selfplay.iterations=1")
    change_marker(tmp_path / "branch" / ".spinlm" / "start" / "sft.done", prefix_sharing=False)
    assert "has another start than" in branch(source=source, code=2).message


def test_what_is_written_into_a_branch_is_not_written_into_the_run_it_left(branch, reference, tmp_path):
    before = contents(reference)
    branch("selfplay.iterations=1")
    for path in (tmp_path / "branch").rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("a") as file:
                file.write("edited")
    assert contents(reference) == before


def test_an_unpacked_model_is_not_copied_where_it_can_be_linked(reference, world, tmp_path, monkeypatch):
    monkeypatch.chdir(world.folder)
    source = RunDir(shutil.copytree(reference, tmp_path / "source", symlinks=True))
    source.base.mkdir()
    (source.base / "model.safetensors").write_bytes(b"weights")
    inodes = []
    for refuse in (False, True):
        folder = RunDir(tmp_path / f"branch-{refuse}")
        if refuse:
            monkeypatch.setattr("os.link", Mock(side_effect=OSError("another file system")))
        fork_from(load_recipe(world.recipe), folder, source)
        assert (folder.base / "model.safetensors").read_bytes() == b"weights"
        inodes.append((folder.base / "model.safetensors").stat().st_ino)
        assert not any(path.name.endswith(".tmp") for path in folder.root.rglob("*"))
    original = (source.base / "model.safetensors").stat().st_ino
    assert inodes[0] == original != inodes[1]
