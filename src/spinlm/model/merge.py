"""Save players as whole models, with the adapter merged into the base."""

import logging
import shutil
from pathlib import Path

from peft import PeftModel
from transformers import GenerationConfig

from spinlm.model.loading import compute_dtype, load_model, prepare_base_model, save_stop_ids
from spinlm.model.players import seat
from spinlm.recipe.schema import Recipe
from spinlm.rundir.layout import RunDir
from spinlm.utils.atomic import atomic_path

log = logging.getLogger("spinlm")


def save_merged(recipe: Recipe, run: RunDir, iteration: int, output: Path) -> None:
    """Save the base with a player's adapter merged into it, and the tokenizer.

    The merged model is never quantized: an adapter trained over a 4-bit base is merged into the original base.

    Args:
        recipe: the recipe of the run; must have LoRA.
        run: the run folder.
        iteration: the iteration of the player.
        output: the folder to save to.
    """
    players = seat(recipe, run)
    dtype = compute_dtype(recipe.model, players.device)
    if recipe.model.load_in_4bit:
        log.info(
            "the adapter was trained over a 4-bit base and is merged into the base in %s, so the merged model differs "
            "from the player that was evaluated. `spinlm check` measures the difference between the two bases",
            dtype,
        )
    base = load_model(recipe.model, prepare_base_model(recipe.model, run), dtype)
    merged = PeftModel.from_pretrained(base, str(run.player(iteration))).merge_and_unload()
    merged.save_pretrained(output)
    players.tokenizer.chat_template = players.renderer.template
    players.tokenizer.save_pretrained(output)
    save_stop_ids(output, players.renderer.stop_ids)


def save_for_serving(recipe: Recipe, run: RunDir, iteration: int, output: Path) -> None:
    """Save a player as a whole model whose generation config has the sampling parameters of the recipe.

    Many servers take their defaults from generation_config.json, where the default of transformers is top_k = 50.
    """
    opponent = recipe.opponent
    sampling = {"do_sample": True, "temperature": opponent.temperature, "top_p": opponent.top_p, "top_k": 0}
    config = GenerationConfig(
        eos_token_id=list(seat(recipe, run).renderer.stop_ids),
        **(sampling if opponent.temperature > 0 else {"do_sample": False}),
    )
    with atomic_path(output) as temporary:
        if recipe.lora is not None:
            save_merged(recipe, run, iteration, temporary)
        else:
            shutil.copytree(run.player(iteration), temporary)
        config.save_pretrained(temporary)
