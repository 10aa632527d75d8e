"""The run folder: every path in it, atomic writes, markers, fingerprints and the lock.

    recipe.yaml  recipe.resolved.json  provenance.json  lock
    examples/       train.jsonl  heldout.jsonl  warmup.jsonl  dropped.json
    base/           the model in plain format, where it came as a .gguf file
    start/          player/ (θ_0)  answers.jsonl  metrics.json  *.done
    iteration-T/    generations/  pairs/  checkpoints/  player/ (θ_{T+1})  answers.jsonl  metrics.json  *.done
    best            link to the folder that holds the best player
    metrics.jsonl   one line for each optimiser step

A file appears under its name only when it is complete. A stage ends by writing its marker, which holds a digest of
what the stage wrote and the digest of the stage it was made from: the markers of a run form a chain, and a link that
no longer fits is noticed before anything is built on it.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from spinlm.errors import RunError

START = -1
"""The iteration number of the starting player θ_0."""

Stage = tuple[str, int]  # name and iteration


class RunDir:
    """Paths of one run, and the few operations that keep its files whole."""

    def __init__(self, root: Path):
        self.root = root

    def iteration(self, iteration: int) -> Path:
        """Folder of an iteration; `START` is the starting player's."""
        return self.root / ("start" if iteration == START else f"iteration-{iteration}")

    def player(self, iteration: int) -> Path:
        """The player an iteration made: θ_{iteration+1}."""
        return self.iteration(iteration) / "player"

    def generations(self, iteration: int, split: str, shard: int) -> Path:
        """Responses of the opponent of an iteration to one shard of a split (train or heldout)."""
        return self.iteration(iteration) / "generations" / f"{split}-{shard:05d}.jsonl"

    def pairs(self, iteration: int, split: str, shard: int) -> Path:
        """Pairs an iteration trains on (train) or is measured on (heldout)."""
        return self.iteration(iteration) / "pairs" / f"{split}-{shard:05d}.arrow"

    def checkpoints(self, iteration: int) -> Path:
        return self.iteration(iteration) / "checkpoints"

    def answers(self, iteration: int) -> Path:
        """Answers of an iteration's player to the held-out prompts."""
        return self.iteration(iteration) / "answers.jsonl"

    def iteration_metrics(self, iteration: int) -> Path:
        return self.iteration(iteration) / "metrics.json"

    def examples(self, split: str) -> Path:
        return self.root / "examples" / f"{split}.jsonl"

    @property
    def dropped(self) -> Path:
        return self.root / "examples" / "dropped.json"

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def step_metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.resolved.json"

    @property
    def provenance(self) -> Path:
        return self.root / "provenance.json"

    @property
    def best_link(self) -> Path:
        return self.root / "best"

    def best(self) -> int | None:
        """The iteration whose player is the best so far (`START` for θ_0), or None before the first evaluation."""
        if not self.best_link.is_symlink():
            return None
        name = self.best_link.readlink().name
        return START if name == "start" else int(name.removeprefix("iteration-"))

    def set_best(self, iteration: int) -> None:
        temporary = self.root / ".best.tmp"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(self.iteration(iteration).name)
        temporary.replace(self.best_link)

    # Markers

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
        made_from = read_json(marker)["made_from"]
        now = self._upstream_digest(stage, iteration)
        if made_from != now:
            before = _upstream(stage, iteration)
            raise RunError(
                f"{marker}: this stage was made from another result of {_say(before)} than the run folder holds now. "
                f"Remove {marker} and what follows it to redo the stage, or start again with --fresh"
            )
        return True

    def begin(self, stage: str, iteration: int, unfinished: Path) -> None:
        """Start a stage, or go on with it; unfinished work that was made from something else is thrown away.

        Raises:
            RunError: the stage before it is not complete.
        """
        note = self.iteration(iteration) / f"{stage}.begun"
        made_from = {"made_from": self._upstream_digest(stage, iteration)}
        if note.exists() and read_json(note) == made_from:
            return
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        write_json(note, made_from)

    def complete(self, stage: str, iteration: int, outputs: Iterable[Path], **facts: Any) -> None:
        """Write a stage's marker, as its last act. `facts` are kept in the marker for people to read.

        Raises:
            RunError: the stage before it is not complete.
        """
        upstream = self._upstream_digest(stage, iteration)
        marker = {"digest": digest(outputs), "made_from": upstream, **facts}
        write_json(self.marker(stage, iteration), marker)

    def facts(self, stage: str, iteration: int) -> dict[str, Any]:
        """What a completed stage noted in its marker."""
        return read_json(self.marker(stage, iteration))

    def require(self, stage: str, iteration: int) -> None:
        """Raise RunError unless a stage is complete."""
        if not self.done(stage, iteration):
            raise RunError(
                f"{self.root}: {_say((stage, iteration))} has not been completed; it comes first. "
                "`spinlm run` does all stages in order"
            )

    def _upstream_digest(self, stage: str, iteration: int) -> str | None:
        before = _upstream(stage, iteration)
        if before is None:
            return None
        marker = self.marker(*before)
        if not marker.exists():
            raise RunError(
                f"{self.root}: {_say(before)} has not been completed, and {_say((stage, iteration))} needs it. "
                "`spinlm run` does all stages in order"
            )
        return read_json(marker)["digest"]

    # Opening

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run folder for this process; the lock goes with the process, however it ends.

        Raises:
            RunError: another process holds it.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / "lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise RunError(
                    f"{self.root}: in use by another process ({holder}). Wait for it to end, or choose another "
                    "--run-dir"
                ) from None
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {os.uname().nodename}")
            file.flush()
            yield

    def bind(self, recipe: dict[str, Any], source: str) -> None:
        """Tie the folder to a recipe, or check that it is still the same one.

        Raises:
            RunError: the folder belongs to a different recipe; the message lists what changed.
        """
        if not self.recipe.exists():
            write_json(self.recipe, recipe)
            write_text(self.root / "recipe.yaml", source)
            return
        changes = differences(read_json(self.recipe), recipe)
        if changes:
            raise RunError(
                f"{self.root}: was made with a different recipe:\n"
                + "\n".join(f"  {line}" for line in changes)
                + "\nChoose another --run-dir, or start again with --fresh (this deletes what is there)"
            )

    def bind_inputs(self, inputs: dict[str, Any]) -> None:
        """Tie the folder to fingerprints of the model and data, or check that they have not changed.

        Raises:
            RunError: with what changed.
        """
        if self.provenance.exists():
            changes = differences(read_json(self.provenance)["inputs"], inputs)
            if changes:
                raise RunError(
                    f"{self.root}: the model or data has changed since this run began:\n"
                    + "\n".join(f"  {line}" for line in changes)
                    + "\nPut the old one back, choose another --run-dir, or start again with --fresh"
                )

    def clear(self) -> None:
        """Delete everything but the lock, if this is a run folder.

        Raises:
            RunError: the folder holds something, but no run.
        """
        entries = [entry for entry in self.root.iterdir() if entry.name != "lock"]
        if entries and not self.recipe.exists():
            raise RunError(f"{self.root}: holds files but no spinlm run, so --fresh will not delete it")
        # The recipe goes last: a deletion that is cut short leaves a folder that --fresh still recognises.
        for entry in sorted(entries, key=lambda entry: entry == self.recipe):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _upstream(stage: str, iteration: int) -> Stage | None:
    """The stage whose result a stage is made from."""
    match stage:
        case "prepare":
            return None
        case "warmup":
            return ("prepare", START)
        case "generate":
            return ("warmup", START) if iteration == 0 else ("train", iteration - 1)
        case "score":
            return ("generate", iteration)
        case "train":
            return ("score", iteration)
        case "evaluate":
            return ("warmup", START) if iteration == START else ("train", iteration)
        case "promote":
            return ("evaluate", iteration)
    raise AssertionError(f"unknown stage {stage}")


def _say(stage: Stage | None) -> str:
    if stage is None:
        return "nothing"
    name, iteration = stage
    return name if iteration == START else f"{name} of iteration {iteration}"


@contextlib.contextmanager
def atomic_file(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file that takes `path`'s name, complete and on disk, when the block ends without an error."""
    with atomic_path(path) as temporary:
        with temporary.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path for a file or a folder that takes the name `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.tmp"
    if temporary.is_dir():
        shutil.rmtree(temporary)
    yield temporary
    _sync(temporary)
    if path.is_dir():
        shutil.rmtree(path)
    temporary.replace(path)
    _sync_one(path.parent)


def _sync(path: Path) -> None:
    if path.is_dir():
        for child in path.rglob("*"):
            _sync_one(child)
    _sync_one(path)


def _sync_one(path: Path) -> None:
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
    """Read JSON this program wrote.

    Raises:
        RunError: the file is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path}: damaged ({error}). Delete it and run again to make it anew") from error


def digest(paths: Iterable[Path]) -> str:
    """SHA-256 over the names and contents of files, and of all files in folders."""
    total = hashlib.sha256()
    for path in sorted(paths):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                total.update(file.relative_to(path.parent).as_posix().encode())
                with file.open("rb") as stream:
                    total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """What changed between two JSON values, a line for each leaf."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted(old.keys() | new.keys()):
            lines += differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
        return lines
    return [] if old == new else [f"{where}: was {json.dumps(old)}, is {json.dumps(new)}"]
