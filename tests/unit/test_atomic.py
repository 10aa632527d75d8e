"""A file is complete or does not exist."""

import errno
import os
import stat
from pathlib import Path

import pytest

from spinlm.errors import RunError
from spinlm.utils.atomic import STORAGE_ERRNOS, atomic_file, atomic_path, read_json, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


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
    write_json(path, "new")  # the temporary file does no harm
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
    with atomic_path(path) as temporary:  # replaces the temporary folder that was left
        temporary.mkdir()
        (temporary / "newer.txt").write_text("newer")
    assert names(path) == ["newer.txt"]
    assert names(tmp_path) == ["folder"]


def test_file_is_replaced_not_rewritten(tmp_path):
    """An open file and a hard link keep the old content."""
    path = tmp_path / "file.txt"
    path.write_text("old")
    os.link(path, tmp_path / "link.txt")
    with atomic_file(path, "w") as file:
        file.write("new")
    assert (path.read_text(), (tmp_path / "link.txt").read_text()) == ("new", "old")


@pytest.mark.parametrize(
    "raised", [RuntimeError("I/O error: No space left on device (os error 28)"), OSError(28, "Full")]
)
def test_full_disk_names_the_file(tmp_path, raised):
    """Each library reports a full disk in its own way."""
    with pytest.raises(OSError) as caught, atomic_path(tmp_path / "weights"):
        raise raised
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "weights"))


@pytest.mark.parametrize("number", STORAGE_ERRNOS)
def test_storage_error_names_the_file(tmp_path, number):
    with pytest.raises(OSError) as caught, atomic_path(tmp_path / "weights"):
        raise RuntimeError(f"I/O error: {os.strerror(number)} (os error {number})")
    assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path / "weights"))


def test_error_does_not_name_the_temporary_file(tmp_path):
    (tmp_path / ".weights.tmp").symlink_to(tmp_path / "nowhere" / "weights")
    with pytest.raises(OSError) as caught, atomic_file(tmp_path / "weights"):
        pass
    assert str(caught.value.filename) == str(tmp_path / "weights")


def test_other_errors_are_unchanged(tmp_path):
    for error in (RuntimeError("no such layer"), FileNotFoundError(errno.ENOENT, "gone", "elsewhere")):
        with pytest.raises(type(error)) as caught, atomic_path(tmp_path / "weights"):
            raise error
        assert caught.value is error
        assert getattr(error, "filename", "elsewhere") == "elsewhere"


def test_file_modes_follow_the_umask(tmp_path):
    umask = os.umask(0)
    os.umask(umask)
    with atomic_path(tmp_path / "player") as temporary:
        temporary.mkdir()
        (temporary / "weights").touch(mode=0o600)  # like safetensors
    write_json(tmp_path / "file.json", 1)
    for path in (tmp_path / "player" / "weights", tmp_path / "file.json"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("text", ["", "{", "nonsense", '{"a": '])
def test_damaged_json(tmp_path, text):
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(RunError) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}: damaged (")
    assert "Delete it and run again" in str(caught.value)
