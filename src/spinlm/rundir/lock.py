"""The lock of a run folder: one process at a time writes to it."""

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from spinlm.errors import RunError
from spinlm.utils.atomic import STORAGE_ERRNOS, write_text

LOCK_RETRY_SECONDS = 1.0  # `in_use` holds the lock for less than that
STATE = ".spinlm"
"""Folder inside the run folder with what only spinlm reads: markers, digests, the lock."""


class LockedFolder:
    """A run folder that one process can hold."""

    def __init__(self, root: Path):
        self.root = root
        self._lock_file: IO[str] | None = None  # open while this process holds the folder

    @property
    def state_folder(self) -> Path:
        """Folder with what only spinlm reads."""
        return self.root / STATE

    @property
    def lock(self) -> Path:
        """File that the process that writes to the folder holds a lock on. It contains the process id and the host."""
        return self.state_folder / "lock"

    @property
    def error_file(self) -> Path:
        """The error that ended the last attempt."""
        return self.root / "error.txt"

    @property
    def recipe(self) -> Path:
        """The run's recipe with all values filled in. `spinlm run` can run it again."""
        return self.root / "recipe.yaml"

    def digest_file(self, path: Path) -> Path:
        """File with the recorded SHA-256 of a file of the run folder."""
        relative = path.relative_to(self.root)
        return self.state_folder / "digests" / relative.with_name(f"{relative.name}.sha256")

    def is_run(self) -> bool:
        """Whether the folder holds a run."""
        return self.digest_file(self.recipe).exists()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run folder for this process. The system releases the lock however the process ends.

        Raises:
            RunError: another process holds the folder, or the path is a file, or the folder holds other files.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise RunError(f"{self.root}: not a folder, and cannot be made one. Choose another --run-dir") from None
        if not self.is_run() and self._has_foreign_files():
            raise RunError(f"{self.root}: holds files but no spinlm run. Choose another --run-dir")
        self.state_folder.mkdir(exist_ok=True)
        with self.lock.open("a+") as file:
            self._acquire(file)
            self._lock_file = file
            try:
                file.truncate(0)
                file.write(f"pid {os.getpid()} on {os.uname().nodename}")
                file.flush()
                yield
            except OSError as error:
                if error.errno in STORAGE_ERRNOS and error.filename is None:
                    error.filename = str(self.root)
                raise
            finally:
                self._lock_file = None

    def _has_foreign_files(self) -> bool:
        names = {entry.name for entry in self.root.iterdir() if entry.suffix != ".tmp"}
        if STATE in names:  # a process was killed between writing the recipe and recording its digest
            names -= {STATE, self.recipe.name, self.error_file.name}
        return bool(names)

    def _acquire(self, file: IO[str]) -> None:
        deadline = time.monotonic() + LOCK_RETRY_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise RunError(
                        f"{self.root}: cannot be locked ({error.strerror}). Choose another --run-dir"
                    ) from error
            if time.monotonic() > deadline:
                raise RunError(
                    f"{self.root}: in use by another process ({self.lock_owner().strip() or 'unknown'}). Wait for it "
                    "to end, or choose another --run-dir"
                )
            time.sleep(LOCK_RETRY_SECONDS / 20)

    def check_held(self) -> None:
        """Make sure that the folder under this name is still the one that this process locked.

        Raises:
            RunError: the folder was removed or replaced.
        """
        if self._lock_file is None:
            return
        if not self.lock.exists() or not os.path.samestat(self.lock.stat(), os.fstat(self._lock_file.fileno())):
            raise RunError(f"{self.root}: was removed or replaced while it was in use. Run the same command again")

    def lock_owner(self) -> str:
        """Return the process that holds the run folder, or that held it last."""
        return self.lock.read_text(encoding="utf-8", errors="replace") if self.lock.exists() else ""

    def in_use(self) -> bool:
        """Whether a process holds the run folder."""
        if not self.lock.exists():
            return False
        with self.lock.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return True
        return False

    def write_error(self, error: Exception) -> None:
        """Save the error that ended this attempt, for `spinlm status`. Ignore a failure to save it."""
        with contextlib.suppress(OSError, RunError):  # the caller raises `error`
            self.check_held()
            write_text(self.error_file, f"{str(error) or type(error).__name__}\n")
