"""Export: take a player out of a run folder."""

import json
import shutil
from pathlib import Path

from spinlm.errors import RunError
from spinlm.export.model_card import full_card, public_name
from spinlm.recipe.schema import Recipe
from spinlm.rundir.layout import RunDir
from spinlm.rundir.stage_graph import START
from spinlm.utils.atomic import atomic_path, read_json

CARD = "README.md"


def which_player(run: RunDir, name: str) -> int:
    """The iteration that a player's name means: `best`, `start`, or a number. Its files are looked through.

    Raises:
        RunError: the run has no such player, or it is not as it was saved.
    """
    made = [path.parent.name for path in sorted(run.root.glob("*/player")) if not path.parent.is_symlink()]
    if not made and not run.marker("sft", START).exists():
        raise RunError(
            f"{run.root}: has no player yet: the start is made by the warm-up. `spinlm status` says how far it is"
        )
    iteration: int | None
    if name == "best":
        iteration = run.best()
        if iteration is None:
            raise RunError(
                f"{run.root}: no iteration has been judged yet, so there is no best player. Name another: start"
            )
    elif name == "start":
        iteration = START
    elif name.isdecimal():
        iteration = int(name)
    else:
        raise RunError(f"{name!r} names no player: write best, start, or the number of an iteration")
    if not run.player(iteration).is_dir():
        raise RunError(f"{run.root}: has no player {name}; it has {', '.join(made) or 'none'}")
    run.player_digest(iteration)
    return iteration


def export(
    recipe: Recipe, run: RunDir, iteration: int, to: Path, *, merge: bool = False, licence: str | None = None
) -> None:
    """Copy a player to a folder, or merge its adapter into the base and save a whole model there; with a model card.

    An adapter that was trained over 4 bits is merged into the base as it came: what is exported is no longer quantised.

    Args:
        recipe: the run's.
        run: where from.
        iteration: whose player.
        to: a folder that is not there, or empty.
        merge: whether to merge.
        licence: for the card; None takes the base model's, where its files state one.

    Raises:
        RunError: the folder exists and is not empty, or there is nothing to merge.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise RunError(f"{to}: already there and not an empty folder. Choose another --output")
    if merge and recipe.lora is None:
        raise RunError("--merge: this run fine-tunes the whole model, so its players have no adapter. Leave it out")
    about = full_card(recipe, run, iteration, merged=merge, licence=licence)
    if not merge:
        with atomic_path(to) as temporary:
            shutil.copytree(run.player(iteration), temporary)
            (temporary / CARD).write_text(about, encoding="utf-8")
        return
    from spinlm.model.merge import save_merged

    with atomic_path(to) as temporary:
        save_merged(recipe, run, iteration, temporary)
        (temporary / CARD).write_text(about, encoding="utf-8")


def push(folder: Path, repository: str, recipe: Recipe, *, data: bool = False) -> str:
    """Upload an exported folder to the hub, as a private repository if it is new; returns its address.

    There an adapter names its base as the recipe does, and no folder of this machine.

    Args:
        folder: what to upload.
        repository: its name there.
        recipe: the run's.
        data: whether it is a data set, and not a model.

    Uses the token of `hf auth login` or HF_TOKEN.

    Raises:
        RunError: the hub refused or could not be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    config = folder / "adapter_config.json"
    try:
        kind = "dataset" if data else "model"
        address = api.create_repo(repository, private=True, exist_ok=True, repo_type=kind)
        api.upload_folder(folder_path=folder, repo_id=repository, repo_type=kind, ignore_patterns=[config.name])
        if config.exists():
            values = read_json(config) | {"base_model_name_or_path": public_name(recipe.model.path)}
            content = json.dumps(values, indent=2).encode()
            api.upload_file(path_or_fileobj=content, path_in_repo=config.name, repo_id=repository, repo_type=kind)
    except Exception as error:  # the hub's client and its transport, of which it has had several, have no common family
        raise RunError(
            f"{repository}: could not be pushed: {error}. {folder} is complete: remove it to "
            "export again, or upload it with `hf upload`"
        ) from error
    return str(address)
