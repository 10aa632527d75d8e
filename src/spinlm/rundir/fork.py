"""Fork: copy the starting player of another run, so that both runs can be compared."""

import contextlib
import logging
import os
import shutil
from pathlib import Path

from spinlm.errors import RunError
from spinlm.recipe.fingerprint import differences, with_defaults
from spinlm.recipe.schema import MUTABLE_FIELDS, Recipe
from spinlm.rundir.layout import RunDir
from spinlm.rundir.provenance import current_provenance, read_recipe
from spinlm.rundir.stage_graph import START, START_STAGES
from spinlm.utils.atomic import atomic_path, read_json, write_json

log = logging.getLogger("spinlm")

FIELDS_AFTER_START = (
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
"""Sections and fields of the recipe that the stages of the start do not read. A fork may change them."""


def fork_from(recipe: Recipe, folder: RunDir, source: RunDir) -> None:
    """Copy the examples, the starting player and its evaluation from another run, if the folder does not have them.

    Raises:
        RunError: `check_source` fails, or the folder has another start.
    """
    check_source(recipe, folder, source)
    if folder.has_results():
        _check_same_start(folder, source)
        if folder.done("evaluate", START):
            return
    for part in (source.base, source.prefix_sharing, source.examples("train").parent, source.iteration(START)):
        for path in (path for path in [part, *part.rglob("*")] if path.is_file()):
            if source.checkpoints(START) not in path.parents:
                _copy_or_link(path, folder.root / path.relative_to(source.root), link=part == source.base)
    inputs = read_json(source.provenance)["inputs"]
    write_json(folder.provenance, {"inputs": inputs, **current_provenance(), "start_from": str(source.root.absolute())})
    for stage in START_STAGES:  # last, because a marker says that the files of its stage are complete
        _copy_or_link(source.marker(stage, START), folder.marker(stage, START))
    log.info("copied the start from %s", source.root)


def check_source(recipe: Recipe, folder: RunDir, source: RunDir) -> None:
    """Make sure that the start of another run can be copied.

    Raises:
        RunError: the other run is the folder itself, its start is not complete, or it was made with other settings.
    """
    if source.root.resolve() == folder.root.resolve():
        raise RunError(f"--start-from {source.root}: is the run folder itself. Choose another --run-dir")
    for stage in START_STAGES:
        if not source.marker(stage, START).exists():
            raise RunError(
                f"--start-from {source.root}: has no evaluated starting player yet. Run it first: "
                f"`spinlm run RECIPE --run-dir {source.root}`"
            )
        source.require(stage, START)
    changes = [
        line
        for line in differences(with_defaults(read_recipe(source)), recipe.model_dump(mode="json"))
        if not line.startswith(tuple(f"{name}{end}" for name in FIELDS_AFTER_START for end in (":", ".")))
    ]
    if changes:
        raise RunError(
            f"--start-from {source.root}: its start was made with other settings:\n"
            + "\n".join(f"  {line}" for line in changes)
            + "\nMake these equal, or leave --start-from out"
        )


def _check_same_start(folder: RunDir, source: RunDir) -> None:
    for stage in (stage for stage in START_STAGES if folder.marker(stage, START).exists()):
        if folder.reproducible_metadata(stage, START) != source.reproducible_metadata(stage, START):
            raise RunError(
                f"{folder.root}: has another start than {source.root}. Choose another --run-dir, or start again with "
                "--overwrite (this deletes what is there)"
            )


def _copy_or_link(path: Path, to: Path, *, link: bool = False) -> None:
    """Copy a file. With `link`, make a hard link if the file system allows it."""
    to.parent.mkdir(parents=True, exist_ok=True)
    to.unlink(missing_ok=True)
    if link:
        with contextlib.suppress(OSError):
            os.link(path, to)
            return
    with atomic_path(to) as temporary:
        shutil.copyfile(path, temporary)
