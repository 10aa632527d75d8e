"""The run folder: every path in it, markers, fingerprints and the lock.

    recipe.yaml  recipe.resolved.json  provenance.json  prefix_sharing.json  error.txt  lock  .seals/
    examples/       train.jsonl  heldout.jsonl  sft.jsonl  skipped_rows.json
    base/           the model in plain format, where it came as a .gguf file
    start/          player/ (θ_0)  heldout_greedy.jsonl  heldout_sampled.jsonl  eval.json  *.done
    iteration-T/    generations/  pairs/  checkpoints/  player/ (θ_{T+1})  heldout_greedy.jsonl  heldout_sampled.jsonl
                    eval.json  *.done
    best            link to the folder that holds the best player
    train_log.jsonl   one line for each optimiser step

A file appears under its name only when it is complete. A stage ends by writing its marker, which holds digests of what
the stage wrote and of the stage it was made from: the markers of a run form a chain. A file that has changed, or a link
that no longer fits, is noticed before anything is built on it.
"""

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from spinlm.errors import RunError
from spinlm.rundir.provenance import recipe_fingerprint
from spinlm.rundir.stage_graph import START, Stage, inputs_of, parent_stage, stage_label
from spinlm.utils.atomic import STORAGE_ERRNOS, file_digest, read_json, short_digest, write_json, write_text

log = logging.getLogger("spinlm")

LOCK_RETRY_SECONDS = 1.0  # seconds in which those that only look whether a run is under way are gone
NO_SYMLINK_ERRNOS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)  # what a file system says that has no symbolic links
MTIME_GRANULARITY_NS = 1_000_000_000  # nanoseconds after which a file system gives a change another time
SEALS = ".seals"  # folder with the digests of files that are written while their stage goes on
VOLATILE_KEYS = ("seconds", "resumed", "sum")
"""What is not the same in a marker every time: how long the stage took, and so the digest of all that is in it."""


class RunDir:
    """Paths of one run, and the few operations that keep its files whole."""

    def __init__(self, root: Path):
        self.root = root
        self._digests: dict[Path, tuple[tuple[int, ...], str]] = {}  # of files, as they were when they were read
        self._began: dict[Stage, tuple[float, bool]] = {}  # when, and whether earlier work was found
        self._held: IO[str] | None = None  # the lock, while this process has it

    def iteration(self, iteration: int) -> Path:
        """Folder of an iteration; `START` is the starting player's."""
        return self.root / ("start" if iteration == START else f"iteration-{iteration}")

    def player(self, iteration: int) -> Path:
        """The player an iteration made: θ_{iteration+1}."""
        return self.iteration(iteration) / "player"

    def generations(self, iteration: int, split: str, shard: int) -> Path:
        """Responses of the opponent of an iteration to one shard of a split (train or heldout)."""
        return self.iteration(iteration) / "generations" / f"{split}-{shard:05d}.jsonl"

    def shards_on_disk(self, stage: str, iteration: int) -> list[tuple[str, int]]:
        """The shards (split and number) for which a stage, generate or score, has left its file."""
        like = (self.generations if stage == "generate" else self.pairs)(iteration, "train", 0)
        names = [path.stem.rpartition("-") for path in like.parent.glob(f"*-*{like.suffix}")]
        return [(split, int(shard)) for split, _, shard in names if shard.isdecimal()]

    def pairs(self, iteration: int, split: str, shard: int) -> Path:
        """Pairs an iteration trains on (train) or is measured on (heldout)."""
        return self.iteration(iteration) / "pairs" / f"{split}-{shard:05d}.arrow"

    def checkpoints(self, iteration: int) -> Path:
        return self.iteration(iteration) / "checkpoints"

    def heldout_greedy(self, iteration: int) -> Path:
        """Answers of an iteration's player to the held-out prompts."""
        return self.iteration(iteration) / "heldout_greedy.jsonl"

    def heldout_sampled(self, iteration: int) -> Path:
        """Responses to the held-out prompts from the distribution of an iteration's player."""
        return self.iteration(iteration) / "heldout_sampled.jsonl"

    def benchmarks(self, iteration: int) -> Path:
        """Benchmark scores of an iteration's player; beside eval.json, which its stage's marker seals."""
        return self.iteration(iteration) / "benchmarks.json"

    def eval_metrics(self, iteration: int) -> Path:
        return self.iteration(iteration) / "eval.json"

    def examples(self, split: str) -> Path:
        return self.root / "examples" / f"{split}.jsonl"

    @property
    def skipped_rows(self) -> Path:
        return self.root / "examples" / "skipped_rows.json"

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def train_log(self) -> Path:
        return self.root / "train_log.jsonl"

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.resolved.json"

    @property
    def readable_recipe(self) -> Path:
        """The same for people, who may run it again."""
        return self.root / "recipe.yaml"

    @property
    def error_file(self) -> Path:
        """What the last attempt has failed with."""
        return self.root / "error.txt"

    @property
    def provenance(self) -> Path:
        return self.root / "provenance.json"

    @property
    def best_link(self) -> Path:
        return self.root / "best"

    def best(self) -> int | None:
        """The iteration whose player is the best so far (`START` for θ_0), or None before the first evaluation."""
        judged = list(itertools.takewhile(lambda n: self.marker("promote", n).exists(), itertools.count()))
        return int(self.metadata("promote", judged[-1])["best"]) if judged else None

    @property
    def prefix_sharing(self) -> Path:
        """Which layout the model takes, and how that was found out."""
        return self.root / "prefix_sharing.json"

    def nll_curve(self, iteration: int) -> Path:
        """Held-out NLL by epoch of training; beside the checkpoints, since it must survive as they do."""
        return self.checkpoints(iteration) / "heldout_nll.json"

    def selection(self, iteration: int) -> Path:
        """How an iteration's player was judged."""
        return self.iteration(iteration) / "selection.json"

    def set_best(self, iteration: int) -> None:
        """Let `best` lead to a player's folder, for people; the markers know it, too."""
        temporary, name = self.root / ".best.tmp", self.iteration(iteration).name
        if self.best_link.is_symlink() and self.best_link.readlink() == Path(name):
            return
        if self.best_link.is_dir() and not self.best_link.is_symlink():
            log.warning("%s: a folder stands where a link to %s should be; it is left alone", self.best_link, name)
            return
        temporary.unlink(missing_ok=True)
        try:
            temporary.symlink_to(name)
        except OSError as error:
            if error.errno not in NO_SYMLINK_ERRNOS:
                raise
            log.warning("%s: this file system has no links; the best player is in %s", self.best_link, name)
            return
        temporary.replace(self.best_link)

    def marker(self, stage: str, iteration: int) -> Path:
        folder = self.root / "examples" if stage == "prepare" else self.iteration(iteration)
        return folder / f"{stage}.done"

    def done(self, stage: str, iteration: int) -> bool:
        """Whether a stage is complete.

        Raises:
            RunError: it is complete, but was made from something that has changed since.
        """
        marker = self.marker(stage, iteration)
        if not marker.exists():
            return False
        if self.metadata(stage, iteration)["made_from"] != self._parent_digest(stage, iteration):
            raise RunError(
                f"{marker}: this stage was made from another result of {stage_label(parent_stage(stage, iteration))} than the "
                f"run folder holds now. Remove {marker} and what follows it to redo the stage, or start again with "
                "--overwrite"
            )
        return True

    def begin(self, stage: str, iteration: int, unfinished: Path | None = None) -> None:
        """Start a stage, or go on with it; unfinished work that was made from something else is thrown away.

        Raises:
            RunError: a stage whose files it reads is not complete, or they have changed since.
        """
        self._check_held()
        for made in inputs_of(stage, iteration):
            self.require(*made)
        self._began[stage, iteration] = time.monotonic(), False
        if unfinished is None:
            return
        note = self.iteration(iteration) / f"{stage}.begun"
        made_from = {
            "made_from": self._parent_digest(stage, iteration),
            "recipe": recipe_fingerprint(self.recipe, iteration),
        }
        if note.exists() and made_from | read_json(note) == made_from:
            self._began[stage, iteration] = time.monotonic(), True
            return
        if unfinished.is_dir():
            log.warning("%s: was begun from something else, or by another recipe: it is made anew", unfinished)
            shutil.rmtree(unfinished)
        write_json(note, made_from)

    def remove_checkpoints(self, stage: str, iteration: int) -> None:
        """Remove what only an unfinished training needs, once it is complete."""
        if self.checkpoints(iteration).exists():
            shutil.rmtree(self.checkpoints(iteration))
        (self.iteration(iteration) / f"{stage}.begun").unlink(missing_ok=True)

    def complete(self, stage: str, iteration: int, outputs: Iterable[Path], **facts: Any) -> None:
        """Write a stage's marker, as its last act. `facts` are kept in the marker for people to read.

        So are the `seconds` since the stage began in this process. One that went on with earlier work says `resumed`:
        what that took before is not known.

        Raises:
            RunError: the stage before it is not complete, or a file is missing, or not as it was sealed.
        """
        self._check_held()
        outputs = list(outputs)
        for path in outputs:
            if not path.exists():
                raise RunError(f"{path}: is missing. Run again to make it anew")
        files = _files(outputs)
        for path in files:
            if not self.is_unchanged(path):
                raise RunError(f"{path}: has changed since it was written. Run again to make it anew")
        written = {str(path.relative_to(self.root)): self._digest(path) for path in files}
        marker = {
            "made_from": self._parent_digest(stage, iteration),
            "digest": hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest(),
            **facts,
            **self._seconds(stage, iteration),
            "outputs": written,
        }
        write_json(self.marker(stage, iteration), marker | {"sum": short_digest(marker)})

    def record_digest(self, path: Path) -> None:
        """Note what a file is known by that is written while its stage goes on."""
        self._check_held()
        write_text(self._seal(path), self._digest(path))

    def is_verified(self, path: Path) -> bool:
        """Whether a file of an unfinished stage is there, and as it was when it was sealed."""
        if not (path.exists() and self._seal(path).exists()):
            return False
        if not self._as_sealed(path):
            log.warning("%s: has changed since it was written, and is made anew", path)
            return False
        return True

    def is_unchanged(self, path: Path) -> bool:
        """Whether a file is as it was sealed, or never was."""
        return not self._seal(path).exists() or self._as_sealed(path)

    def _as_sealed(self, path: Path) -> bool:
        return self._seal(path).read_bytes() == self._digest(path).encode()

    def _seal(self, path: Path) -> Path:
        return path.parent / SEALS / f"{path.name}.sha256"

    def _seconds(self, stage: str, iteration: int) -> dict[str, Any]:
        if (stage, iteration) not in self._began:
            return {}
        began, resumed = self._began[stage, iteration]
        return {"seconds": round(time.monotonic() - began, 3)} | ({"resumed": True} if resumed else {})

    def metadata(self, stage: str, iteration: int) -> dict[str, Any]:
        """What a completed stage noted in its marker.

        Raises:
            RunError: the marker is damaged.
        """
        path = self.marker(stage, iteration)
        noted = read_json(path)
        sound = isinstance(noted, dict) and {"made_from", "digest", "outputs"} <= noted.keys()
        if sound and "sum" in noted:
            sound = noted["sum"] == short_digest({name: fact for name, fact in noted.items() if name != "sum"})
        if not sound:
            raise RunError(f"{path}: damaged (not a marker). Delete it and run again to redo the stage")
        return noted

    def reproducible_metadata(self, stage: str, iteration: int) -> dict[str, Any]:
        """`facts` without what differs when the stage is done again: its time."""
        return {name: fact for name, fact in self.metadata(stage, iteration).items() if name not in VOLATILE_KEYS}

    def require(self, stage: str, iteration: int) -> None:
        """Make sure that a stage is complete and that its files are as it wrote them.

        Raises:
            RunError: with what is missing or has changed.
        """
        if not self.done(stage, iteration):
            raise RunError(
                f"{self.root}: {stage_label((stage, iteration))} has not been completed; it comes first. "
                "`spinlm run` does all stages in order"
            )
        for name, expected in self.metadata(stage, iteration)["outputs"].items():
            path = self.root / name
            if not path.is_file() or self._digest(path) != expected:
                what = "has changed since it was written" if path.is_file() else "is missing"
                marker = self.marker(stage, iteration)
                raise RunError(f"{path}: {what}. Delete it and {marker}, then run again to make it anew")

    def _digest(self, path: Path) -> str:
        """SHA-256 of a file, which is not read again as long as nobody writes to it."""
        status = path.stat()
        version = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        known = self._digests.get(path)
        if known is None or known[0] != version:
            known = (version, file_digest(path))
            # A change right after the last one may bear the same time. And who knows what time it was, if it is later?
            if time.time_ns() - status.st_ctime_ns > MTIME_GRANULARITY_NS:
                self._digests[path] = known
        return known[1]

    def player_digest(self, iteration: int) -> str:
        """What an iteration's player and all it came from are known by.

        Raises:
            RunError: it is not there, or not as it was written.
        """
        stage = "sft" if iteration == START else "train"
        self.require(stage, iteration)
        return str(self.metadata(stage, iteration)["digest"])

    def _parent_digest(self, stage: str, iteration: int) -> str | None:
        before = parent_stage(stage, iteration)
        if before is None:
            return None
        if not self.marker(*before).exists():
            raise RunError(
                f"{self.root}: {stage_label(before)} has not been completed, and {stage_label((stage, iteration))} needs it. "
                "`spinlm run` does all stages in order"
            )
        return str(self.metadata(*before)["digest"])

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run folder for this process; the lock goes with the process, however it ends.

        Raises:
            RunError: another process holds it, or it is no folder, or a folder with something else in it.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise RunError(f"{self.root}: not a folder, and cannot be made one. Choose another --run-dir") from None
        foreign = [entry for entry in self.root.iterdir() if entry.name != "lock" and entry.suffix != ".tmp"]
        if foreign and not self.recipe.exists():
            raise RunError(f"{self.root}: holds files but no spinlm run. Choose another --run-dir")
        with (self.root / "lock").open("a+") as file:
            deadline = time.monotonic() + LOCK_RETRY_SECONDS
            while not _lock(file, self.root):
                if time.monotonic() > deadline:
                    file.seek(0)
                    holder = file.read().strip() or "unknown"
                    raise RunError(
                        f"{self.root}: in use by another process ({holder}). Wait for it to end, or choose another "
                        "--run-dir"
                    )
                time.sleep(LOCK_RETRY_SECONDS / 20)
            self._held = file
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
                self._held = None

    def _check_held(self) -> None:
        """
        Raises:
            RunError: the folder that this process holds is no longer under its name; another may be there.
        """
        if self._held is not None:
            lock = self.root / "lock"
            if not lock.exists() or not os.path.samestat(lock.stat(), os.fstat(self._held.fileno())):
                raise RunError(f"{self.root}: was removed or replaced while it was in use. Run the same command again")

    def lock_owner(self) -> str:
        """Who holds the run folder, or held it last."""
        path = self.root / "lock"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def in_use(self) -> bool:
        """Whether a process holds the run folder."""
        path = self.root / "lock"
        if not path.exists():
            return False
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return True
        return False

    def has_results(self) -> bool:
        """Whether any stage is complete."""
        return any(self.root.glob("*/*.done"))

    def write_error(self, error: Exception) -> None:
        """Keep what an attempt has ended with, for `spinlm status`, as far as that can be written."""
        with contextlib.suppress(OSError, RunError):  # what went wrong is worth more than the note of it
            self._check_held()
            write_text(self.error_file, f"{str(error) or type(error).__name__}\n")

    def clear(self) -> None:
        """Delete everything but the lock. Called with the lock held, so this is a run folder."""
        entries = [entry for entry in self.root.iterdir() if entry.name != "lock"]
        for note in self.root.glob("*/*.begun"):  # first: what a deletion that is cut short leaves is not gone on with
            note.unlink()
        # The recipe goes last: a deletion that is cut short leaves a folder that --overwrite still recognises.
        for entry in sorted(entries, key=lambda entry: entry == self.recipe):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _lock(file: IO[str], root: Path) -> bool:
    """Whether the lock could be taken.

    Raises:
        RunError: the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise RunError(f"{root}: cannot be locked ({error.strerror}). Choose another --run-dir") from error
    return True


def _files(paths: Iterable[Path]) -> list[Path]:
    """The files among these paths, and those in the folders among them."""
    return [
        file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*"))) if file.is_file()
    ]
