"""Training with several processes: each holds the whole model (DDP) or a shard of it (FSDP2).

DDP (arXiv 2006.15704): each process holds all weights, gradients and optimizer state; gradients are averaged once per
step. FSDP2 (PyTorch's `fully_shard`, after arXiv 2304.11277): weights, gradients and optimizer state are sharded; the
weights of a layer are gathered when the layer is computed and freed afterwards. Both compute the gradient that a single
process would compute.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spinlm.distributed import processes
from spinlm.model.logprobs import LogProbs
from spinlm.model.prefix_trees import PrefixTree

OptimizerState = dict[int, dict[str, Any]]
"""State by parameter number, as in a state dict of torch.optim; tensors are full, not sharded."""


class DDPStrategy:
    """Each process holds the whole model. A single process trains the module without a DDP wrapper."""

    is_sharded = False
    """Whether the weights are sharded, so that all processes must run the same number of forward passes."""

    module: Any
    """The log-probability module to call in training."""

    def __init__(self, logprobs: LogProbs):
        """
        Args:
            logprobs: the model, with the same weights in every process.
        """
        self.module = logprobs
        if processes.world_size() > 1:
            device = next(logprobs.parameters()).device
            self.module = nn.parallel.DistributedDataParallel(
                logprobs,
                device_ids=[device.index] if device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )

    def set_up(self, optimizer: torch.optim.Optimizer, max_grad_norm: float, state: OptimizerState) -> None:
        """Set the optimizer of the module's parameters, and restore its state if `state` is not empty."""
        self.optimizer, self.max_grad_norm = optimizer, max_grad_norm
        optimizer.zero_grad()  # a failed training in this process may have left gradients
        if state:
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

    @contextlib.contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Enclose forward and backward of a micro-batch. The last micro-batch of a step exchanges the gradients."""
        with contextlib.nullcontext() if processes.world_size() == 1 or last else self.module.no_sync():
            yield

    def step(self, *, is_finite: bool) -> float:
        """Clip the gradients, take the optimizer's step, and zero the gradients.

        Args:
            is_finite: whether the loss is finite. If the loss or a gradient is not finite, no step is taken.

        Returns:
            The norm of the gradients before clipping.
        """
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        total: Any = nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        norm = float(total.full_tensor() if hasattr(total, "full_tensor") else total)
        if is_finite and math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def full_tensor(self, tensor: Tensor) -> Tensor | None:
        """Return the full tensor, in CPU memory, in process 0 and None in the other processes.

        All processes must call this for the same tensors in the same order.
        """
        return tensor.detach().cpu().contiguous() if processes.is_main_process() else None

    def full_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        """Return `full_tensor` of each tensor, by name."""
        return {name: self.full_tensor(tensor) for name, tensor in tensors.items()}

    def optimizer_state(self) -> OptimizerState:
        """Return the state of the optimizer, with full tensors in process 0."""
        return {
            index: {
                key: self.full_tensor(value) if isinstance(value, Tensor) else value for key, value in state.items()
            }
            for index, state in self.optimizer.state_dict()["state"].items()
        }


class FSDPStrategy(DDPStrategy):
    """Each process holds a shard of the model. FSDP2 exchanges gradients in every micro-batch."""

    is_sharded = True

    def __init__(self, logprobs: LogProbs, *, reshard_after_forward: bool):
        """
        Args:
            logprobs: the model, with the same weights in every process; its parameters are replaced by shards.
            reshard_after_forward: free the gathered weights after forward and gather them again for backward.
        """
        from torch.distributed.fsdp import fully_shard

        layers = set(getattr(logprobs.causal_lm, "_no_split_modules", None) or ())
        for module in logprobs.causal_lm.modules():
            if type(module).__name__ in layers:
                fully_shard(module, reshard_after_forward=reshard_after_forward)
        # Embeddings, head and last norm are one group, which stays gathered from forward to backward: `LogProbs` reads
        # the head's weight without calling the head.
        self.module = fully_shard(logprobs, reshard_after_forward=False)

    def set_up(self, optimizer: torch.optim.Optimizer, max_grad_norm: float, state: OptimizerState) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for index, values in state.items():
            parameter = parameters[index]
            for key, value in values.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    values[key] = _shard_like(value, parameter)
        super().set_up(optimizer, max_grad_norm, state)

    @contextlib.contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        yield

    def full_tensor(self, tensor: Tensor) -> Tensor | None:
        return super().full_tensor(tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor)


def make_strategy(logprobs: LogProbs, fsdp: str) -> DDPStrategy:
    """Return the strategy that `train.fsdp` names. A single process does not shard."""
    if fsdp == "none" or processes.world_size() == 1:
        return DDPStrategy(logprobs)
    return FSDPStrategy(logprobs, reshard_after_forward=fsdp == "full_shard")


def _shard_like(full: Tensor, parameter: Any) -> Tensor:
    """Shard a full tensor like a parameter."""
    from torch.distributed.tensor import distribute_tensor

    device_mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(full.to(parameter.device), device_mesh, placements, src_data_rank=None)


def all_reduce_sum(values: dict[str, float]) -> dict[str, float]:
    """Sum each value over the processes."""
    if processes.world_size() == 1:
        return values
    import torch.distributed as dist

    sums = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(sums)
    return dict(zip(values, sums.tolist(), strict=True))


def balance_by_tokens(trees: Sequence[PrefixTree], parts: int) -> list[list[int]]:
    """Divide trees into parts with about the same number of tokens, as indices.

    Each tree, from the longest to the shortest, is added to the part with the fewest tokens.
    """
    shares: list[list[int]] = [[] for _ in range(parts)]
    tokens = [0] * parts
    for index in sorted(range(len(trees)), key=lambda index: (-len(trees[index]), index)):
        smallest = tokens.index(min(tokens))
        shares[smallest].append(index)
        tokens[smallest] += len(trees[index])
    return [sorted(indices) for indices in shares]
