"""One run: its recipe, its folder and its players."""

import contextlib
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spinlm.distributed.processes import all_gather, is_main_process, on_rank_zero, process_group, world_size
from spinlm.errors import PeerError, RecipeError, RunError, SpinError, StoppedError
from spinlm.recipe.adapter import with_adapter
from spinlm.recipe.fingerprint import differences, recipe_fingerprint
from spinlm.recipe.schema import Recipe
from spinlm.rundir.fork import check_source, fork_from
from spinlm.rundir.layout import RunDir
from spinlm.rundir.records import Example, RecordFile
from spinlm.rundir.resume import claim_recipe
from spinlm.rundir.stage_graph import START
from spinlm.utils.signals import graceful_shutdown

if TYPE_CHECKING:
    from spinlm.model.players import Players

FS_SYNC_TIMEOUT = 10.0  # seconds until a file that one machine writes must be visible on the others


@dataclass
class Stage:
    """A stage in progress. The stage function sets the outputs and the metadata."""

    done: bool  # whether the run folder already holds the complete result
    outputs: list[Path] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)  # JSON values to keep in the marker


class Run:
    """A recipe, the folder that holds its results, and the players. Every stage takes a `Run`.

    Use as a context manager: leaving the block frees the model and closes the trackers.
    """

    def __init__(self, recipe: Recipe, folder: RunDir):
        self.recipe = recipe
        self.folder = folder
        self.accelerator: Any = None  # the `Accelerator` with the trackers of `report_to`, once they are in use

    @cached_property
    def players(self) -> "Players":
        """The players. The model is loaded when it is first used."""
        from spinlm.model.players import Players  # imports torch

        return Players(self.recipe, self.folder)

    @contextlib.contextmanager
    def stage(self, name: str, t: int = START) -> Iterator[Stage]:
        """Begin a stage of iteration `t`, and mark it complete when the block ends without an error.

        The block returns at once if `stage.done`. All processes enter and leave the block together.

        Raises:
            RunError: the stage or a stage that it reads was made from files that have changed.
        """
        stage = Stage(done=on_rank_zero(self.folder.done, name, t))
        if not stage.done:
            on_rank_zero(self.folder.begin, name, t, recipe_fingerprint(self.recipe, t))
        yield stage
        if not stage.done:
            on_rank_zero(self.folder.complete, name, t, stage.outputs, **stage.metadata)
        if name in ("sft", "train"):
            on_rank_zero(self.folder.remove_checkpoints, name, t)

    def train_pairs(self, t: int) -> list[Path]:
        """Return the files with the training pairs of iteration `t`, in the order of the examples."""
        examples = RecordFile(self.folder.examples("train"), Example)
        shards = range(examples.num_shards(self.recipe.opponent.shard_size))
        return [self.folder.pairs(t, "train", shard) for shard in shards]

    def close(self) -> None:
        """Free the model and close the trackers. The run can be used again: the model is then loaded again."""
        if self.accelerator is not None:
            for tracker in self.accelerator.trackers:  # Accelerator.end_training would end the process group, too
                tracker.finish()
            self.accelerator = None
        if "players" in vars(self):
            self.players.unload()
            del self.players

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@contextlib.contextmanager
def open_run(
    recipe: Recipe, folder: RunDir, *, overwrite: bool = False, start_from: RunDir | None = None
) -> Iterator[Run]:
    """Join the other processes, lock the run folder, write the recipe into it, and yield the run.

    Args:
        recipe: the recipe to play.
        folder: the run folder; it is created if it does not exist.
        overwrite: delete the results of an earlier run in the folder.
        start_from: another run; its start is copied, and with equal settings its first responses.

    Raises:
        SpinError: what went wrong, where, and what to do. The error is also written to error.txt.
    """
    with graceful_shutdown(), process_group(), contextlib.ExitStack() as stack:
        _check_same_recipe(recipe)
        recipe = on_rank_zero(with_adapter, recipe, download=True)
        if start_from is not None:
            on_rank_zero(check_source, recipe, folder, start_from)  # before anything is deleted
        on_rank_zero(stack.enter_context, folder.locked())
        on_rank_zero(_claim, recipe, folder, start_from, overwrite)
        _check_shared_filesystem(folder)
        on_rank_zero(folder.error_file.unlink, missing_ok=True)
        run = stack.enter_context(Run(recipe, folder))
        try:
            yield run
        except Exception as error:  # written to error.txt, then raised again
            # With several processes, an error that is not a SpinError may be a consequence of a failure in another one.
            is_cause = isinstance(error, SpinError) or world_size() == 1
            if is_main_process() and is_cause and not isinstance(error, StoppedError | PeerError):
                folder.write_error(error)
            raise


def _claim(recipe: Recipe, folder: RunDir, start_from: RunDir | None, overwrite: bool) -> None:
    if overwrite:
        folder.clear()
    claim_recipe(folder, recipe)
    if start_from is not None:
        fork_from(recipe, folder, start_from)


def _check_same_recipe(recipe: Recipe) -> None:
    """Make sure that all processes have the same recipe.

    Raises:
        RecipeError: the recipe of a process differs from that of process 0.
    """
    (host, expected), *others = all_gather((socket.gethostname(), recipe.model_dump(mode="json")))
    for rank, (other_host, values) in enumerate(others, start=1):
        if changed := differences(expected, values):
            raise RecipeError(
                f"process {rank} on {other_host} has another recipe than process 0 on {host}:\n  "
                + "\n  ".join(changed)
                + "\nStart all processes with the same command"
            )


def _check_shared_filesystem(folder: RunDir) -> None:
    """Make sure that all processes see the run folder of process 0. On a network file system this can take seconds.

    Raises:
        RunError: a process does not see the folder.
    """
    expected = on_rank_zero(folder.lock_owner)
    deadline = time.monotonic() + FS_SYNC_TIMEOUT
    while (seen := folder.lock_owner()) != expected and time.monotonic() < deadline:
        time.sleep(0.5)
    for rank, (host, is_visible) in enumerate(all_gather((socket.gethostname(), seen == expected))):
        if not is_visible:
            raise RunError(
                f"{folder.root.absolute()}: process {rank} on {host} does not see the folder that process 0 writes to. "
                "All machines must share the file system of the run folder: choose another --run-dir"
            )
