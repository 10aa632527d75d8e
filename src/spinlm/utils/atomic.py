"""Atomic files: written under a temporary name, flushed to disk, then renamed. Also JSON files and digests."""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from spinlm.errors import RunError, SpinError

STORAGE_ERRNOS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE),
)
"""Errors of a disk or of its permissions, not of the content."""

_UMASK = os.umask(0)
os.umask(_UMASK)


@contextlib.contextmanager
def atomic_file(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file. It is renamed to `path` when the block ends without an error."""
    with atomic_path(path) as temporary:
        with temporary.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a file or a folder. It is renamed to `path` when the block ends without an error.

    Raises:
        OSError: the path cannot be written. Its errno is one of `STORAGE_ERRNOS`, whichever error a library raised.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.tmp"
    if temporary.is_dir():
        shutil.rmtree(temporary)
    try:
        yield temporary
        _sync_tree(temporary)
        if path.is_dir() and temporary.is_dir():  # a file never replaces a folder
            shutil.rmtree(path)
        temporary.replace(path)
        _fsync(path.parent)
    except OSError as error:
        if error.filename is None or Path(error.filename) == temporary:  # users know the final name
            error.filename = str(path)
        raise
    except SpinError:
        raise
    except Exception as error:  # each library has its own class for a full disk
        for number in STORAGE_ERRNOS:
            if os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number), str(path)) from error
        raise


def _sync_tree(path: Path) -> None:
    for child in [*path.rglob("*"), path]:
        if child.is_file():
            with contextlib.suppress(PermissionError):  # a file system without file modes
                child.chmod(0o666 & ~_UMASK)  # safetensors makes files private
        _fsync(child)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text, atomically."""
    with atomic_file(path, "w") as file:
        file.write(text)


def read_json(path: Path) -> Any:
    """Read a JSON file that spinlm wrote.

    Raises:
        RunError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"{path}: is missing. Run the same command again to make the file") from error
    except ValueError as error:
        raise RunError(f"{path}: damaged ({error}). Delete it and run again to replace it") from error


def read_json_lines(path: Path) -> Iterator[Any]:
    """Yield the values in a JSON-lines file. Only a line feed ends a line, because text may hold other separators.

    Raises:
        RunError: the file is missing, or a line is damaged.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise RunError(f"{path}, line {number}: damaged ({error})") from error
    except FileNotFoundError as error:
        raise RunError(f"{path}: is missing") from error


def finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON cannot hold, by None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def file_digest(path: Path) -> str:
    """SHA-256 of a file's contents."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def text_digest(text: str) -> str:
    """SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def short_digest(value: Any) -> str:
    """First 12 hexadecimal digits of the SHA-256 of a JSON value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
