"""Stage markers: which stages are complete, and SHA-256 digests of what they wrote.

A stage ends by writing its marker, which holds digests of the stage's files and the digest of its parent stage. The
markers of a run form a chain: a changed file or a replaced stage is noticed before anything is built on it.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spinlm.errors import RunError
from spinlm.rundir.lock import LockedFolder
from spinlm.rundir.stage_graph import StageKey, inputs_of, parent_stage, player_folder, player_stage, stage_label
from spinlm.utils.atomic import file_digest, read_json, short_digest, write_json, write_text

log = logging.getLogger("spinlm")

MTIME_GRANULARITY_NS = 1_000_000_000  # two changes within this time can have the same time stamp
VOLATILE_KEYS = ("seconds", "resumed", "sum")
"""Keys of a marker that differ when a stage is repeated. `sum` is the digest of all other keys."""

PARTIAL_OUTPUTS = {
    "sft": "checkpoints",
    "train": "checkpoints",
    "generate": "generations",
    "reference_logprobs": "pairs",
}
"""Folder that holds the unfinished work of a stage. A resumed stage continues from it."""


class MarkedFolder(LockedFolder):
    """A run folder whose stages leave markers."""

    def __init__(self, root: Path):
        super().__init__(root)
        self._digests: dict[Path, tuple[tuple[int, ...], str]] = {}  # path → version of the file, its SHA-256
        self._started: dict[StageKey, tuple[float, bool]] = {}  # stage → monotonic time, whether it was resumed

    def iteration(self, t: int) -> Path:
        """Folder of an iteration; `START` is the starting player's."""
        return self.root / player_folder(t)

    def marker(self, stage: str, t: int) -> Path:
        """File that exists when the stage is complete."""
        return self.state_folder / player_folder(t) / f"{stage}.done"

    def begun_file(self, stage: str, t: int) -> Path:
        """File that records the inputs and the recipe of a stage's unfinished work."""
        return self.state_folder / player_folder(t) / f"{stage}.begun"

    def done(self, stage: str, t: int) -> bool:
        """Whether a stage is complete.

        Raises:
            RunError: the stage is complete, but the result of its parent stage has changed since.
        """
        marker = self.marker(stage, t)
        if not marker.exists():
            return False
        if self.metadata(stage, t)["made_from"] != self._parent_digest(stage, t):
            raise RunError(
                f"{marker}: {stage_label((stage, t))} was made from another result of "
                f"{stage_label(parent_stage(stage, t))} than the run folder holds now. Remove {marker} and the markers "
                "of later stages to redo them, or start again with --overwrite"
            )
        return True

    def has_results(self) -> bool:
        """Whether any stage is complete."""
        return any(self.state_folder.glob("*/*.done"))

    def begin(self, stage: str, t: int, fingerprint: str) -> None:
        """Start or resume a stage. Unfinished work from other inputs or from another recipe is deleted.

        `fingerprint` is that of the recipe in this iteration (`recipe_fingerprint`).

        Raises:
            RunError: a stage that this one reads is not complete, or its files have changed.
        """
        self.check_held()
        for stage_input in inputs_of(stage, t):
            self.require(*stage_input)
        self._started[stage, t] = time.monotonic(), False
        if stage not in PARTIAL_OUTPUTS:
            return
        begun_file, partial = self.begun_file(stage, t), self.iteration(t) / PARTIAL_OUTPUTS[stage]
        made_from = {"made_from": self._parent_digest(stage, t), "recipe": fingerprint}
        if begun_file.exists() and read_json(begun_file) == made_from:
            self._started[stage, t] = time.monotonic(), True
            return
        if partial.is_dir():
            log.warning("%s: deleted: this unfinished work has other inputs or another recipe", partial)
            shutil.rmtree(partial)
        write_json(begun_file, made_from)

    def complete(self, stage: str, t: int, outputs: Sequence[Path], **metadata: Any) -> None:
        """Write a stage's marker. This is the last thing a stage does.

        The marker also holds the `seconds` since the stage began in this process, and `resumed: true` if an earlier
        process did a part of the work.

        `outputs` are the files and folders that the stage wrote; `metadata` are JSON values to keep in the marker.

        Raises:
            RunError: the parent stage is not complete, or an output is missing or differs from its recorded digest.
        """
        self.check_held()
        for path in outputs:
            if not path.exists():
                raise RunError(f"{path}: is missing. Run the same command again to make the file")
        files = _files(outputs)
        for path in files:
            if not self.is_unchanged(path):
                raise RunError(f"{path}: has changed since it was written. Run the same command again to replace it")
        digests = {str(path.relative_to(self.root)): self._digest(path) for path in files}
        elapsed: dict[str, Any] = {}
        if (stage, t) in self._started:
            started, resumed = self._started[stage, t]
            elapsed = {"seconds": round(time.monotonic() - started, 3)} | ({"resumed": True} if resumed else {})
        marker = {
            "made_from": self._parent_digest(stage, t),
            "digest": hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest(),
            **metadata,
            **elapsed,
            "outputs": digests,
        }
        write_json(self.marker(stage, t), marker | {"sum": short_digest(marker)})

    def metadata(self, stage: str, t: int) -> dict[str, Any]:
        """Read the marker of a complete stage.

        Raises:
            RunError: the marker is missing or damaged.
        """
        path = self.marker(stage, t)
        marker = read_json(path)
        content = {key: value for key, value in marker.items() if key != "sum"} if isinstance(marker, dict) else {}
        if not content or marker.get("sum") != short_digest(content):
            raise RunError(f"{path}: damaged (not a marker). Delete it and run again to redo the stage")
        return marker

    def reproducible_metadata(self, stage: str, t: int) -> dict[str, Any]:
        """Read the marker without the keys that differ when the stage is repeated."""
        return {key: value for key, value in self.metadata(stage, t).items() if key not in VOLATILE_KEYS}

    def require(self, stage: str, t: int) -> None:
        """Make sure that a stage is complete and that its files have not changed.

        Raises:
            RunError: the stage is not complete, or a file is missing or has changed.
        """
        if not self.done(stage, t):
            raise RunError(
                f"{self.root}: {stage_label((stage, t))} has not been completed; it comes first. "
                "`spinlm run` does all stages in order"
            )
        self.check_outputs(stage, t)

    def check_outputs(self, stage: str, t: int, *paths: Path) -> None:
        """Make sure that files of a complete stage have not changed: these paths, or all files if none is given.

        Raises:
            RunError: a file is missing or has changed.
        """
        outputs = {self.root / name: digest for name, digest in self.metadata(stage, t)["outputs"].items()}
        for path in paths or outputs:
            if not path.is_file() or self._digest(path) != outputs.get(path, self._digest(path)):
                problem = "has changed since it was written" if path.is_file() else "is missing"
                raise RunError(
                    f"{path}: {problem}. Delete this file and {self.marker(stage, t)}, then run again to redo the stage"
                )

    def player_digest(self, t: int) -> str:
        """Return the digest of an iteration's player.

        Raises:
            RunError: the player is missing or has changed.
        """
        stage = player_stage(t)
        self.require(*stage)
        return str(self.metadata(*stage)["digest"])

    def _parent_digest(self, stage: str, t: int) -> str | None:
        parent = parent_stage(stage, t)
        if parent is None:
            return None
        if not self.marker(*parent).exists():
            raise RunError(
                f"{self.root}: {stage_label(parent)} has not been completed, and {stage_label((stage, t))} needs it. "
                "`spinlm run` does all stages in order"
            )
        return str(self.metadata(*parent)["digest"])

    def record_digest(self, path: Path) -> None:
        """Record the SHA-256 of a complete file whose stage is still in progress."""
        self.check_held()
        write_text(self.digest_file(path), self._digest(path))

    def is_verified(self, path: Path) -> bool:
        """Whether a file exists and matches its recorded digest. Logs a warning if the file has changed."""
        if not (path.exists() and self.digest_file(path).exists()):
            return False
        if not self.is_unchanged(path):
            log.warning("%s: has changed since it was written, and is written again", path)
            return False
        return True

    def is_unchanged(self, path: Path) -> bool:
        """Whether a file matches its recorded digest; true if no digest was recorded."""
        record = self.digest_file(path)
        return not record.exists() or record.read_bytes() == self._digest(path).encode()

    def _digest(self, path: Path) -> str:
        """Return the SHA-256 of a file. Read the file again only if its size, times or inode have changed."""
        status = path.stat()
        version = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        cached = self._digests.get(path)
        if cached is None or cached[0] != version:
            cached = (version, file_digest(path))
            # A file with a time stamp of this second, or of the future, may change again and keep its time stamp.
            if time.time_ns() - status.st_ctime_ns > MTIME_GRANULARITY_NS:
                self._digests[path] = cached
        return cached[1]


def _files(paths: Sequence[Path]) -> list[Path]:
    """Return these files, and the files in these folders."""
    return [
        file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*"))) if file.is_file()
    ]
