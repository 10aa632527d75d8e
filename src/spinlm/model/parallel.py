"""Training in several processes: each has the whole model (DDP), or all of them have one between them (FSDP2).

With DDP (arXiv 2006.15704) each process keeps everything and gradients are averaged once a step. With FSDP2 (PyTorch's
`fully_shard`, after arXiv 2304.11277) weights, gradients and optimiser state are divided: each layer is gathered when
it is needed and let go of afterwards. Either way a step's gradient is what a single process would have computed.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spinlm import team
from spinlm.model.logprobs import LogProbs
from spinlm.model.trees import Tree


class Parallel:
    """A model as the processes train it together; on its own, the model."""

    def __init__(self, logprobs: LogProbs, sharding: str, accelerator: Any):
        """
        Args:
            logprobs: with the same weights in every process. Where they are divided, its parameters are replaced.
            sharding: the recipe's `train.sharding`.
            accelerator: wraps the model for DDP.
        """
        self.sharded = sharding != "none" and team.size() > 1
        self.module: Any = (
            _shard(logprobs, again=sharding == "full") if self.sharded else accelerator.prepare_model(logprobs)
        )

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Forward and backward of one of a step's micro-batches. DDP exchanges gradients with the last one; where they
        are divided they are exchanged each time, since nobody has room for all of them."""
        alone = team.size() == 1
        with contextlib.nullcontext() if alone or self.sharded or last else self.module.no_sync():
            yield

    def clip(self, parameters: Sequence[nn.Parameter], most: float) -> float:
        """Scale the gradients down to a norm; returns what it was."""
        norm = nn.utils.clip_grad_norm_(parameters, most)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def _shard(logprobs: LogProbs, *, again: bool) -> Any:
    """Divide the weights; they are gathered `again` for backward, or stay from forward on."""
    from torch.distributed.fsdp import fully_shard

    layers = set(getattr(logprobs.causal, "_no_split_modules", None) or ())
    for module in logprobs.causal.modules():
        if type(module).__name__ in layers:
            fully_shard(module, reshard_after_forward=again)
    # The rest (embeddings, head, last norm) is one group, gathered for the whole of forward and backward: the head is
    # read outside its own forward.
    return fully_shard(logprobs, reshard_after_forward=False)


def whole(tensor: Tensor) -> Tensor | None:
    """A tensor that may be divided over the processes, whole and in the first one's memory; None in the others.

    All processes call this for the same tensors in the same order.
    """
    tensor = tensor.detach()
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.cpu().contiguous() if team.is_first() else None


def like(full: Tensor, target: Tensor) -> Tensor:
    """A whole tensor, divided over the processes as another one is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(target, DTensor):
        return full.to(target.device)
    return distribute_tensor(full.to(target.device), target.device_mesh, target.placements, src_data_rank=None)


def totals(values: dict[str, float]) -> dict[str, float]:
    """The sum of each value over the processes."""
    if team.size() == 1:
        return values
    import torch.distributed as dist

    sums = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(sums)
    return dict(zip(values, sums.tolist(), strict=True))


def share(trees: Sequence[Tree], processes: int, cost: Callable[[Tree], int] = len) -> list[list[int]]:
    """Divide trees over processes, as indices: the longest first, each to whoever has the least to do."""
    shares: list[list[int]] = [[] for _ in range(processes)]
    loads = [0] * processes
    for index in sorted(range(len(trees)), key=lambda index: (-cost(trees[index]), index)):
        least = loads.index(min(loads))
        shares[least].append(index)
        loads[least] += cost(trees[index])
    return [sorted(indices) for indices in shares]
