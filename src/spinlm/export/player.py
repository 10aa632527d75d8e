"""Export a player from a run folder, and push it to the hub."""

import json
import shutil
from pathlib import Path

from spinlm.errors import RunError
from spinlm.export.model_card import CARD, public_name, render_card
from spinlm.recipe.adapter import ADAPTER_CONFIG
from spinlm.recipe.fingerprint import differences
from spinlm.recipe.schema import Recipe
from spinlm.rundir.layout import RunDir
from spinlm.rundir.provenance import recorded_inputs
from spinlm.utils.atomic import atomic_path, read_json, write_json
from spinlm.utils.hub import http_status, is_transport_error, with_retries


def export(
    recipe: Recipe,
    folder: RunDir,
    iteration: int,
    output: Path,
    *,
    merge: bool = False,
    license: str | None = None,
    dtype: str | None = None,
) -> None:
    """Copy a player to a folder, or merge its adapter into the base model; write a model card.

    An adapter that was trained over a 4-bit base is merged into the original weights, not the quantized ones.

    Args:
        recipe: the recipe of the run.
        folder: the run folder.
        iteration: the iteration of the player.
        output: a folder that does not exist or is empty.
        merge: whether to merge the adapter and save a whole model.
        license: license of the player for the card; None uses the base model's, where its files state one.
        dtype: precision of a whole model: float32, bfloat16 or float16. None merges in the precision of the base
            model's files, and keeps that of a player of full fine-tuning, which is float32.

    Raises:
        RunError: the output folder is not empty, the player has no adapter to merge, `dtype` is given for an adapter,
            or the base has changed since the run began.
        ModelError: the merged or rounded model differs from the player beyond rounding.
    """
    require_empty(output)
    if merge and recipe.lora is None:
        raise RunError("--merge: this run fine-tunes the whole model, so its players have no adapter. Leave it out")
    if dtype and recipe.lora is not None and not merge:
        raise RunError("--dtype: an adapter keeps its precision. Add --merge, or leave --dtype out")
    if merge:
        _check_base(recipe, folder)
    card = render_card(recipe, folder, iteration, merged=merge, license=license)
    with atomic_path(output) as temporary:
        if merge or dtype:
            from spinlm.model.merge import save_whole_player
            from spinlm.model.players import Players

            save_whole_player(Players(recipe, folder), iteration, temporary, dtype)
        else:
            shutil.copytree(folder.player(iteration), temporary)
            _name_base(temporary / ADAPTER_CONFIG, folder)
        (temporary / CARD).write_text(card, encoding="utf-8")


def _check_base(recipe: Recipe, folder: RunDir) -> None:
    """Check that the base of an adapter has not changed since the run began.

    Raises:
        RunError: the base has changed.
    """
    from spinlm.model.base_model import model_fingerprint

    model, recorded = recipe.model.base_model, recorded_inputs(folder).get("model", {})
    if folder.base.exists() or not recorded:  # the run folder holds the base, with its digests
        return
    expected = recorded.get("base", recorded)
    if changes := differences(expected, model_fingerprint(model, expected)):
        raise RunError(
            f"--merge: the base model {model.path} has changed since this run began:\n"
            + "\n".join(f"  {line}" for line in changes)
            + "\nRestore the original files, or export the adapter without --merge"
        )


def _name_base(config: Path, folder: RunDir) -> None:
    """Write the present path of a base in the run folder to an adapter's config. The folder may have been moved."""
    base = str(folder.base.absolute())
    if folder.base.exists() and config.exists() and read_json(config)["base_model_name_or_path"] != base:
        write_json(config, read_json(config) | {"base_model_name_or_path": base})


def require_empty(output: Path) -> None:
    """Check that an output folder does not exist or is empty.

    Raises:
        RunError: the folder has content, or is a file.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunError(f"{output}: already exists and is not an empty folder. Choose another --output")


def push(folder: Path, repository: str, recipe: Recipe, *, dataset: bool = False) -> str:
    """Upload an exported folder to the hub and return its URL. A new repository is private.

    The uploaded adapter_config.json names the base model without local folders. The token comes from `hf auth login` or
    HF_TOKEN.

    Args:
        folder: the folder to upload.
        repository: repository id on the hub.
        recipe: the recipe of the run.
        dataset: whether the repository is a data set instead of a model.

    Raises:
        RunError: the upload failed, or the base of the adapter is in the run folder only.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    if recipe.merges_adapter and (folder / ADAPTER_CONFIG).exists():
        raise RunError(
            f"{folder}: not pushed, because the base of this adapter has another adapter merged, and is in the run "
            "folder only. Export with --merge"
        )
    api, kind = HfApi(), "dataset" if dataset else "model"
    url = f"{api.endpoint}/{'datasets/' if dataset else ''}{repository}"
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    operations = [CommitOperationAdd(str(path.relative_to(folder)), _public_content(path, recipe)) for path in files]

    try:
        created = with_retries(
            lambda: api.create_repo(repository, private=True, exist_ok=True, repo_type=kind), repository
        )
        api.preupload_lfs_files(repository, operations, repo_type=kind, free_memory=False)  # with the client's retries
        message = "Upload from spinlm"  # one commit: the repository gets all files or none
        with_retries(
            lambda: api.create_commit(repository, operations, commit_message=message, repo_type=kind), repository
        )
        return str(created)
    except Exception as error:  # the errors of the hub client and of its HTTP library have no common base class
        status, reason = http_status(error), f"could not be pushed: {' '.join(str(error).split())}"
        if status in (401, 403):
            reason = f"your token may not write to {url} ({status}). Sign in with one that may: `hf auth login`"
        elif status >= 500 or is_transport_error(error):
            reason = f"could not be pushed, because the hub at {url} " + (
                f"fails ({status})" if status else "does not answer"
            )
        option = " --repo-type dataset" if dataset else ""
        raise RunError(
            f"{repository}: {reason}. {folder} is complete: upload it with `hf upload {repository} {folder}{option}`, "
            "or remove it and export again"
        ) from error


def _public_content(path: Path, recipe: Recipe) -> Path | bytes:
    """Return the file to upload, or the content of adapter_config.json without the local folders of its base model."""
    if path.name != ADAPTER_CONFIG:
        return path
    values = read_json(path) | {"base_model_name_or_path": public_name(recipe.model.base_model.path)}
    return json.dumps(values, indent=2).encode()
