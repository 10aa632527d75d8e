"""Players as whole models: an adapter merged into its base."""

import logging
import shutil
from pathlib import Path

from peft import PeftModel
from transformers import GenerationConfig

from spinlm.model.loading import compute_dtype, ensure_base, load_model, save_stop_ids
from spinlm.model.players import seat
from spinlm.recipe.schema import Recipe
from spinlm.rundir.layout import RunDir
from spinlm.utils.atomic import atomic_path

log = logging.getLogger("spinlm")


def save_merged(recipe: Recipe, run: RunDir, iteration: int, to: Path) -> None:
    """Save the base with a player's adapter merged into it, and the tokenizer.

    An adapter that was trained over 4 bits is merged into the base as it came: what is saved is no longer quantised.

    Args:
        recipe: the run's, with LoRA.
        run: whose player.
        iteration: which.
        to: the folder.
    """
    players = seat(recipe, run)
    dtype = compute_dtype(recipe.model, players.device)
    if recipe.model.load_in_4bit:
        log.info(
            "the adapter was trained over a base in 4 bits and is merged into the base in %s: the merged model is not "
            "the player that was evaluated; `spinlm check` says how far the two bases are apart",
            dtype,
        )
    base = load_model(recipe.model, ensure_base(recipe.model, run), dtype)
    merged = PeftModel.from_pretrained(base, str(run.player(iteration))).merge_and_unload()
    merged.save_pretrained(to)
    players.tokenizer.chat_template = players.renderer.template
    players.tokenizer.save_pretrained(to)
    save_stop_ids(to, players.renderer.stop_ids)


def save_for_serving(recipe: Recipe, run: RunDir, iteration: int, to: Path) -> None:
    """Save a player as a whole model from which any server samples as the recipe says: many take their defaults from
    the model's generation_config.json, and transformers' own default leaves out all but the 50 likeliest tokens."""
    renderer, opponent = seat(recipe, run).renderer, recipe.opponent
    drawn = {"do_sample": True, "temperature": opponent.temperature, "top_p": opponent.top_p, "top_k": 0}
    defaults = GenerationConfig(
        eos_token_id=list(renderer.stop_ids), **(drawn if opponent.temperature > 0 else {"do_sample": False})
    )
    with atomic_path(to) as temporary:
        if recipe.lora is not None:
            save_merged(recipe, run, iteration, temporary)
        else:
            shutil.copytree(run.player(iteration), temporary)
        defaults.save_pretrained(temporary)
