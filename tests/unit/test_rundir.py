"""The run folder keeps its files whole, and notices when they no longer fit together."""

import errno
import fcntl
import hashlib
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from spinlm.errors import RunError
from spinlm.recipe.schema import Recipe
from spinlm.rundir.layout import RunDir
from spinlm.rundir.provenance import bind, differences, identity, read_recipe, verify_inputs
from spinlm.rundir.stage_graph import STAGES, START, stage_label
from spinlm.utils.atomic import read_json, write_json


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Markers


CHAIN = [
    ("prepare", START),
    ("sft", START),
    ("evaluate", START),
    *(
        (stage, iteration)
        for iteration in (0, 1)
        for stage in ("generate", "reference_logprobs", "train", "evaluate", "promote")
    ),
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
    assert run.metadata("prepare", START)["counts"] == {"train": 3}


def test_a_marker_says_how_long_its_stage_took_and_whether_it_was_interrupted(run):
    finish(run, ("prepare", START), ("sft", START))
    assert "seconds" not in run.metadata("prepare", START), "nobody saw it begin"
    work = run.iteration(0) / "generations"
    run.begin("generate", 0, work)
    time.sleep(0.02)
    run.complete("generate", 0, [])
    took = run.metadata("generate", 0)
    assert 0.02 <= took["seconds"] < 5 and "resumed" not in took
    again = RunDir(run.root)
    again.begin("generate", 0, work)
    again.complete("generate", 0, [])
    assert again.metadata("generate", 0)["resumed"] is True
    assert again.reproducible_metadata("generate", 0) == {
        name: took[name] for name in ("made_from", "digest", "outputs")
    }


def written(run: RunDir) -> dict[str, Path]:
    """Completes the warm-up with a folder and two files as its outputs; returns all its files."""
    finish(run, ("prepare", START))
    files = {name: run.iteration(START) / name for name in ("player/deep/weights", "player/config", "a", "b")}
    for number, path in enumerate(files.values()):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([number, 255, 0, 7]))
    run.complete("sft", START, [run.player(START), files["a"], files["b"]])
    return files


def test_marker_names_every_file_with_its_digest(run):
    files = written(run)
    facts = run.metadata("sft", START)
    assert facts["outputs"] == {
        f"start/{name}": hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()
    }
    assert facts["made_from"] == run.metadata("prepare", START)["digest"]


def test_digest_of_a_stage_depends_on_names_and_contents(run):
    """Not on the order in which its outputs are given."""
    files = written(run)

    def digest_of(*outputs: Path) -> str:
        run.complete("sft", START, outputs)
        return run.metadata("sft", START)["digest"]

    first = digest_of(run.player(START), files["a"], files["b"])
    assert digest_of(files["b"], files["a"], run.player(START)) == first
    assert digest_of(files["b"], run.player(START)) != first
    one, other = files["a"].read_bytes(), files["b"].read_bytes()
    files["a"].write_bytes(other)
    files["b"].write_bytes(one)
    assert digest_of(run.player(START), files["a"], files["b"]) != first
    files["a"].write_bytes(one)
    files["b"].write_bytes(other)
    assert digest_of(run.player(START), files["a"], files["b"]) == first
    files["player/config"].rename(files["player/config"].with_name("other"))
    assert digest_of(run.player(START), files["a"], files["b"]) != first


def flip_a_bit(path: Path) -> None:
    """Of the same length, at the same time: nothing but the content says so."""
    stamp, data = path.stat(), path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


def add_a_bit(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def put_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


CHANGED, MISSING = "has changed since it was written", "is missing"


@pytest.mark.parametrize("name", ["player/deep/weights", "player/config", "a", "b"])
@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (flip_a_bit, CHANGED),
        (add_a_bit, CHANGED),
        (lambda path: path.write_bytes(b""), CHANGED),
        (Path.unlink, MISSING),
        (put_a_folder, MISSING),
    ],
)
def test_file_that_changed_is_noticed_before_it_is_built_on(run, name, damage, what):
    files = written(run)
    run.require("sft", START)
    damage(files[name])
    expected = f"{files[name]}: {what}. Delete it and {run.marker('warmup', START)}, then run again to make it anew"
    for build_on in (
        lambda: run.require("sft", START),
        lambda: run.begin("generate", 0),
        lambda: run.begin("evaluate", START),
    ):
        with pytest.raises(RunError) as caught:
            build_on()
        assert str(caught.value) == expected
    assert not run.marker("generate", 0).exists()


@pytest.mark.parametrize("ahead", [0, -50 * 365 * 86400, 20 * 365 * 86400])  # of the clock that dated it, in seconds
def test_file_that_changed_is_noticed_whatever_the_clock_says(run, ahead):
    """In place, to the same length, at once, and with the time it had before."""
    path = written(run)["player/deep/weights"]
    then = time.time() + ahead
    os.utime(path, (then, then))
    run.require("sft", START)
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    os.utime(path, (then, then))
    with pytest.raises(RunError, match="has changed since it was written"):
        run.require("sft", START)


def test_files_of_others_are_no_concern(run):
    written(run)
    (run.player(START) / "notes.txt").write_text("mine")
    run.require("sft", START)


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "null", '{"made_from": null, "digest": "0"}'])
def test_marker_that_is_damaged(run, text):
    written(run)
    marker = run.marker("sft", START)
    marker.write_text(text)
    for look in (
        lambda: run.done("sft", START),
        lambda: run.require("sft", START),
        lambda: run.begin("generate", 0),
        lambda: run.complete("generate", 0, []),
    ):
        with pytest.raises(RunError) as caught:
            look()
        assert str(caught.value).startswith(f"{marker}: damaged (")
        assert "Delete it and run again to" in str(caught.value)


def test_unfinished_work_is_kept_as_long_as_it_fits(run):
    files = written(run)
    work = run.iteration(0) / "generations"
    run.begin("generate", 0, work)
    noted = read_json(run.iteration(0) / "generate.begun")
    assert noted["made_from"] == run.metadata("sft", START)["digest"]
    work.mkdir()
    (work / "half.txt").write_text("half")
    run.begin("generate", 0, work)
    assert names(work) == ["half.txt"]
    recipe = Recipe(model={"path": "m"}, data={"path": "d"}).model_dump(mode="json")
    write_json(run.recipe, recipe)
    run.begin("generate", 0, work)
    assert not work.exists(), "the work was begun by no recipe that is known"
    work.mkdir()
    write_json(run.recipe, recipe | {"report_to": ["wandb"]})  # which may change
    run.begin("generate", 0, work)
    assert work.exists()
    write_json(run.recipe, recipe | {"seed": 1})
    run.begin("generate", 0, work)
    assert not work.exists(), "another recipe makes something else"
    work.mkdir()
    add_a_bit(files["a"])
    run.complete("sft", START, [run.player(START), files["a"], files["b"]])  # redone, with another result
    run.begin("generate", 0, work)
    assert not work.exists()
    now = read_json(run.iteration(0) / "generate.begun")["made_from"]
    assert now == run.metadata("sft", START)["digest"] != noted["made_from"]


def test_unfinished_work_that_nobody_began_is_thrown_away(run):
    written(run)
    work = run.iteration(0) / "generations"
    work.mkdir(parents=True)
    run.begin("generate", 0, work)
    assert not work.exists()


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
    finish(run, redone)  # with the same result: nothing to notice
    assert all(run.done(*stage) for stage in CHAIN)
    finish(run, redone, result="another result")
    with pytest.raises(RunError) as caught:
        run.done(*stale)
    message = str(caught.value)
    assert message.startswith(f"{run.marker(*stale)}: this stage was made from another result of {stage_label(redone)}")
    assert (
        f"Remove {run.marker(*stale)} and what follows it to redo the stage, or start again with --overwrite" in message
    )
    with pytest.raises(RunError):
        run.require(*stale)


def sealed_shard(run: RunDir) -> Path:
    path = run.generations(0, "train", 0)
    path.parent.mkdir(parents=True)
    path.write_text("a line\n")
    assert not run.is_verified(path)
    run.record_digest(path)
    assert run.is_verified(path)
    return path


def test_a_shard_that_changes_before_its_stage_is_complete(run, caplog):
    path = sealed_shard(run)
    path.write_text("another line\n")
    assert not run.is_verified(path)
    assert f"{path}: has changed since it was written, and is made anew" in caplog.text
    with pytest.raises(RunError, match="has changed since it was written"):
        run.complete("prepare", START, [path])


def test_a_seal_that_is_damaged_does_not_fit(run):
    path = sealed_shard(run)
    (seal,) = (path.parent / ".seals").iterdir()
    seal.write_bytes(b"\xff" + seal.read_bytes()[1:])
    assert not run.is_verified(path)


def test_a_stage_is_not_complete_without_all_its_files(run):
    path = sealed_shard(run)
    path.unlink()
    with pytest.raises(RunError, match=r"is missing\. Run again to make it anew"):
        run.complete("prepare", START, [path])
    assert not run.marker("prepare", START).exists()


def test_completing_a_stage_needs_the_one_before(run):
    finish(run, ("prepare", START))
    with pytest.raises(RunError, match=r"warm-up has not been completed, and generate of iteration 0 needs it"):
        finish(run, ("generate", 0))
    assert not run.marker("generate", 0).exists()


def test_require(run):
    with pytest.raises(RunError, match=r"score of iteration 3 has not been completed; it comes first"):
        run.require("reference_logprobs", 3)


# Recipe and inputs


GAME = {"selfplay": {"iterations": 2}, "seed": 0, "train": {"epochs": 2, "save_steps": 50}}


def test_bind(run):
    bind(run, GAME, ())
    assert json.loads(run.recipe.read_text()) == yaml.safe_load((run.root / "recipe.yaml").read_text()) == GAME
    finish(run, ("prepare", START))
    bind(run, GAME, ())
    with pytest.raises(RunError) as caught:
        bind(run, GAME | {"train": {"epochs": 3, "save_steps": 50}, "seed": 1}, ())
    assert str(caught.value) == (
        f"{run.root}: was made with a different recipe:\n  seed: was 0, is 1\n  train.epochs: was 2, is 3\n"
        "Choose another --run-dir, or start again with --overwrite (this deletes what is there)"
    )


def test_harmless_fields_may_change_under_way(run):
    bind(run, GAME, ())
    finish(run, ("prepare", START))
    other = GAME | {"train": {"epochs": 2, "save_steps": 7}}
    with pytest.raises(RunError, match="save_steps: was 50, is 7"):
        bind(run, other, ())
    bind(run, other, ["train.save_steps"])
    assert json.loads(run.recipe.read_text()) == other


def test_more_iterations_continue_a_run_and_fewer_do_not(run):
    bind(run, GAME, ())
    finish(run, ("prepare", START))
    bind(run, GAME | {"selfplay": {"iterations": 3}}, ())
    with pytest.raises(RunError, match=r"selfplay\.iterations: was 3, is 2"):
        bind(run, GAME, ())


@pytest.mark.parametrize("name", ["train.learning_rate", "objective.beta"])
def test_more_iterations_have_values_of_their_own(run, name):
    section, key = name.split(".")

    def game(iterations: int, value: Any) -> dict[str, Any]:
        return GAME | {"selfplay": {"iterations": iterations}, section: {key: value}}

    bind(run, game(2, [0.5, 0.25]), ())
    finish(run, ("prepare", START))
    bind(run, game(3, [0.5, 0.25, 0.125]), ())
    for changed in (game(4, [0.5, 0.25, 0.5, 0.5]), game(4, 0.5), game(2, [0.5, 0.25])):
        with pytest.raises(RunError, match="different recipe"):
            bind(run, changed, ())
    assert json.loads(run.recipe.read_text()) == game(3, [0.5, 0.25, 0.125])


def test_what_an_iteration_is_known_by_leaves_later_ones_out(run):
    def known(iteration: int, **changes: Any) -> str | None:
        recipe = {"model": {"path": "m"}, "data": {"path": "d"}, "lora": {}} | changes
        write_json(run.recipe, Recipe.model_validate(recipe).model_dump(mode="json"))
        return identity(run.recipe, iteration)

    def rates(*values: float) -> dict[str, Any]:
        return {"selfplay": {"iterations": len(values)}, "train": {"learning_rate": list(values)}}

    assert known(1, **rates(0.5, 0.25)) == known(1, **rates(0.5, 0.25, 0.125))
    assert known(2, **rates(0.5, 0.25, 1)) != known(2, **rates(0.5, 0.25, 0.125))
    assert known(1, **rates(0.5, 0.5)) == known(1, train={"learning_rate": 0.5})
    assert known(0, selfplay={"iterations": 4}) == known(0, selfplay={"iterations": 5}) == known(0)
    assert known(0, objective={"beta": [0.1, 5.0]}, selfplay={"iterations": 2}) == known(0)
    assert known(0, seed=1) != known(0) != known(0, lora=None)


def test_one_value_for_all_iterations_may_be_written_out(run):
    bind(run, GAME | {"objective": {"beta": 0.1}}, ())
    finish(run, ("prepare", START))
    bind(run, GAME | {"objective": {"beta": [0.1, 0.1, 5.0]}, "selfplay": {"iterations": 3}}, ())


def test_recipe_can_be_corrected_until_there_are_examples(run):
    bind(run, GAME, ())
    bind(run, GAME | {"seed": 1}, ())
    assert json.loads(run.recipe.read_text())["seed"] == 1
    finish(run, ("prepare", START))
    with pytest.raises(RunError, match="seed: was 1, is 0"):
        bind(run, GAME, ())
    assert json.loads(run.recipe.read_text())["seed"] == 1


@pytest.mark.parametrize("left", [None, "seed: 1\n"])
def test_recipe_for_people_is_written_after_an_interruption(run, left):
    """Between the two files of a recipe."""
    bind(run, GAME, ())
    readable = run.root / "recipe.yaml"
    expected = readable.read_text()
    readable.unlink() if left is None else readable.write_text(left)
    bind(run, GAME, ())
    assert readable.read_text() == expected


def test_recipe_stays_while_anything_was_made_from_it(run):
    """prepare.done is deleted, as the message about a file that has changed asks for; the players still stand."""
    bind(run, {"seed": 0, "selfplay": {"iterations": 2}}, ())
    finish(run, *CHAIN)
    run.marker("prepare", START).unlink()
    with pytest.raises(RunError, match="seed: was 0, is 1"):
        bind(run, {"seed": 1, "selfplay": {"iterations": 2}}, ())


def test_bind_inputs(run):
    inputs = {"data": {"sha256": "a"}, "model": {"model.safetensors": 100}}
    verify_inputs(run, inputs)  # nothing to compare with yet
    write_json(run.provenance, {"inputs": {"data": {"sha256": "the first try"}}, "python": "3"})
    verify_inputs(run, inputs)  # nothing has been made of it
    write_json(run.provenance, {"inputs": inputs, "python": "3"})
    finish(run, ("prepare", START))
    verify_inputs(run, inputs)
    with pytest.raises(RunError) as caught:
        verify_inputs(run, {"data": {"sha256": "b"}, "model": {"model.safetensors": 100, "config.json": "x"}})
    assert str(caught.value) == (
        f"{run.root}: the model or data has changed since this run began:\n"
        '  data.sha256: was "a", is "b"\n  model.config.json: was null, is "x"\n'
        "Put the old one back, choose another --run-dir, or start again with --overwrite"
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
    written(run)
    assert run.best() is None
    for judged, best in enumerate((START, 1, 1)):
        for stage in STAGES:
            run.complete(stage, judged, [], **({"best": best} if stage == "promote" else {}))
        assert run.best() == best


def test_the_link_to_the_best(run):
    run.root.mkdir()
    for iteration, name in ((START, "start"), (2, "iteration-2"), (10, "iteration-10"), (10, "iteration-10")):
        run.set_best(iteration)
        assert run.best_link.readlink() == Path(name)  # relative, so that a run folder can be moved
    assert names(run.root) == ["best"]


def test_a_folder_where_the_link_to_the_best_should_be(run, caplog):
    """What `cp -rL` and most archives make of it."""
    (run.root / "best").mkdir(parents=True)
    (run.root / "best" / "mine.txt").write_text("mine")
    run.set_best(2)
    assert "a folder stands where a link to iteration-2 should be" in caplog.text
    assert (run.root / "best" / "mine.txt").read_text() == "mine"


def test_a_file_system_without_links(run, caplog, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    run.root.mkdir()
    monkeypatch.setattr(Path, "symlink_to", refuse)
    run.set_best(2)
    assert "this file system has no links; the best player is in iteration-2" in caplog.text


def test_a_folder_that_is_replaced_under_a_process(run):
    with run.locked():
        run.root.rename(run.root.with_name("elsewhere"))
        with pytest.raises(RunError, match="was removed or replaced while it was in use"):
            run.begin("prepare", START)
        run.write_error(RunError("x"))
        assert not run.root.exists(), "nothing is made in the place of what was removed"
        with RunDir(run.root).locked(), pytest.raises(RunError, match="was removed or replaced"):
            run.complete("prepare", START, [])


def test_who_only_looks_is_waited_for(run):
    with run.locked():
        pass
    with (run.root / "lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        threading.Timer(0.2, fcntl.flock, (file, fcntl.LOCK_UN)).start()
        with run.locked():
            assert run.in_use()


RECIPE = {"model": {"path": "m"}, "data": {"path": "d"}}


def test_a_recipe_that_has_changed_on_disk(run):
    """It is told, and written anew by whoever has the right one."""
    recipe = Recipe.model_validate(RECIPE).model_dump(mode="json")
    written(run)
    bind(run, recipe, ())
    sound = run.recipe.read_bytes()
    assert read_recipe(run) == recipe
    for damaged in (sound.replace(b'"beta": 0.1', b'"beta": 0.5'), sound[:100], b""):
        assert damaged != sound
        run.recipe.write_bytes(damaged)
        with pytest.raises(RunError, match=r"recipe.resolved.json: has changed since it was written"):
            read_recipe(run)
        with pytest.raises(RunError, match=r"(?s)was made with a different recipe:.*seed: was 0, is 1"):
            bind(run, recipe | {"seed": 1}, ())
        bind(run, recipe, ())
        assert run.recipe.read_bytes() == sound
    run.recipe.write_bytes(b"")
    (run.root / "recipe.yaml").write_text("damaged: too")
    with pytest.raises(RunError, match="damaged, and so is"):
        bind(run, recipe, ())


def test_clear(run, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept.txt").write_text("kept")
    with run.locked():
        bind(run, {"seed": 0, "selfplay": {"iterations": 2}}, ())
        finish(run, *CHAIN)
        run.set_best(0)
        (run.root / "link").symlink_to(tmp_path / "outside")
        run.clear()
        assert names(run.root) == ["lock"]
        run.clear()  # nothing to do
    assert (tmp_path / "outside" / "kept.txt").read_text() == "kept"


def test_clear_that_was_cut_short_can_be_done_again(run, monkeypatch):
    bind(run, {"seed": 0, "selfplay": {"iterations": 2}}, ())
    finish(run, *CHAIN)
    deleted = []

    def unlink(path: Path, missing_ok: bool = False) -> None:
        deleted.append(path)

    with monkeypatch.context() as patch, run.locked():
        patch.setattr(Path, "unlink", unlink)
        run.clear()
    assert deleted[-1] == run.recipe  # while it stands, the folder is known for a run
    with run.locked():
        run.clear()
    assert names(run.root) == ["lock"]


@pytest.mark.parametrize("name", ["thesis.txt", "recipe.yaml", ".hidden"])
def test_folder_that_is_no_run_is_left_alone(run, name):
    run.root.mkdir()
    (run.root / "lock").write_text("mine")
    (run.root / name).write_text("years of work")
    with pytest.raises(RunError) as caught, run.locked():
        pass
    assert str(caught.value) == f"{run.root}: holds files but no spinlm run. Choose another --run-dir"
    assert {path.name: path.read_text() for path in run.root.iterdir()} == {"lock": "mine", name: "years of work"}


def test_run_whose_first_write_was_cut_short_can_be_begun_again(run, monkeypatch):
    """Such as by a full disk, where the same command is to be run again."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError), run.locked():
        patch.setattr(os, "fsync", full)
        bind(run, {"seed": 0, "selfplay": {"iterations": 2}}, ())
    assert not run.recipe.exists()
    with run.locked():
        bind(run, {"seed": 0, "selfplay": {"iterations": 2}}, ())
    assert read_json(run.recipe) == {"seed": 0, "selfplay": {"iterations": 2}}


@pytest.mark.parametrize("below", ["", "run"])
def test_run_folder_that_is_a_file(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    root = tmp_path / "file" / below
    with pytest.raises(RunError) as caught, RunDir(root).locked():
        pass
    assert str(caught.value) == f"{root}: not a folder, and cannot be made one. Choose another --run-dir"
    assert (tmp_path / "file").read_text() == "mine"


def test_a_model_of_the_hub_is_pinned_to_what_it_was(run):
    """Where its repository has moved on."""
    recipe = Recipe.model_validate(RECIPE).model_dump(mode="json")
    written(run)
    bind(run, recipe, ())
    inputs = {"data": {"sha256": "a"}, "model": {"id": "m", "commit": "abc"}}
    write_json(run.provenance, {"inputs": inputs})
    verify_inputs(run, inputs | {"model": {"id": "m", "commit": None}})  # where the hub cannot be asked
    with pytest.raises(RunError, match=r"(?s)model.commit: was \"abc\", is \"new\"\nSet model.revision=abc, choose"):
        verify_inputs(run, inputs | {"model": {"id": "m", "commit": "new"}})
    for other in ("new", "abcd"):
        with pytest.raises(RunError, match="was made with a different recipe"):
            bind(run, recipe | {"model": {**recipe["model"], "revision": other}}, ())
    bind(run, recipe | {"model": {**recipe["model"], "revision": "abc"}}, ())
