"""Fork: copy the starting player of another run, and the responses to it, so that both runs can be compared."""

import contextlib
import itertools
import logging
import os
import shutil
from pathlib import Path

from spinlm.errors import RunError
from spinlm.recipe.fingerprint import differences, recipe_fingerprint, with_defaults
from spinlm.recipe.schema import MUTABLE_FIELDS, Recipe
from spinlm.rundir.layout import RunDir
from spinlm.rundir.provenance import current_provenance, read_recipe
from spinlm.rundir.records import response_splits
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
    "opponent.exclude_correct",
    *MUTABLE_FIELDS,
)
"""Sections and fields of the recipe that the stages of the start do not read. A fork may change them."""

FIELDS_AFTER_GENERATE = (*MUTABLE_FIELDS, "opponent.exclude_correct")
"""Fields of `opponent` that the stage `generate` does not read, or that leave its responses the same."""


def fork_from(recipe: Recipe, folder: RunDir, source: RunDir) -> None:
    """Copy what the folder does not have and the recipe has in common with another run.

    This is the start (examples, starting player and its evaluation) and, if both recipes ask for the same ones, the
    responses of iteration 0.

    Raises:
        RunError: `check_source` fails, the folder has another start, or responses of the other run have changed.
    """
    check_source(recipe, folder, source)
    if folder.has_results():
        _check_same_start(folder, source)
    if not folder.done("evaluate", START):
        _copy_start(folder, source)
    if not folder.done("generate", 0):
        _copy_responses(recipe, folder, source)


def _copy_start(folder: RunDir, source: RunDir) -> None:
    for part in (source.base, source.prefix_sharing, source.examples("train").parent, source.iteration(START)):
        for path in (path for path in [part, *part.rglob("*")] if path.is_file()):
            if source.checkpoints(START) not in path.parents:
                _copy_or_link(path, folder.root / path.relative_to(source.root), link=part == source.base)
    inputs = read_json(source.provenance)["inputs"]
    write_json(folder.provenance, {"inputs": inputs, **current_provenance(), "start_from": str(source.root.absolute())})
    for stage in START_STAGES:  # last, because a marker says that the files of its stage are complete
        _copy_or_link(source.marker(stage, START), folder.marker(stage, START))
    log.info("copied the start from %s", source.root)


def _copy_responses(recipe: Recipe, folder: RunDir, source: RunDir) -> None:
    """Copy the responses of iteration 0 that the other run has and this one needs; `generate` writes the others."""
    if not source.done("generate", 0):
        return
    settings = (with_defaults(read_recipe(source))["opponent"], recipe.opponent.model_dump(mode="json"))
    changes = _other_than(FIELDS_AFTER_GENERATE, differences(*settings, "opponent"))
    if changes:
        log.info("not copied: the responses of %s, which has other settings: %s", source.root, "; ".join(changes))
        return
    source.check_outputs("generate", 0)
    folder.begin("generate", 0, recipe_fingerprint(recipe, 0))  # so that the stage keeps what it finds
    outputs = [source.root / name for name in source.metadata("generate", 0)["outputs"]]
    copied = 0
    for path in (path for path in outputs if path.name.startswith(response_splits(is_control=recipe.is_control))):
        target = folder.root / path.relative_to(source.root)
        if not folder.is_verified(target):
            _copy_or_link(path, target)
            folder.record_digest(target)
            copied += 1
    if copied:
        write_json(folder.provenance, read_json(folder.provenance) | {"responses_from": str(source.root.absolute())})
        log.info("copied the responses of iteration 0 from %s (%d files)", source.root, copied)


def borrow_start(folder: RunDir, source: RunDir, examples: dict[str, int]) -> None:
    """Give a temporary folder the start of another run, with its first examples only. The weights are linked.

    Args:
        folder: the folder, which is empty.
        source: the other run.
        examples: number of examples to take of each split.
    """
    for split, number in examples.items():
        folder.examples(split).parent.mkdir(parents=True, exist_ok=True)
        with source.examples(split).open("rb") as lines:
            folder.examples(split).write_bytes(b"".join(itertools.islice(lines, number)))
    for path in (source.prefix_sharing, source.skipped_rows):
        _copy_or_link(path, folder.root / path.relative_to(source.root))
    folder.iteration(START).mkdir()
    for path in (source.base, source.player(START)):
        if path.exists():
            (folder.root / path.relative_to(source.root)).symlink_to(path.resolve())
    write_json(folder.provenance, {"inputs": read_json(source.provenance)["inputs"], **current_provenance()})
    folder.complete("prepare", START, [folder.examples(split) for split in examples], counts=examples)
    folder.complete("sft", START, [], prefix_sharing=source.metadata("sft", START)["prefix_sharing"])


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
    changes = _other_than(
        FIELDS_AFTER_START, differences(with_defaults(read_recipe(source)), recipe.model_dump(mode="json"))
    )
    if changes:
        raise RunError(
            f"--start-from {source.root}: its start was made with other settings:\n"
            + "\n".join(f"  {line}" for line in changes)
            + "\nMake these equal, or leave --start-from out"
        )


def _other_than(fields: tuple[str, ...], changes: list[str]) -> list[str]:
    """Return the changes that are not changes of these fields or sections."""
    return [line for line in changes if not line.startswith(tuple(f"{name}{end}" for name in fields for end in ":."))]


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
