"""A run that begins with the start of another run gives the results it would have with its own start."""

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
    """Files of a run's iterations, and of the evaluation of its start."""
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
def fork(world, cli, tmp_path, reference):
    def run(*arguments, code=0, name="fork", source=reference):
        command = ("run", world.recipe, *arguments, "--run-dir", tmp_path / name, "--start-from", source)
        return cli(*command, folder=world.folder, code=code)

    return run


def test_fork_gives_the_same_iterations(fork, reference, tmp_path):
    fork()
    assert played(tmp_path / "fork") == played(reference)
    ours, theirs = (json.loads((run / "provenance.json").read_text()) for run in (tmp_path / "fork", reference))
    assert ours["start_from"] == str(reference) and ours["inputs"] == theirs["inputs"]
    assert "--start-from" in ours["command"] and "--start-from" not in theirs["command"]
    lines = (tmp_path / "fork" / "train_log.jsonl").read_text().splitlines()
    assert {json.loads(line)["stage"] for line in lines} == {"train"}  # SFT did not run again
    before = contents(tmp_path / "fork")
    fork()
    assert contents(tmp_path / "fork") == before


def test_control_command_that_a_run_prints(world, cli, reference, tmp_path):
    source = shutil.copytree(reference, tmp_path / "a run", symlinks=True)
    said = cli("run", world.recipe, "--run-dir", source, folder=world.folder).out
    line = next(line for line in said.splitlines() if "objective={name: sft}" in line)
    command = shlex.split(line, comments=True)
    command = command[command.index("run") :]  # after `spinlm` or `python -m spinlm`
    said = cli(*command, "selfplay.iterations=1", folder=tmp_path).out
    assert (tmp_path / "a run-control" / ".spinlm" / "iteration-0" / "promote.done").exists()
    assert "More supervised fine-tuning" in said and "objective=" not in said
    status = json.loads(cli("status", "a run-control", "--json", folder=tmp_path).out)
    markers = (tmp_path / "a run-control" / ".spinlm" / "iteration-0").glob("*.done")
    assert status["seconds"] == pytest.approx(sum(json.loads(path.read_text())["seconds"] for path in markers))
    cli("report", "a run-control", folder=tmp_path)
    page = (tmp_path / "a run-control" / "report.html").read_text()
    assert "<td>iteration 0</td><td>generate" in page and "<td>start</td><td>prepare" not in page
    line = next(line for line in said.splitlines() if "--baseline" in line)
    command = shlex.split(line, comments=True)
    said = cli(*command[command.index("status") :], folder=tmp_path).out
    assert "a run vs a run-control after iteration 0: " in " ".join(said.split())


def test_fork_may_have_another_objective(fork, reference, tmp_path):
    changes = ("objective={name: sft}", "selfplay.iterations=1", "train.epochs=1", "train.learning_rate=1e-3")
    fork(*changes)
    ours, theirs = played(tmp_path / "fork"), played(reference)
    assert ours["start/heldout_greedy.jsonl"] == theirs["start/heldout_greedy.jsonl"]
    name = "iteration-0/player/adapter_model.safetensors"
    assert ours[name] != theirs[name]


def generated(run):
    """Shard files of iteration 0 in a run, and whether its generate marker says that an earlier process did a part."""
    marker = json.loads((run / ".spinlm" / "iteration-0" / "generate.done").read_text())
    return {path.name: path.read_text() for path in (run / "iteration-0" / "generations").glob("*")}, marker


def test_responses_of_iteration_0_are_taken(fork, reference, tmp_path, monkeypatch):
    """10 held-out prompts in shards of 4 are 3 files, 24 prompts for training are 6."""
    shards, marker = generated(reference)
    assert len(shards) == 9
    said = fork("objective.beta=1", "selfplay.iterations=1").err
    assert f"copied the responses of iteration 0 from {reference} (9 files)" in said
    ours, our_marker = generated(tmp_path / "fork")
    assert ours == shards and our_marker["resumed"]
    assert (our_marker["digest"], our_marker["made_from"]) == (marker["digest"], marker["made_from"])
    provenance = json.loads((tmp_path / "fork" / "provenance.json").read_text())
    assert provenance["responses_from"] == str(reference)
    # A control needs the responses to held-out prompts only, and self-play takes those from a control.
    control = tmp_path / "control"
    assert "(3 files)" in fork("objective={name: sft}", "selfplay.iterations=1", "train.epochs=1", name="control").err
    assert set(generated(control)[0]) == {f"heldout-0000{number}.jsonl" for number in range(3)}
    said = fork("selfplay.iterations=1", name="back", source=control).err
    assert f"copied the responses of iteration 0 from {control} (3 files)" in said
    assert generated(tmp_path / "back")[0] == shards  # six shards are generated as in the reference


def test_other_responses_are_not_taken(fork, reference, tmp_path):
    said = fork("opponent.temperature=0", "selfplay.iterations=1").err
    assert "copied the responses" not in said and "opponent.temperature: was 0.4, is 0.0" in said
    ours, _ = generated(tmp_path / "fork")
    assert ours.keys() == generated(reference)[0].keys() and ours != generated(reference)[0]


def test_changed_responses_of_the_source_are_refused(fork, reference, tmp_path):
    source = shutil.copytree(reference, tmp_path / "source", symlinks=True)
    with (source / "iteration-0" / "generations" / "heldout-00000.jsonl").open("a") as file:
        file.write(" ")
    assert "has changed since it was written" in fork(source=source, code=2).message


def test_interrupted_copy_of_responses_is_completed(fork, reference, tmp_path):
    """A kill between two files leaves some of them, each with its digest, and no marker."""
    fork("selfplay.iterations=1", "train.epochs=1")
    run = tmp_path / "fork"
    before = played(run)
    for path in (*(run / "iteration-0").iterdir(), *(run / ".spinlm" / "iteration-0").iterdir(), run / "best"):
        if path.name not in ("generations", "generate.begun"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (run / "iteration-0" / "generations" / "train-00003.jsonl").unlink()
    assert "(1 files)" in fork("selfplay.iterations=1", "train.epochs=1").err
    assert played(run) == before


def test_fork_does_not_change_its_source(fork, reference, tmp_path):
    source = shutil.copytree(reference, tmp_path / "source", symlinks=True)
    before = contents(source)
    fork("selfplay.iterations=1", source=source)
    assert contents(source) == before


def test_refused_fork_deletes_nothing(world, cli, fork, reference, tmp_path):
    """Even with --overwrite, and even if source and folder are the same."""
    own = shutil.copytree(reference, tmp_path / "own", symlinks=True)
    before = contents(own)
    assert "is the run folder itself" in fork("--overwrite", name="own", source=own, code=2).message
    assert "was made with other settings" in fork("--overwrite", "data.prompts=5", name="own", code=2).message
    assert (
        "no evaluated starting player" in fork("--overwrite", name="own", source=tmp_path / "nothing", code=2).message
    )
    assert contents(own) == before


def test_interrupted_fork_is_completed(fork, reference, tmp_path):
    """Markers are copied last, so a folder without them is filled again."""
    fork("selfplay.iterations=1")
    run = tmp_path / "fork"
    shutil.rmtree(run / "iteration-0")
    shutil.rmtree(run / ".spinlm" / "iteration-0")
    (run / "best").unlink()
    for name in (".spinlm/start/evaluate.done", ".spinlm/start/sft.done", "start/heldout_greedy.jsonl"):
        (run / name).unlink()
    fork()
    assert played(run) == played(reference)


@pytest.mark.parametrize(
    "change", ["data.heldout=9", "seed=1", "lora.r=2", "sft.epochs=2", "train.max_length=63", "lora=null"]
)
def test_settings_of_another_start_are_refused(fork, tmp_path, change):
    said = fork(change, code=2).message
    assert "its start was made with other settings" in said
    assert f"\n  {change.partition('=')[0]}" in said


def test_source_without_a_start_is_refused(fork, tmp_path):
    assert "no evaluated starting player" in fork(source=tmp_path / "nothing", code=2).message


def test_folder_with_another_start_is_refused(fork, world, cli, reference, tmp_path):
    source = shutil.copytree(reference, tmp_path / "source", symlinks=True)
    fork("selfplay.iterations=1")
    change_marker(tmp_path / "fork" / ".spinlm" / "start" / "sft.done", prefix_sharing=False)
    assert "has another start than" in fork(source=source, code=2).message


def test_files_of_a_fork_are_copies(fork, reference, tmp_path):
    before = contents(reference)
    fork("selfplay.iterations=1")
    for path in (tmp_path / "fork").rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("a") as file:
                file.write("edited")
    assert contents(reference) == before


def test_converted_model_is_linked_if_possible(reference, world, tmp_path, monkeypatch):
    monkeypatch.chdir(world.folder)
    source = RunDir(shutil.copytree(reference, tmp_path / "source", symlinks=True))
    source.base.mkdir()
    (source.base / "model.safetensors").write_bytes(b"weights")
    inodes = []
    for refuse in (False, True):
        folder = RunDir(tmp_path / f"fork-{refuse}")
        if refuse:
            monkeypatch.setattr("os.link", Mock(side_effect=OSError("another file system")))
        fork_from(load_recipe(world.recipe), folder, source)
        assert (folder.base / "model.safetensors").read_bytes() == b"weights"
        inodes.append((folder.base / "model.safetensors").stat().st_ino)
        assert not any(path.name.endswith(".tmp") for path in folder.root.rglob("*"))
    original = (source.base / "model.safetensors").stat().st_ino
    assert inodes[0] == original != inodes[1]
