"""Prepare: draw the examples, and record what the run is made of."""

import contextlib
import logging
import os
import shutil
from typing import Any

import torch

from spinlm.data.columns import check_layout
from spinlm.data.examples import select_examples
from spinlm.data.sources import data_files, names_one_file, shard_names
from spinlm.distributed.processes import on_rank_zero, world_size
from spinlm.errors import DataError, RecipeError
from spinlm.evals.scorers import get_scorer
from spinlm.generation.vllm import check_vllm
from spinlm.model.base_model import model_fingerprint, prepare_base
from spinlm.model.quantize import check_4bit_support
from spinlm.model.run import Run
from spinlm.recipe.schema import Recipe
from spinlm.rundir.provenance import current_provenance, pin_model, recorded_inputs
from spinlm.rundir.records import SPLITS, Example, to_line
from spinlm.rundir.resume import verify_inputs
from spinlm.training.optimizers import check_optimizer
from spinlm.training.step_log import check_trackers
from spinlm.utils.atomic import atomic_file, file_digest, write_json
from spinlm.utils.hub import Repository

log = logging.getLogger("spinlm")


def prepare(run: Run) -> None:
    """Write the examples of the run: held-out, for self-play, and additional ones for SFT if `sft.prompts` is set.

    Raises:
        DataError, ModelError: the data or the model cannot be used.
        RunError: the model or the data differ from those that the run began with.
    """
    inputs = on_rank_zero(_check_inputs, run)
    with run.stage("prepare") as stage:
        if not stage.done:
            stage.metadata = {"counts": on_rank_zero(_write_examples, run, inputs["data"])}
            stage.outputs = [run.folder.examples(split) for split in SPLITS]
    on_rank_zero(lambda: prepare_base(pin_model(run.recipe, run.folder), run.folder))


def _check_inputs(run: Run) -> dict[str, Any]:
    """Check what the recipe names, verify model and data, and record the provenance of a new run."""
    _check_launcher()
    _check_names(run.recipe)
    is_resumed = run.folder.has_results()  # a resumed run keeps its commits
    earlier = recorded_inputs(run.folder)
    recorded = earlier if is_resumed else {}
    inputs = {
        "data": _data_fingerprint(run.recipe, recorded.get("data", {}).get("commit")),
        "model": model_fingerprint(run.recipe.model, recorded.get("model", {})),
    }
    verify_inputs(run.folder, inputs)
    if not is_resumed or not run.folder.provenance.exists():
        if not is_resumed and earlier.get("model") != inputs["model"]:  # a base made from files that have changed
            shutil.rmtree(run.folder.base, ignore_errors=True)
        write_json(run.folder.provenance, {"inputs": inputs, **current_provenance()})
    return inputs


def _write_examples(run: Run, data_fingerprint: dict[str, Any]) -> dict[str, int]:
    """Write examples/*.jsonl and skipped_rows.json; return the number of examples of each split."""
    recipe, folder, commit = run.recipe, run.folder, data_fingerprint.get("commit")
    data = recipe.data.model_copy(update={"revision": commit}) if commit else recipe.data
    check_layout(data)  # before a .gguf model is converted, which takes long
    sft_prompts = recipe.sft.prompts if recipe.sft else None
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context(atomic_file(folder.examples(split), "w")) for split in SPLITS}

        def write(split: str, example: Example) -> None:
            files[split].write(to_line(example))

        selection = select_examples(data, sft_prompts, run.players.renderer, recipe.train.max_length, write)
    if _data_fingerprint(recipe, commit) != data_fingerprint:
        raise DataError(f"{recipe.data.where}: has changed while it was read. Run the same command again")
    write_json(
        folder.skipped_rows,
        {
            "rows": selection.rows,
            "not_sampled": selection.not_sampled,
            "skipped": selection.skipped,
            "skipped_rows": selection.skipped_rows,
            "responses_cut_at_max_length": selection.truncated,
            "responses_changed": selection.changed,
            "changed_responses": selection.changed_responses,
        },
    )
    counts = selection.counts
    sft_only = f", {counts['sft']} for SFT only" if counts["sft"] else ""
    log.info("examples: %d for self-play, %d held out%s", counts["train"], counts["heldout"], sft_only)
    log.info("columns: %s", selection.columns)
    if selection.changed:
        log.warning(
            "%d responses are rendered as text that differs from the data; spinlm trains on the rendered text, and "
            "scores it (`spinlm check` shows both)",
            selection.changed,
        )
    for reason, count in selection.skipped.items():
        log.info("  skipped: %d × %s (see %s)", count, reason.replace("_", " "), folder.skipped_rows)
    return counts


def _check_launcher() -> None:
    """Refuse settings of the launcher that belong in the recipe; log how to use GPUs that are left idle.

    Raises:
        RecipeError: `accelerate launch` is configured to use FSDP or DeepSpeed.
    """
    if world_size() == 1 and (gpus := torch.cuda.device_count()) > 1:
        log.info(
            "using 1 of %d GPUs. To run on all of them, write `torchrun --nproc-per-node %d -m spinlm` instead of "
            "`spinlm`",
            gpus,
            gpus,
        )
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise RecipeError(
                f"accelerate launch is configured to use {name}. Launch without it, and set train.fsdp: full_shard to "
                "shard the model over the processes"
            )


def _check_names(recipe: Recipe) -> None:
    """Look up everything that the recipe names, so that a wrong name fails now and not hours later.

    Raises:
        RecipeError: an optimizer, tracker or scorer does not exist.
        MissingPackageError: the package of a tracker, of vLLM or of 4-bit weights is not installed.
        ModelError: this machine does not support 4-bit weights.
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


def _data_fingerprint(recipe: Recipe, commit: str | None) -> dict[str, Any]:
    """Return the SHA-256 of each data file, or the commit of a hub data set: `commit`, or the hub's answer if None."""
    data = recipe.data
    files = data_files(data)
    if files is None:
        if "/" in data.where:  # otherwise reading the examples raises an error with the reason
            commit = commit or Repository(data.where, data.revision, "dataset").commit()
        return {"id": data.path, "subset": data.subset, "split": data.split, "commit": commit}
    try:
        digests = {name: file_digest(file) for name, file in shard_names(files).items()}
    except OSError as error:
        raise DataError(f"{error.filename or data.where}: cannot be read: {error.strerror}") from error
    return {"sha256": digests[files[0].name]} if names_one_file(data) else digests
