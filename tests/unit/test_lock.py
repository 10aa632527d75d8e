"""One process at a time holds a run folder, and only a run folder."""

import fcntl
import os
import threading
from pathlib import Path

import pytest

from spinlm.errors import RunError
from spinlm.rundir.layout import RunDir
from spinlm.rundir.stage_graph import START


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def test_lock(run):
    with run.locked():
        owner = run.lock_owner()
        assert owner == f"pid {os.getpid()} on {os.uname().nodename}"
        with pytest.raises(RunError) as caught, run.locked():
            pass
        assert f"{run.root}: in use by another process ({owner})" in str(caught.value)
        assert run.lock_owner() == owner
    with run.locked():
        pass


def test_lock_is_released_by_an_exception(run):
    with pytest.raises(ValueError), run.locked():
        raise ValueError
    with run.locked():
        pass


def test_lock_file_of_a_dead_process_does_not_lock(run):
    run.state_folder.mkdir(parents=True)
    run.lock.write_text("pid 1 on a machine that was switched off long ago, and its name was rather long")
    with run.locked():
        assert run.lock_owner() == f"pid {os.getpid()} on {os.uname().nodename}"


def test_lock_of_another_process(run):
    run.state_folder.mkdir(parents=True)
    with run.lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RunError, match=r"in use by another process \(unknown\)"), run.locked():
            pass


def test_lock_waits_for_a_short_look(run):
    """`in_use` of another process holds the lock for a moment."""
    with run.locked():
        pass
    with run.lock.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        threading.Timer(0.2, fcntl.flock, (file, fcntl.LOCK_UN)).start()
        with run.locked():
            assert run.in_use()
    assert not run.in_use()


def test_folder_that_is_replaced_while_it_is_held(run):
    with run.locked():
        run.root.rename(run.root.with_name("elsewhere"))
        with pytest.raises(RunError, match="was removed or replaced"):
            run.begin("prepare", START, "fingerprint")
        run.write_error(RunError("x"))
        assert not run.root.exists(), "the removed folder is not made again"
        with RunDir(run.root).locked(), pytest.raises(RunError, match="was removed or replaced"):
            run.complete("prepare", START, [])


@pytest.mark.parametrize("name", ["thesis.txt", "recipe.yaml", "lock", ".hidden"])
def test_folder_with_other_files_is_left_alone(run, name):
    run.root.mkdir()
    (run.root / name).write_text("years of work")
    with pytest.raises(RunError) as caught, run.locked():
        pass
    assert str(caught.value).startswith(f"{run.root}: holds files but no spinlm run")
    assert {path.name: path.read_text() for path in run.root.iterdir()} == {name: "years of work"}


@pytest.mark.parametrize("below", ["", "run"])
def test_run_folder_that_is_a_file(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    root = tmp_path / "file" / below
    with pytest.raises(RunError) as caught, RunDir(root).locked():
        pass
    assert str(caught.value).startswith(f"{root}: not a folder")
    assert (tmp_path / "file").read_text() == "mine"
