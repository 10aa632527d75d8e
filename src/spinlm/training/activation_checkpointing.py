"""How much memory a training step keeps until its backward pass, measured, and how much is free."""

import logging
from typing import Any

import torch
from torch import Tensor

from spinlm.distributed import processes
from spinlm.model.logprobs import LogProbs
from spinlm.model.prefix_trees import PrefixTree, pack_batch
from spinlm.recipe.schema import MEMORY_MARGIN, Recipe, optimizer_bytes
from spinlm.utils.hardware import free_memory

log = logging.getLogger("spinlm")

PROBE = 64  # tokens


def checkpoint_if_needed(logprobs: LogProbs, recipe: Recipe, prefix_sharing: bool) -> bool:
    """Turn gradient checkpointing on if the recipe says so, or leaves it open and memory would not suffice otherwise.

    Args:
        logprobs: the model that is about to be trained.
        recipe: `train.gradient_checkpointing`, and what the largest micro-batch can be.
        prefix_sharing: whether all responses to a prompt share one row.

    Returns:
        Whether it is on: in all processes, if one of them needs it.
    """
    wanted = recipe.train.gradient_checkpointing
    if wanted == "auto":
        switch_checkpointing(logprobs.causal_lm, on=False)
        tokens = recipe.max_micro_batch_tokens(prefix_sharing)
        need = MEMORY_MARGIN * tokens * saved_activation_bytes(logprobs, prefix_sharing, recipe.train.max_length)
        free = free_bytes(next(logprobs.parameters()).device) - _still_to_come(logprobs, recipe)
        wanted = any(processes.all_gather(need > free and bool(logprobs.causal_lm.supports_gradient_checkpointing)))
        if wanted:
            log.info(
                "gradient checkpointing is on: %d tokens would keep %.1f GB until the backward pass; %.1f GB are free",
                *(tokens, need / 1e9, free / 1e9),
            )
    switch_checkpointing(logprobs.causal_lm, on=wanted)
    return wanted


def switch_checkpointing(model: Any, *, on: bool) -> None:
    """Turn gradient checkpointing of a model of transformers on or off."""
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()) == on:
        return
    if not hasattr(model, "activation_checkpointing_enable"):  # the older name
        kwargs = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
        model.gradient_checkpointing_enable(**kwargs) if on else model.gradient_checkpointing_disable()
    elif on:
        model.activation_checkpointing_enable()
    else:
        model.activation_checkpointing_disable()
    if on:  # a hook that other kinds of checkpointing need, and that would stay behind
        model.disable_input_require_grads()


def saved_activation_bytes(logprobs: LogProbs, prefix_sharing: bool, row: int) -> float:
    """Bytes that autograd keeps until the backward pass for each token in a row of some length.

    Measured for three short rows: a token keeps a part of its own, and where attention is not fused one for each token
    of its row.
    """
    one, two, three = (_kept(logprobs, prefix_sharing, length * PROBE) for length in (1, 2, 3))
    for_each = max(0.0, (three - 2 * two + one) / (2 * PROBE**2))
    return (two - one) / PROBE + for_each * (row - 3 * PROBE)


def _kept(logprobs: LogProbs, prefix_sharing: bool, tokens: int) -> int:
    """Bytes that autograd keeps of one forward pass, weights and all."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    half = [0] * (tokens // 2)
    batch = pack_batch([PrefixTree(half, ([*half, 0],))], prefix_sharing).to(next(logprobs.parameters()).device)
    logprobs.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch.enable_grad():
        values = logprobs(batch)
    del values  # not before: what is kept must not be freed and counted again under the same address
    return sum(kept.values())


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had on a device."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return free_memory()


def _still_to_come(logprobs: LogProbs, recipe: Recipe) -> float:
    """Bytes that the first step will take for good: gradients, the optimiser's state, a copy in another precision."""
    trained = [parameter for parameter in logprobs.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in trained)
    state = sum(4 * parameter.numel() for parameter in trained if parameter.grad is None)
    state += optimizer_bytes(recipe.train.optimizer) * count
    copy = (2 if logprobs.autocast is not None else 0) * count
    if recipe.train.fsdp == "none":
        return state + copy
    weights = sum(parameter.nbytes for parameter in logprobs.parameters())
    return (
        state / processes.world_size() + copy - weights * (1 - 1 / processes.world_size())
    )  # most of the weights go to the others
