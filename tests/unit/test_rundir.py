"""The run folder keeps its files whole, and notices when they no longer fit together."""

import fcntl
import json
import os
from pathlib import Path

import pytest

from spinlm.errors import RunError
from spinlm.rundir import START, RunDir, atomic_file, atomic_path, differences, read_json, write_json


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Atomic writes


def test_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with atomic_file(path, "w") as file:
        file.write("half")
        file.flush()
        assert not path.exists()
        file.write(" and half")
    assert path.read_text() == "half and half"
    assert names(path.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_exception_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(error), atomic_file(path, "w") as file:
        file.write("half of the ne")
        raise error
    assert path.read_text() == "old"
    write_json(path, "new")  # what was left does not stand in the way
    assert read_json(path) == "new"
    assert names(tmp_path) == ["file.txt"]


def test_exception_leaves_the_old_folder(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old.txt").write_text("old")
    with pytest.raises(ValueError), atomic_path(path) as temporary:
        temporary.mkdir()
        (temporary / "new.txt").write_text("new")
        raise ValueError
    assert names(path) == ["old.txt"]
    with atomic_path(path) as temporary:  # the temporary folder that was left is not mixed in
        temporary.mkdir()
        (temporary / "newer.txt").write_text("newer")
    assert names(path) == ["newer.txt"]
    assert names(tmp_path) == ["folder"]


def test_file_is_replaced_not_rewritten(tmp_path):
    """Who has the old file open goes on reading the old one, and a hard link to it keeps its content."""
    path = tmp_path / "file.txt"
    path.write_text("old")
    os.link(path, tmp_path / "link.txt")
    with atomic_file(path, "w") as file:
        file.write("new")
    assert (path.read_text(), (tmp_path / "link.txt").read_text()) == ("new", "old")


@pytest.mark.parametrize("text", ["", "{", "nonsense", '{"a": '])
def test_damaged_json(tmp_path, text):
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(RunError) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}: damaged (")
    assert "Delete it and run again" in str(caught.value)


# Digests and markers


def test_digest_depends_on_names_and_contents(tmp_path):
    for name, text in (("a", "1"), ("b", "2")):
        (tmp_path / name).write_text(text)
    first = digest([tmp_path / "a", tmp_path / "b"])
    assert digest([tmp_path / "b", tmp_path / "a"]) == first
    (tmp_path / "a").write_text("2")
    (tmp_path / "b").write_text("1")
    assert digest([tmp_path / "a", tmp_path / "b"]) != first


def test_digest_of_a_folder(tmp_path):
    (tmp_path / "player" / "deep").mkdir(parents=True)
    (tmp_path / "player" / "deep" / "weights").write_text("1")
    first = digest([tmp_path / "player"])
    (tmp_path / "player" / "deep" / "weights").write_text("2")
    assert digest([tmp_path / "player"]) != first
    (tmp_path / "player" / "deep" / "weights").write_text("1")
    assert digest([tmp_path / "player"]) == first
    (tmp_path / "player" / "deep" / "weights").rename(tmp_path / "player" / "deep" / "other")
    assert digest([tmp_path / "player"]) != first


CHAIN = [
    ("prepare", START),
    ("warmup", START),
    ("evaluate", START),
    *((stage, iteration) for iteration in (0, 1) for stage in ("generate", "score", "train", "evaluate", "promote")),
]


def finish(run: RunDir, *stages: tuple[str, int], result: str = "result") -> None:
    """Complete stages, each with one file as its output."""
    for stage, iteration in stages:
        path = run.marker(stage, iteration).with_suffix(".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{result} of {stage} {iteration}")
        run.complete(stage, iteration, [path])


def test_stage_is_done_when_its_marker_stands(run):
    for place, stage in enumerate(CHAIN):
        assert not run.done(*stage)
        finish(run, stage)
        assert all(run.done(*done) for done in CHAIN[: place + 1])


def test_marker_keeps_facts(run):
    run.complete("prepare", START, [], counts={"train": 3})
    assert run.facts("prepare", START)["counts"] == {"train": 3}


@pytest.mark.parametrize(
    ("redone", "stale"),
    [
        (("prepare", START), ("warmup", START)),
        (("warmup", START), ("evaluate", START)),
        (("warmup", START), ("generate", 0)),
        (("generate", 0), ("score", 0)),
        (("score", 0), ("train", 0)),
        (("train", 0), ("evaluate", 0)),
        (("train", 0), ("generate", 1)),
        (("evaluate", 1), ("promote", 1)),
    ],
)
def test_redoing_a_stage_with_another_result_is_noticed(run, redone, stale):
    finish(run, *CHAIN)
    finish(run, redone)  # with the same result: nothing to notice
    assert all(run.done(*stage) for stage in CHAIN)
    finish(run, redone, result="another result")
    with pytest.raises(RunError) as caught:
        run.done(*stale)
    message = str(caught.value)
    assert message.startswith(f"{run.marker(*stale)}: this stage was made from another result of {redone[0]}")
    assert f"Remove {run.marker(*stale)} and what follows it to redo the stage, or start again with --fresh" in message
    with pytest.raises(RunError):
        run.require(*stale)


def test_completing_a_stage_needs_the_one_before(run):
    finish(run, ("prepare", START))
    with pytest.raises(RunError, match=r"warmup has not been completed, and generate of iteration 0 needs it"):
        finish(run, ("generate", 0))
    assert not run.marker("generate", 0).exists()


def test_require(run):
    with pytest.raises(RunError, match=r"score of iteration 3 has not been completed; it comes first"):
        run.require("score", 3)


# Recipe and inputs


def test_bind(run):
    recipe = {"train": {"epochs": 2, "learning_rate": [1e-3, 5e-7]}, "seed": 0}
    run.bind(recipe, "the text")
    assert json.loads(run.recipe.read_text()) == recipe
    assert (run.root / "recipe.yaml").read_text() == "the text"
    run.bind(recipe, "the same recipe, with a comment")
    with pytest.raises(RunError) as caught:
        run.bind({"train": {"epochs": 3, "learning_rate": [1e-3, 5e-7]}, "seed": 1}, "the text")
    assert str(caught.value) == (
        f"{run.root}: was made with a different recipe:\n  seed: was 0, is 1\n  train.epochs: was 2, is 3\n"
        "Choose another --run-dir, or start again with --fresh (this deletes what is there)"
    )


def test_bind_inputs(run):
    inputs = {"data": {"sha256": "a"}, "model": {"model.safetensors": 100}}
    run.bind_inputs(inputs)  # nothing to compare with yet
    write_json(run.provenance, {"inputs": inputs, "python": "3"})
    run.bind_inputs(inputs)
    with pytest.raises(RunError) as caught:
        run.bind_inputs({"data": {"sha256": "b"}, "model": {"model.safetensors": 100, "config.json": "x"}})
    assert str(caught.value) == (
        f"{run.root}: the model or data has changed since this run began:\n"
        '  data.sha256: was "a", is "b"\n  model.config.json: was null, is "x"\n'
        "Put the old one back, choose another --run-dir, or start again with --fresh"
    )


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": 1, "b": {"c": [1, 2]}}, {"a": 1, "b": {"c": [1, 2]}}, []),
        ({"b": {"c": [1, 2]}}, {"b": {"c": [2, 1]}}, ["b.c: was [1, 2], is [2, 1]"]),
        ({"a": None}, {"a": {"r": 4}}, ['a: was null, is {"r": 4}']),
        ({"z": 1, "a": 1}, {"z": 2, "a": 2}, ["a: was 1, is 2", "z: was 1, is 2"]),
        ({}, {"new": True}, ["new: was null, is true"]),
        ({"old": "x"}, {}, ['old: was "x", is null']),
    ],
)
def test_differences(old, new, lines):
    assert differences(old, new) == lines


# The lock, the link, clearing


def test_lock(run):
    with run.locked():
        holder = (run.root / "lock").read_text()
        assert holder.startswith(f"pid {os.getpid()} on ")
        with pytest.raises(RunError) as caught, run.locked():
            pass
        assert f"{run.root}: in use by another process ({holder})" in str(caught.value)
        assert (run.root / "lock").read_text() == holder
    with run.locked():
        pass


def test_lock_is_released_by_an_exception(run):
    with pytest.raises(ValueError), run.locked():
        raise ValueError
    with run.locked():
        pass


def test_lock_that_somebody_left(run):
    """The file means nothing; who holds it does."""
    run.root.mkdir()
    (run.root / "lock").write_text("pid 1 on a machine that was switched off long ago, and its name was rather long")
    with run.locked():
        assert (run.root / "lock").read_text() == f"pid {os.getpid()} on {os.uname().nodename}"


def test_lock_of_another_process(run):
    run.root.mkdir()
    with (run.root / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RunError, match=r"in use by another process \(unknown\)"), run.locked():
            pass


def test_best(run):
    run.root.mkdir()
    assert run.best() is None
    for iteration, name in ((START, "start"), (2, "iteration-2"), (10, "iteration-10")):
        run.set_best(iteration)
        assert run.best() == iteration
        assert run.best_link.readlink() == Path(name)  # relative, so that a run folder can be moved
    assert names(run.root) == ["best"]


def test_clear(run, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept.txt").write_text("kept")
    with run.locked():
        run.bind({"seed": 0}, "text")
        finish(run, *CHAIN)
        run.set_best(0)
        (run.root / "link").symlink_to(tmp_path / "outside")
        run.clear()
        assert names(run.root) == ["lock"]
        run.clear()  # nothing to do
    assert (tmp_path / "outside" / "kept.txt").read_text() == "kept"


def test_clear_leaves_a_folder_alone_that_is_no_run(run):
    run.root.mkdir()
    (run.root / "thesis.txt").write_text("years of work")
    with run.locked(), pytest.raises(RunError, match="holds files but no spinlm run, so --fresh will not delete it"):
        run.clear()
    assert (run.root / "thesis.txt").read_text() == "years of work"
