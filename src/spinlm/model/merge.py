"""Save players as whole models, with the adapter merged into the base, and compare each with its player."""

import contextlib
import gc
import itertools
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from spinlm.errors import ModelError
from spinlm.model.adapters import merge_adapter
from spinlm.model.base_files import base_folder, save_whole_model, stored_dtype
from spinlm.model.families import auto_class
from spinlm.model.loading import load_model
from spinlm.model.logprobs import plain_logprob
from spinlm.model.players import MAX_LOGPROB_ERROR, Players
from spinlm.model.prefix_trees import PrefixTree, pack_batch
from spinlm.recipe.model import Model
from spinlm.rundir.records import Example, read_lines
from spinlm.utils.atomic import atomic_path

log = logging.getLogger("spinlm")

MAX_ROUNDING_ERROR = {torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.05}
"""Largest effect of rounding merged weights to a precision, in nats per token of a response."""

NUM_SAMPLES, MAX_TOKENS = 8, 128
"""Held-out examples that a merge is compared on, and the tokens used of each prompt and of each response."""

Sample = tuple[list[int], list[int]]
"""Token ids of a prompt and a response."""


def save_whole_player(players: Players, t: int, target: Path, dtype: str | None = None) -> None:
    """Save a player as a whole model. Merge its adapter if it has one; else copy it, rounded to `dtype` if given.

    Raises:
        ModelError: the log-probabilities of the model differ from the player's beyond rounding.
    """
    player = players.folder.player(t)
    if players.recipe.lora is not None:
        save_merged(players, t, target, dtype)
    elif dtype in (None, stored_dtype(player)):
        shutil.copytree(player, target)
    else:
        save_rounded(players, t, target, dtype)


def save_rounded(players: Players, t: int, target: Path, dtype: str) -> None:
    """Save a player of full fine-tuning in another precision, and compare it with the player as `save_merged` does."""
    model, player, samples = players.base, players.folder.player(t), heldout_samples(players)
    expected = player_logprobs(players, t, samples)
    players.unload()
    rounded = load_model(model, str(player), getattr(torch, dtype))
    save_whole_model(model, rounded, players.base_model, target)
    players.save_tokenizer(target)
    del rounded
    compare_saved_model(model, player, target, samples, expected, players.dtype, players.device)


def save_merged(players: Players, t: int, target: Path, dtype: str | None = None) -> None:
    """Save the base with the adapter of iteration `t` merged into it, with the base's own config and tokenizer files.

    The merged model is loaded again and compared with the player on held-out prompts. An adapter that was trained over
    a 4-bit base is merged into the unquantized base, and compared with the adapter over that base.

    Args:
        players: the players. Their model is unloaded.
        t: the iteration of the player.
        target: the folder to write. It is removed if the comparison fails.
        dtype: precision of the weights; None for that of the base's files.

    Raises:
        ModelError: the log-probabilities of the merged model differ from the player's beyond rounding.
    """
    model, samples = players.base, heldout_samples(players)
    expected = player_logprobs(players, t, samples)
    players.unload()
    player, dtype = players.folder.player(t), dtype or _base_dtype(players)
    if model.load_in_4bit:
        quantized, expected = expected, adapter_logprobs(model, players.base_model, player, samples, players.dtype)
        log.info(
            "the adapter of a 4-bit base is merged into the base in %s: the merged model differs from the player that "
            "was evaluated by %.2g nats per token",
            dtype,
            _max_difference(expected, quantized, samples),
        )
    merge_to_folder(model, players.base_model, player, target, dtype)
    players.save_tokenizer(target)
    device = torch.device("cpu") if model.load_in_4bit else players.device
    compare_saved_model(model, player, target, samples, expected, players.dtype, device)


def _base_dtype(players: Players) -> str:
    """Return the precision of the base's own files. A run that began with a merge holds its base in float32."""
    if players.recipe.merges_adapter:
        original = players.recipe.model.base_model
        with contextlib.suppress(ModelError, OSError):  # not on this machine
            if (folder := base_folder(original, original.path)).is_dir():
                return stored_dtype(folder)
    return stored_dtype(base_folder(players.base, players.base_model))


def save_for_serving(players: Players, t: int, target: Path) -> None:
    """Save a player as a whole model, with the recipe's sampling in its generation_config.json.

    Many servers take their sampling defaults from that file, and the default of transformers keeps only the 50
    likeliest tokens.
    """
    from transformers import GenerationConfig

    opponent = players.recipe.opponent
    sampled = {"do_sample": True, "temperature": opponent.temperature, "top_p": opponent.top_p, "top_k": 0}
    defaults = GenerationConfig(
        eos_token_id=list(players.renderer.stop_ids), **(sampled if opponent.temperature > 0 else {"do_sample": False})
    )
    with atomic_path(target) as temporary:
        save_whole_player(players, t, temporary)
        defaults.save_pretrained(temporary)


def merge_to_folder(model: Model, base: str, adapter: Path, target: Path, dtype: str | None = None) -> None:
    """Merge a PEFT adapter into a base model and save the result, without the tokenizer.

    The merge is computed in float32 and rounded once. Config, license and processors are the base's own files.

    Args:
        model: how to load the base.
        base: hub id or folder of the base.
        adapter: folder of the adapter.
        target: the folder to write.
        dtype: precision of the weights; None for that of the base's files.
    """
    from peft import PeftModel

    stored = stored_dtype(base_folder(model, base))
    loaded = load_model(model, base, getattr(torch, stored))
    untied = merge_adapter(PeftModel.from_pretrained(loaded, str(adapter)), getattr(torch, dtype or stored))
    save_whole_model(model, loaded, base, target, untied=untied)


def heldout_samples(players: Players) -> list[Sample]:
    """Return prompts and real responses of held-out examples, shortened; a built-in example if there are none yet."""
    path = players.folder.examples("heldout")
    if path.exists():
        examples = itertools.islice(read_lines(path, Example), NUM_SAMPLES)
        if samples := [(line.prompt_ids[-MAX_TOKENS:], line.response_ids[:MAX_TOKENS]) for line in examples]:
            return samples
    return text_samples(players.tokenizer)


def text_samples(tokenizer: Any) -> list[Sample]:
    """Return a few texts as token ids, cut into a prompt and a response."""
    texts = ("What color is the sky? It is blue.", "Name three numbers: 1, 2 and 3.", "The capital of France is Paris.")
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return [(ids[: len(ids) // 2], ids[len(ids) // 2 :]) for ids in rows]


@torch.no_grad()
def player_logprobs(players: Players, t: int, samples: Sequence[Sample]) -> list[float]:
    """Compute the log-probabilities of responses under the player of iteration `t`, summed over tokens."""
    players.load(t)
    players.logprobs.eval()
    trees = [PrefixTree(prompt, (response,)) for prompt, response in samples]
    return [float(players.logprobs(pack_batch([tree], False).to(players.device))) for tree in trees]


def adapter_logprobs(
    model: Model, base: str, adapter: Path, samples: Sequence[Sample], dtype: torch.dtype
) -> list[float]:
    """Compute the log-probabilities of responses under an adapter over its unquantized base, by PEFT, on the CPU."""
    from peft import PeftModel

    peft_model = PeftModel.from_pretrained(load_model(model, base, dtype), str(adapter)).eval()
    return [plain_logprob(peft_model, *sample) for sample in samples]


def compare_saved_model(
    model: Model,
    player: Path,
    target: Path,
    samples: Sequence[Sample],
    expected: Sequence[float],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Load a saved model as another program would, and compare its log-probabilities with those expected.

    Args:
        model: whether to trust the code of the model.
        player: the folder of the player, for the message.
        target: the folder of the model. It is removed if the comparison fails.
        samples: prompts and responses.
        expected: log-probabilities of the responses, summed over tokens.
        dtype: precision to compute in, the precision of the expected log-probabilities.
        device: where to compute.

    Raises:
        ModelError: a difference is larger than rounding explains, or is not finite.
    """
    from transformers import AutoConfig

    gc.collect()
    config = AutoConfig.from_pretrained(target, trust_remote_code=model.trust_remote_code)
    options = {"dtype": dtype, "trust_remote_code": model.trust_remote_code}
    loaded: Any = auto_class(config).from_pretrained(target, **options)
    loaded.to(device).eval()
    difference = _max_difference([plain_logprob(loaded, *sample) for sample in samples], expected, samples)
    bound = max(MAX_LOGPROB_ERROR[dtype], MAX_ROUNDING_ERROR[getattr(torch, stored_dtype(target))])
    if not difference <= bound:
        shutil.rmtree(target)
        raise ModelError(
            f"{player}: the whole model made from this player differs from the player by {difference:.3g} nats per "
            f"token; rounding explains at most {bound:.3g}. The model was not written. Export the adapter instead, or "
            "choose another --dtype"
        )
    log.info("compared with the player after loading: %.2g nats per token apart", difference)


def _max_difference(values: Sequence[float], expected: Sequence[float], samples: Sequence[Sample]) -> float:
    """Return the largest difference in nats per token of a response; NaN if a value is NaN."""
    differences = [
        abs(value - other) / len(response)
        for value, other, (_, response) in zip(values, expected, samples, strict=True)
    ]
    return float(torch.tensor(differences).max())
