"""Activation checkpointing: measure what a training step keeps until backward, and recompute if memory is short."""

import logging
from typing import Any

import torch
from torch import Tensor

from spinlm.distributed import processes
from spinlm.model.logprobs import LogProbs
from spinlm.model.prefix_trees import PrefixTree, pack_batch
from spinlm.recipe.schema import Recipe
from spinlm.training.memory import MEMORY_MARGIN, optimizer_bytes
from spinlm.utils.hardware import free_memory

log = logging.getLogger("spinlm")

PROBE_TOKENS = 64


def set_activation_checkpointing(logprobs: LogProbs, recipe: Recipe, prefix_sharing: bool) -> bool:
    """Turn activation checkpointing on or off as the recipe says; `auto` turns it on if memory would not suffice.

    Call this before an optimizer holds any state.

    Args:
        logprobs: the model to train.
        recipe: the recipe of the run.
        prefix_sharing: whether all responses to a prompt share one row.

    Returns:
        Whether checkpointing is on. If one process needs checkpointing, all processes turn it on.
    """
    model, checkpointing = logprobs.causal_lm, recipe.train.gradient_checkpointing
    if checkpointing == "auto":
        switch_activation_checkpointing(model, on=False)
        tokens = recipe.max_micro_batch_tokens(prefix_sharing)
        need = MEMORY_MARGIN * tokens * saved_activation_bytes(logprobs, prefix_sharing, recipe.train.max_length)
        free = free_bytes(next(logprobs.parameters()).device) - _first_step_bytes(logprobs, recipe)
        checkpointing = any(processes.all_gather(need > free and bool(model.supports_gradient_checkpointing)))
        if checkpointing:
            log.info(
                "gradient checkpointing: on (%d tokens would keep %.1f GB until the backward pass; %.1f GB are free)",
                *(tokens, need / 1e9, free / 1e9),
            )
    switch_activation_checkpointing(model, on=checkpointing)
    return checkpointing


def switch_activation_checkpointing(model: Any, *, on: bool) -> None:
    """Turn activation checkpointing of a transformers model on or off."""
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()) == on:
        return
    if not hasattr(model, "activation_checkpointing_enable"):  # transformers before 5.20
        kwargs = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
        model.gradient_checkpointing_enable(**kwargs) if on else model.gradient_checkpointing_disable()
    elif on:
        model.activation_checkpointing_enable()
    else:
        model.activation_checkpointing_disable()
    if on:  # transformers adds a hook that reentrant checkpointing needs and that would stay
        model.disable_input_require_grads()


def saved_activation_bytes(logprobs: LogProbs, prefix_sharing: bool, row_length: int) -> float:
    """Estimate the bytes that autograd saves per token in a row of `row_length` tokens, from three short rows.

    The bytes of a row grow linearly with its length. Without fused attention, they also grow with the square.
    """
    one, two, three = (_saved_bytes(logprobs, prefix_sharing, length * PROBE_TOKENS) for length in (1, 2, 3))
    per_pair = max(0.0, (three - 2 * two + one) / (2 * PROBE_TOKENS**2))
    return (two - one) / PROBE_TOKENS + per_pair * (row_length - 3 * PROBE_TOKENS)


def _saved_bytes(logprobs: LogProbs, prefix_sharing: bool, tokens: int) -> int:
    """Measure the bytes that autograd saves in one forward pass of one row, including weights."""
    storages: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    half = [0] * (tokens // 2)
    tree = PrefixTree(half, ([*half, 0],))
    batch = pack_batch([tree], prefix_sharing).to(next(logprobs.parameters()).device)
    logprobs.train()
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor), torch.enable_grad():
        values = logprobs(batch)
    del values  # not earlier: a new tensor at the address of a freed one would not be counted
    return sum(storages.values())


def free_bytes(device: torch.device) -> int:
    """Free memory of a device, in bytes."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return free_memory()


def _first_step_bytes(logprobs: LogProbs, recipe: Recipe) -> float:
    """Estimate the bytes that the first step adds for good: gradients, optimizer state, weights in `autocast`."""
    trained = [parameter for parameter in logprobs.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in trained)
    state = sum(4 * parameter.numel() for parameter in trained if parameter.grad is None)
    state += optimizer_bytes(recipe.train.optimizer) * count
    copy = (2 if logprobs.autocast is not None else 0) * count
    if recipe.train.fsdp == "none":
        return state + copy
    world_size = processes.world_size()
    weights = sum(parameter.nbytes for parameter in logprobs.parameters())
    return state / world_size + copy - weights * (1 - 1 / world_size)  # sharding frees most of the weights
