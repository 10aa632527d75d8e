"""Save players as whole models, with the adapter merged into the base."""

import logging
import shutil
from pathlib import Path

from peft import PeftModel
from transformers import GenerationConfig

from spinlm.model.loading import load_model
from spinlm.model.players import Players
from spinlm.utils.atomic import atomic_path

log = logging.getLogger("spinlm")


def save_merged(players: Players, t: int, target: Path) -> None:
    """Save the base with the adapter of iteration `t` merged into it, and the tokenizer.

    An adapter that was trained over a 4-bit base is merged into the unquantized base.
    """
    model = players.recipe.model
    if model.load_in_4bit:
        log.info(
            "the adapter of a 4-bit base is merged into the base in %s: the merged model differs from the player that "
            "was evaluated; `spinlm check` shows by how much the bases differ",
            players.dtype,
        )
    base = load_model(model, players.base_model, players.dtype)
    merged = PeftModel.from_pretrained(base, str(players.folder.player(t))).merge_and_unload()
    merged.save_pretrained(target)
    players.save_tokenizer(target)


def save_for_serving(players: Players, t: int, target: Path) -> None:
    """Save a player as a whole model, with the recipe's sampling in its generation_config.json.

    Many servers take their sampling defaults from that file, and the default of transformers keeps only the 50
    likeliest tokens.
    """
    opponent = players.recipe.opponent
    sampled = {"do_sample": True, "temperature": opponent.temperature, "top_p": opponent.top_p, "top_k": 0}
    defaults = GenerationConfig(
        eos_token_id=list(players.renderer.stop_ids), **(sampled if opponent.temperature > 0 else {"do_sample": False})
    )
    with atomic_path(target) as temporary:
        if players.recipe.lora is not None:
            save_merged(players, t, temporary)
        else:
            shutil.copytree(players.folder.player(t), temporary)
        defaults.save_pretrained(temporary)
