"""How much memory a training step keeps until its backward pass, measured, and how much is free."""

import logging
from typing import Any

import psutil
import torch
from torch import Tensor

from spinlm.config import MEMORY_MARGIN, Recipe
from spinlm.model.logprobs import LogProbs
from spinlm.model.trees import Tree, lay_out

log = logging.getLogger("spinlm")

PROBE = 64  # tokens


def checkpoint_if_needed(logprobs: LogProbs, recipe: Recipe, packing: str) -> bool:
    """Turn gradient checkpointing on if the recipe says so, or leaves it open and memory would not suffice otherwise.

    Returns:
        Whether it is on.
    """
    wanted = recipe.train.gradient_checkpointing
    if wanted == "auto":
        tokens = most_tokens(recipe)
        if not logprobs.causal.supports_gradient_checkpointing:
            return False
        switch_checkpointing(logprobs.causal, on=False)
        need = MEMORY_MARGIN * tokens * kept_bytes(logprobs, packing)
        free = free_bytes(next(logprobs.parameters()).device)
        wanted = need > free
        if wanted:
            log.info(
                "gradient checkpointing is on: %d tokens would keep %.1f GB until the backward pass; %.1f GB are free",
                *(tokens, need / 1e9, free / 1e9),
            )
    if wanted:
        switch_checkpointing(logprobs.causal, on=True)
    return wanted


def switch_checkpointing(model: Any, *, on: bool) -> None:
    """Turn gradient checkpointing of a model of transformers on or off."""
    if hasattr(model, "activation_checkpointing_enable"):  # its name from transformers 5.20 or so on
        (model.activation_checkpointing_enable if on else model.activation_checkpointing_disable)()
    elif on:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()


def most_tokens(recipe: Recipe) -> int:
    """The most tokens a micro-batch can have: its budget, or a single tree that is longer."""
    used = recipe.opponent.samples_per_prompt * (min(recipe.selfplay.iterations - 1, recipe.selfplay.replay) + 1)
    return max(recipe.train.tokens_per_micro_batch, recipe.train.max_length + used * recipe.opponent.max_new_tokens)


def kept_bytes(logprobs: LogProbs, packing: str) -> float:
    """Bytes that autograd keeps until the backward pass for every further token of a row."""
    one, two = (_kept(logprobs, packing, tokens) for tokens in (PROBE, 2 * PROBE))
    return (two - one) / PROBE


def _kept(logprobs: LogProbs, packing: str, tokens: int) -> int:
    """Bytes that autograd keeps of one forward pass, weights and all."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    half = [0] * (tokens // 2)
    layout = lay_out([Tree(half, ([*half, 0],))], packing).to(next(logprobs.parameters()).device)
    logprobs.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch.enable_grad():
        values = logprobs(layout)
    del values  # not before: what is kept must not be freed and counted again under the same address
    return sum(kept.values())


def free_bytes(device: torch.device) -> float:
    """Memory that can still be had on a device."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return float(psutil.virtual_memory().available)
