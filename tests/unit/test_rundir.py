"""The link to the best player, and clearing a run folder."""

import errno
from pathlib import Path

import pytest
from rundirs import CHAIN, finish, finish_sft, names

from spinlm.recipe.schema import Recipe
from spinlm.rundir.layout import RunDir
from spinlm.rundir.resume import claim_recipe
from spinlm.rundir.stage_graph import STAGES, START

RECIPE = Recipe.model_validate({"model": {"path": "m"}, "data": {"path": "d"}})


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def test_best(run):
    finish_sft(run)
    assert run.best() is None
    for t, best in enumerate((START, 1, 1)):
        for stage in STAGES:
            run.complete(stage, t, [], **({"best": best} if stage == "promote" else {}))
        assert run.best() == best


def test_link_to_the_best_player(run):
    run.root.mkdir()
    for t, name in ((START, "start"), (2, "iteration-2"), (10, "iteration-10"), (10, "iteration-10")):
        run.set_best(t)
        assert run.best_link.readlink() == Path(name)  # relative, so that a run folder can be moved
    assert names(run.root) == ["best"]


def test_folder_in_the_place_of_the_link(run, caplog):
    """`cp -rL` and most archives replace the link with a copy."""
    (run.root / "best").mkdir(parents=True)
    (run.root / "best" / "mine.txt").write_text("mine")
    run.set_best(2)
    assert "iteration-2" in caplog.text
    assert (run.root / "best" / "mine.txt").read_text() == "mine"


def test_file_system_without_links(run, caplog, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    run.root.mkdir()
    monkeypatch.setattr(Path, "symlink_to", refuse)
    run.set_best(2)
    assert "iteration-2" in caplog.text


def test_shards_on_disk(run):
    for path in (run.generations(0, "train", 3), run.generations(0, "heldout", 0), run.pairs(0, "train", 1)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    run.generations(0, "train", 3).with_name(".train-00004.jsonl.tmp").touch()
    assert sorted(run.shards_on_disk("generate", 0)) == [("heldout", 0), ("train", 3)]
    assert run.shards_on_disk("reference_logprobs", 0) == [("train", 1)]


def test_clear(run, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept.txt").write_text("kept")
    with run.locked():
        claim_recipe(run, RECIPE)
        finish(run, *CHAIN)
        run.set_best(0)
        (run.root / "link").symlink_to(tmp_path / "outside")
        run.clear()
        assert names(run.root) == [".spinlm"] and names(run.state_folder) == ["lock"]
        run.clear()  # nothing is left to delete
    assert (tmp_path / "outside" / "kept.txt").read_text() == "kept"


def test_clear_that_was_cut_short_can_be_repeated(run, monkeypatch):
    def fail(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with run.locked():
        claim_recipe(run, RECIPE)
    finish(run, *CHAIN)
    with monkeypatch.context() as patch, pytest.raises(OSError), run.locked():
        patch.setattr(Path, "unlink", fail)
        run.clear()
    assert run.is_run() and not run.has_results()
    with run.locked():
        run.clear()
    assert names(run.root) == [".spinlm"] and names(run.state_folder) == ["lock"]
