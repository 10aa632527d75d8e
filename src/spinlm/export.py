"""Export: take a player out of a run folder."""

import logging
import shutil
from pathlib import Path

from spinlm.card import full_card, public_name
from spinlm.config import Recipe
from spinlm.errors import RunError
from spinlm.files import atomic_path, read_json, write_json
from spinlm.order import START
from spinlm.rundir import RunDir

log = logging.getLogger("spinlm")

CARD = "README.md"


def which_player(run: RunDir, name: str) -> int:
    """The iteration that a player's name means: `best`, `start`, or a number. Its files are looked through.

    Raises:
        RunError: the run has no such player, or it is not as it was saved.
    """
    iteration: int | None
    if name == "best":
        iteration = run.best()
        if iteration is None:
            raise RunError(f"{run.root}: no iteration has been judged yet, so there is no best player. Name one")
    elif name == "start":
        iteration = START
    elif name.isdecimal():
        iteration = int(name)
    else:
        raise RunError(f"{name!r} names no player: write best, start, or the number of an iteration")
    if not run.player(iteration).is_dir():
        made = [path.parent.name for path in sorted(run.root.glob("*/player")) if not path.parent.is_symlink()]
        raise RunError(f"{run.root}: has no player {name}; it has {', '.join(made) or 'none yet'}")
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
        raise RunError(f"{to}: already there and not an empty folder. Choose another --to")
    if merge and recipe.lora is None:
        raise RunError("--merge: this run fine-tunes the whole model, so its players have no adapter. Leave it out")
    about = full_card(recipe, run, iteration, merged=merge, licence=licence)
    if not merge:
        with atomic_path(to) as temporary:
            shutil.copytree(run.player(iteration), temporary)
            (temporary / CARD).write_text(about, encoding="utf-8")
        return
    from peft import PeftModel

    from spinlm.model.loading import compute_dtype, ensure_base, load_model
    from spinlm.model.players import seat

    players = seat(recipe, run)
    if recipe.lora and recipe.lora.quantize:
        log.info(
            "the adapter was trained over a base in 4 bits and is merged into the base in %s: the merged model is not "
            "the player that was evaluated; `spinlm check` says how far the two bases are apart",
            compute_dtype(recipe.model, players.device),
        )
    base = load_model(recipe.model, ensure_base(recipe.model, run), compute_dtype(recipe.model, players.device))
    merged = PeftModel.from_pretrained(base, str(run.player(iteration))).merge_and_unload()
    with atomic_path(to) as temporary:
        merged.save_pretrained(temporary)
        players.tokenizer.chat_template = players.renderer.template
        players.tokenizer.save_pretrained(temporary)
        (temporary / CARD).write_text(about, encoding="utf-8")


def export_for_serving(recipe: Recipe, run: RunDir, iteration: int, to: Path) -> None:
    """Save a player as a whole model from which any server samples as the recipe says: many take their defaults from
    the model's generation_config.json, and transformers' own default leaves out all but the 50 likeliest tokens."""
    from transformers import GenerationConfig

    from spinlm.model.players import seat

    export(recipe, run, iteration, to, merge=recipe.lora is not None)
    renderer, opponent = seat(recipe, run).renderer, recipe.opponent
    drawn = {"do_sample": True, "temperature": opponent.temperature, "top_p": opponent.top_p, "top_k": 0}
    GenerationConfig(
        eos_token_id=list(renderer.stop_ids), **(drawn if opponent.temperature > 0 else {"do_sample": False})
    ).save_pretrained(to)


def push(folder: Path, repository: str, *, data: bool = False) -> str:
    """Upload an exported folder to the hub, as a private repository if it is new; returns its address.

    Args:
        folder: what to upload.
        repository: its name there.
        data: whether it is a data set, and not a model.

    Uses the token of `hf auth login` or HF_TOKEN.

    Raises:
        RunError: the hub refused or could not be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    _take_paths_out(folder)
    try:
        kind = "dataset" if data else "model"
        address = api.create_repo(repository, private=True, exist_ok=True, repo_type=kind)
        api.upload_folder(folder_path=folder, repo_id=repository, repo_type=kind)
    except Exception as error:  # the hub's client and its transport, of which it has had several, have no common family
        raise RunError(
            f"{repository}: could not be pushed: {error}. {folder} is complete: remove it to "
            "export again, or upload it with `hf upload`"
        ) from error
    return str(address)


def _take_paths_out(folder: Path) -> None:
    """Let an adapter that leaves this machine name its base without a folder of this machine."""
    config = folder / "adapter_config.json"
    if config.exists():
        values = read_json(config)
        values["base_model_name_or_path"] = public_name(values["base_model_name_or_path"])
        write_json(config, values)
