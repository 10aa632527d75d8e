"""Prepare: draw the examples, and write down what the run is made of."""

import contextlib
import logging
import os
from typing import Any

from spinlm.data.columns import check_layout
from spinlm.data.examples import select_examples
from spinlm.data.sources import names_a_file
from spinlm.errors import DataError, RecipeError
from spinlm.evals.scorers import get_scorer
from spinlm.generation.vllm import check_vllm
from spinlm.model.loading import hub_commit, prepare_base_model
from spinlm.model.players import check_trackers, seat
from spinlm.model.quantize import check_4bit_support
from spinlm.recipe.fingerprint import recipe_fingerprint
from spinlm.recipe.schema import Recipe
from spinlm.rundir.layout import RunDir
from spinlm.rundir.provenance import provenance
from spinlm.rundir.records import SPLITS, Example, to_line
from spinlm.rundir.resume import verify_inputs
from spinlm.rundir.stage_graph import START
from spinlm.training.optimizers import check_optimizer
from spinlm.utils.atomic import atomic_file, file_digest, write_json
from spinlm.utils.model_path import existing_path, resolve_model

log = logging.getLogger("spinlm")

MODEL_FILES = (".safetensors", ".bin", ".json", ".jinja", ".model")


def prepare(recipe: Recipe, run: RunDir) -> None:
    """Write the run's examples: held-out, for the warm-up where it has its own, and for self-play.

    Raises:
        DataError, ModelError: the data or the model cannot be used.
        RunError: the model or data differ from those this run began with.
    """
    _check_launcher()
    _check_names(recipe)
    inputs = {"data": _data_fingerprint(recipe), "model": _model_fingerprint(recipe)}
    verify_inputs(run, inputs)
    if not run.done("prepare", START):
        run.begin("prepare", START, recipe_fingerprint(recipe, START))
        write_json(run.provenance, {"inputs": inputs, **provenance()})
        _examples(recipe, run, inputs["data"])
    elif not run.provenance.exists():  # without it, nobody would notice other inputs
        write_json(run.provenance, {"inputs": inputs, **provenance()})


def _examples(recipe: Recipe, run: RunDir, data: dict[str, Any]) -> None:
    if (path := existing_path(recipe.data.path)) and path.suffix.lower() == ".jsonl":  # told before a model is unpacked
        check_layout(recipe.data)
    prepare_base_model(recipe.model, run)
    players = seat(recipe, run)
    own = recipe.sft.prompts if recipe.sft else None
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context(atomic_file(run.examples(split), "w")) for split in SPLITS}

        def write(split: str, example: Example) -> None:
            files[split].write(to_line(example))

        selection = select_examples(recipe.data, own, players.renderer, recipe.train.max_length, write)
    if _data_fingerprint(recipe) != data:
        raise DataError(f"{recipe.data.path}: has changed while it was read. Run the same command again")
    write_json(
        run.skipped_rows,
        {
            "rows": selection.rows,
            "not_sampled": selection.not_sampled,
            "skipped": selection.skipped,
            "skipped_rows": selection.skipped_rows,
            "responses_cut_at_max_length": selection.truncated,
        },
    )
    counts = selection.counts
    log.info("examples: %d for self-play, %d held out, %d for the warm-up alone", *(counts[s] for s in _ORDER))
    for reason, count in selection.skipped.items():
        log.info("  skipped: %d × %s (see %s)", count, reason.replace("_", " "), run.skipped_rows)
    run.complete("prepare", START, [run.examples(split) for split in SPLITS], counts=counts)


def _check_launcher() -> None:
    """Refuse a launcher's settings that something else of ours decides.

    Raises:
        RecipeError: `accelerate launch` was told to use FSDP or DeepSpeed.
    """
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise RecipeError(
                f"accelerate launch was told to use {name}. Launch without it, and set train.fsdp: full_shard to "
                "divide the model over the processes"
            )


def _check_names(recipe: Recipe) -> None:
    """Look up what the recipe names, so that a misspelt one is told now and not hours later.

    Raises:
        RecipeError: there is no such optimiser, tracker or scorer.
        MissingPackageError: a tracker's package, or the one that quantises, is not installed.
        ModelError: this machine cannot quantise.
    """
    check_optimizer(recipe.train.optimizer, recipe.train.weight_decay, "train.optimizer")
    if recipe.sft is not None:
        check_optimizer(recipe.sft.optimizer, recipe.train.weight_decay, "sft.optimizer")
    if recipe.evaluate.scorer is not None:
        get_scorer(recipe.evaluate.scorer)
    check_trackers(recipe.report_to)
    if recipe.opponent.engine == "vllm":
        check_vllm(recipe)
    if recipe.model.load_in_4bit:
        check_4bit_support()


_ORDER = ("train", "heldout", "sft")


def _data_fingerprint(recipe: Recipe) -> dict[str, Any]:
    path = existing_path(recipe.data.path)
    if path is None and names_a_file(recipe.data.path):  # told before a model is unpacked
        raise DataError(f"{recipe.data.path}: no such file")
    if path is not None and path.is_file():
        try:
            return {"sha256": file_digest(path)}
        except OSError as error:
            raise DataError(f"{recipe.data.path}: cannot be read: {error.strerror}") from error
    return {"id": recipe.data.path, "revision": recipe.data.revision, "split": recipe.data.split}


def _model_fingerprint(recipe: Recipe) -> dict[str, Any]:
    """Digests of a model's files, or the commit of one of the hub: another of the same shape is another model."""
    path = resolve_model(recipe.model.path)
    if path is None:
        return {"id": recipe.model.path, "commit": hub_commit(recipe.model)}
    files = [path] if path.is_file() else [file for file in sorted(path.iterdir()) if file.suffix in MODEL_FILES]
    return {file.name: file_digest(file) for file in files}
