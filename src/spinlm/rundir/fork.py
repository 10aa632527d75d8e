"""Branch: begin a run with the start of another one, so that both are compared from the same player."""

import contextlib
import logging
import os
import shutil
from pathlib import Path

from spinlm.errors import RunError
from spinlm.recipe.schema import MUTABLE_FIELDS, Recipe
from spinlm.rundir.layout import RunDir
from spinlm.rundir.provenance import differences, with_defaults
from spinlm.rundir.stage_graph import START, START_STAGES
from spinlm.stages.prepare import provenance
from spinlm.utils.atomic import atomic_path, read_json, write_json

log = logging.getLogger("spinlm")

AFTER_THE_START = (
    "selfplay",
    "objective",
    "train.epochs",
    "train.batch_size",
    "train.learning_rate",
    "train.optimizer",
    "opponent.temperature",
    "opponent.top_p",
    "opponent.samples_per_prompt",
    "opponent.shard_size",
    *MUTABLE_FIELDS,
)
"""Sections and fields that nothing before iteration 0 reads: in these a branch may differ from the run it leaves."""


def fork_from(recipe: Recipe, folder: RunDir, source: RunDir) -> None:
    """Take examples, starting player and its evaluation from another run. A folder that has them is left as it is.

    Raises:
        RunError: as `check_source`; or the folder has begun with another start.
    """
    check_source(recipe, folder, source)
    if folder.has_results():
        _check_came_from(folder, source)
        if folder.done("evaluate", START):
            return
    markers = {source.marker(stage, START) for stage in START_STAGES}
    for part in (source.base, source.prefix_sharing, source.examples("train").parent, source.iteration(START)):
        for path in (path for path in [part, *part.rglob("*")] if path.is_file()):
            if path not in markers and source.checkpoints(START) not in path.parents:
                _copy_or_link(path, folder.root / path.relative_to(source.root), link=part == source.base)
    inputs = read_json(source.provenance)["inputs"]
    write_json(folder.provenance, {"inputs": inputs, **provenance(), "start_from": str(source.root.absolute())})
    for stage in START_STAGES:  # last, and in order: what a marker stands for is there
        _copy_or_link(source.marker(stage, START), folder.marker(stage, START))
    log.info("the start is that of %s", source.root)


def check_source(recipe: Recipe, folder: RunDir, source: RunDir) -> None:
    """Make sure that a run's start can be taken.

    Raises:
        RunError: the run is the folder itself, has no complete start, or one that this recipe would not give.
    """
    if source.root.resolve() == folder.root.resolve():
        raise RunError(f"--start-from {source.root}: is the run folder itself. Choose another --run-dir")
    for stage in START_STAGES:
        if not source.marker(stage, START).exists():
            raise RunError(
                f"--start-from {source.root}: no starting player that has been measured is there yet. Play that run "
                f"first: `spinlm run RECIPE --run-dir {source.root}`"
            )
        source.require(stage, START)
    theirs = with_defaults(read_json(source.recipe))
    changes = [
        line
        for line in differences(theirs, recipe.model_dump(mode="json"))
        if not line.startswith(tuple(f"{name}{end}" for name in AFTER_THE_START for end in (":", ".")))
    ]
    if changes:
        raise RunError(
            f"--start-from {source.root}: its start was made with other settings:\n"
            + "\n".join(f"  {line}" for line in changes)
            + "\nMake these equal, or leave --start-from out"
        )


def _check_came_from(folder: RunDir, source: RunDir) -> None:
    for stage in START_STAGES:
        if folder.marker(stage, START).exists() and folder.reproducible_metadata(
            stage, START
        ) != source.reproducible_metadata(stage, START):
            raise RunError(
                f"{folder.root}: has begun with another start than that of {source.root}. Choose another --run-dir, "
                "or start again with --overwrite (this deletes what is there)"
            )


def _copy_or_link(path: Path, to: Path, *, link: bool = False) -> None:
    """A copy of a file; or where that is possible the same file under another name, for one that nobody will change."""
    to.parent.mkdir(parents=True, exist_ok=True)
    to.unlink(missing_ok=True)
    if link:
        with contextlib.suppress(OSError):
            os.link(path, to)
            return
    with atomic_path(to) as temporary:
        shutil.copyfile(path, temporary)
