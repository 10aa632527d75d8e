"""Markers notice every file that has changed, and every stage whose input was replaced."""

import hashlib
import os
import time
from pathlib import Path

import pytest
from rundirs import CHAIN, finish, finish_sft, names

from spinlm.errors import RunError
from spinlm.rundir.layout import RunDir
from spinlm.rundir.stage_graph import START, stage_label
from spinlm.utils.atomic import read_json

RECIPE, OTHER_RECIPE = "fingerprint", "another fingerprint"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def test_stage_is_done_when_its_marker_exists(run):
    for place, stage in enumerate(CHAIN):
        assert not run.done(*stage)
        finish(run, stage)
        assert all(run.done(*done) for done in CHAIN[: place + 1])


def test_marker_keeps_metadata(run):
    assert not run.has_results()
    run.complete("prepare", START, [], counts={"train": 3})
    assert run.metadata("prepare", START)["counts"] == {"train": 3}
    assert run.has_results()


def test_marker_holds_seconds_and_whether_the_stage_was_resumed(run):
    finish(run, ("prepare", START), ("sft", START))
    assert "seconds" not in run.metadata("prepare", START), "this process did not begin the stage"
    run.begin("generate", 0, RECIPE)
    time.sleep(0.02)
    run.complete("generate", 0, [])
    marker = run.metadata("generate", 0)
    assert 0.02 <= marker["seconds"] < 5 and "resumed" not in marker
    resumed = RunDir(run.root)
    resumed.begin("generate", 0, RECIPE)
    resumed.complete("generate", 0, [])
    assert resumed.metadata("generate", 0)["resumed"] is True
    assert resumed.reproducible_metadata("generate", 0) == {
        name: marker[name] for name in ("made_from", "digest", "outputs")
    }


def test_marker_lists_every_file_with_its_digest(run):
    files = finish_sft(run)
    marker = run.metadata("sft", START)
    assert marker["outputs"] == {
        f"start/{name}": hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()
    }
    assert marker["made_from"] == run.metadata("prepare", START)["digest"]


def test_stage_digest_depends_on_names_and_contents_not_on_order(run):
    files = finish_sft(run)

    def digest_of(*outputs: Path) -> str:
        run.complete("sft", START, outputs)
        return run.metadata("sft", START)["digest"]

    first = digest_of(run.player(START), files["a"], files["b"])
    assert digest_of(files["b"], files["a"], run.player(START)) == first
    assert digest_of(files["b"], run.player(START)) != first
    a, b = files["a"].read_bytes(), files["b"].read_bytes()
    files["a"].write_bytes(b)
    files["b"].write_bytes(a)
    assert digest_of(run.player(START), files["a"], files["b"]) != first
    files["a"].write_bytes(a)
    files["b"].write_bytes(b)
    assert digest_of(run.player(START), files["a"], files["b"]) == first
    files["player/config"].rename(files["player/config"].with_name("other"))
    assert digest_of(run.player(START), files["a"], files["b"]) != first


def flip_a_bit(path: Path) -> None:
    """Length and modification time stay the same."""
    status, data = path.stat(), path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def add_a_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def replace_with_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


CHANGED, MISSING = "has changed", "is missing"


@pytest.mark.parametrize("name", ["player/deep/weights", "player/config", "a", "b"])
@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (flip_a_bit, CHANGED),
        (add_a_byte, CHANGED),
        (lambda path: path.write_bytes(b""), CHANGED),
        (Path.unlink, MISSING),
        (replace_with_folder, MISSING),
    ],
)
def test_changed_file_is_noticed_before_it_is_read(run, name, damage, problem):
    files = finish_sft(run)
    run.require("sft", START)
    damage(files[name])
    for build_on in (
        lambda: run.require("sft", START),
        lambda: run.begin("generate", 0, RECIPE),
        lambda: run.begin("evaluate", START, RECIPE),
    ):
        with pytest.raises(RunError) as caught:
            build_on()
        message = str(caught.value)
        assert message.startswith(f"{files[name]}: {problem}") and str(run.marker("sft", START)) in message
    assert not run.marker("generate", 0).exists()


@pytest.mark.parametrize("ahead", [0, -50 * 365 * 86400, 20 * 365 * 86400])  # seconds between the file and the clock
def test_changed_file_is_noticed_whatever_the_clock_says(run, ahead):
    """Changed in place to the same length, at once, with the same modification time."""
    path = finish_sft(run)["player/deep/weights"]
    then = time.time() + ahead
    os.utime(path, (then, then))
    run.require("sft", START)
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    os.utime(path, (then, then))
    with pytest.raises(RunError, match=CHANGED):
        run.require("sft", START)


def test_files_that_no_stage_wrote_are_ignored(run):
    finish_sft(run)
    (run.player(START) / "notes.txt").write_text("mine")
    run.require("sft", START)


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "null", '{"made_from": null, "digest": "0"}'])
def test_damaged_marker(run, text):
    finish_sft(run)
    marker = run.marker("sft", START)
    marker.write_text(text)
    for read in (
        lambda: run.done("sft", START),
        lambda: run.require("sft", START),
        lambda: run.begin("generate", 0, RECIPE),
        lambda: run.complete("generate", 0, []),
    ):
        with pytest.raises(RunError) as caught:
            read()
        assert str(caught.value).startswith(f"{marker}: damaged (") and "Delete it and run again" in str(caught.value)


def test_unfinished_work_is_kept_while_inputs_and_recipe_are_the_same(run):
    files = finish_sft(run)
    generations = run.generations(0, "train", 0).parent
    run.begin("generate", 0, RECIPE)
    made_from = read_json(run.begun_file("generate", 0))["made_from"]
    assert made_from == run.metadata("sft", START)["digest"]
    generations.mkdir(parents=True)
    (generations / "half.txt").write_text("half")
    run.begin("generate", 0, RECIPE)
    assert names(generations) == ["half.txt"]
    run.begin("generate", 0, OTHER_RECIPE)
    assert not generations.exists()
    generations.mkdir()
    add_a_byte(files["a"])
    run.complete("sft", START, [run.player(START), files["a"], files["b"]])  # repeated, with another result
    run.begin("generate", 0, OTHER_RECIPE)
    assert not generations.exists()
    assert read_json(run.begun_file("generate", 0))["made_from"] == run.metadata("sft", START)["digest"] != made_from


def test_unfinished_work_without_a_note_is_deleted(run):
    finish_sft(run)
    generations = run.generations(0, "train", 0).parent
    generations.mkdir(parents=True)
    run.begin("generate", 0, RECIPE)
    assert not generations.exists()


@pytest.mark.parametrize(
    ("redone", "stale"),
    [
        (("prepare", START), ("sft", START)),
        (("sft", START), ("evaluate", START)),
        (("sft", START), ("generate", 0)),
        (("generate", 0), ("reference_logprobs", 0)),
        (("reference_logprobs", 0), ("train", 0)),
        (("train", 0), ("evaluate", 0)),
        (("train", 0), ("generate", 1)),
        (("evaluate", 1), ("promote", 1)),
    ],
)
def test_redoing_a_stage_with_another_result_is_noticed(run, redone, stale):
    finish(run, *CHAIN)
    finish(run, redone)  # with the same result
    assert all(run.done(*stage) for stage in CHAIN)
    finish(run, redone, content="another result")
    with pytest.raises(RunError) as caught:
        run.done(*stale)
    message = str(caught.value)
    assert message.startswith(f"{run.marker(*stale)}: {stage_label(stale)}") and stage_label(redone) in message
    with pytest.raises(RunError):
        run.require(*stale)


def write_shard(run: RunDir) -> Path:
    path = run.generations(0, "train", 0)
    path.parent.mkdir(parents=True)
    path.write_text("a line\n")
    assert not run.is_verified(path)
    run.record_digest(path)
    assert run.is_verified(path)
    return path


def test_shard_that_changes_before_its_stage_is_complete(run, caplog):
    path = write_shard(run)
    path.write_text("another line\n")
    assert not run.is_verified(path)
    assert f"{path}: has changed" in caplog.text
    with pytest.raises(RunError, match=CHANGED):
        run.complete("prepare", START, [path])


def test_damaged_digest_does_not_match(run):
    path = write_shard(run)
    digest = run.digest_file(path)
    digest.write_bytes(b"\xff" + digest.read_bytes()[1:])
    assert not run.is_verified(path)


def test_stage_is_not_complete_without_all_its_files(run):
    path = write_shard(run)
    path.unlink()
    with pytest.raises(RunError, match=MISSING):
        run.complete("prepare", START, [path])
    assert not run.marker("prepare", START).exists()


def test_completing_a_stage_needs_its_parent(run):
    finish(run, ("prepare", START))
    with pytest.raises(RunError, match=r"sft has not been completed, and generate of iteration 0 needs it"):
        finish(run, ("generate", 0))
    assert not run.marker("generate", 0).exists()


def test_require_names_the_stage_that_is_missing(run):
    with pytest.raises(RunError, match=r"reference_logprobs of iteration 3 has not been completed"):
        run.require("reference_logprobs", 3)
