"""Training in several processes: each has the whole model (DDP), or all of them have one between them (FSDP2).

With DDP (arXiv 2006.15704) each process keeps everything and gradients are averaged once a step. With FSDP2 (PyTorch's
`fully_shard`, after arXiv 2304.11277) weights, gradients and optimiser state are divided: each layer is gathered when
it is needed and let go of afterwards. Either way a step's gradient is what a single process would have computed.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spinlm.distributed import processes
from spinlm.model.logprobs import LogProbs
from spinlm.model.prefix_trees import PrefixTree

OptimizerState = dict[int, dict[str, Any]]
"""By the number of the parameter, as a state dict of torch.optim has it; tensors are whole."""


class Parallel:
    """A model as the processes train it together, each with all of it; on its own, the model."""

    divided = False
    """Whether weights or gradients are divided over the processes: all then run equally often, and whoever needs a
    whole tensor has to ask for it."""

    module: Any

    def __init__(self, logprobs: LogProbs, accelerator: Any):
        """
        Args:
            logprobs: with the same weights in every process.
            accelerator: wraps the model for DDP.
        """
        self.module = accelerator.prepare_model(logprobs)

    def begin(self, optimizer: torch.optim.Optimizer, max_grad_norm: float, state: OptimizerState) -> None:
        """Take an optimiser over the module's parameters, and the state to go on from, which may be empty."""
        self.optimizer, self.max_grad_norm = optimizer, max_grad_norm
        optimizer.zero_grad()  # of a fit that failed in this process
        if state:
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Forward and backward of one of a step's micro-batches. Gradients are exchanged with the last one."""
        with contextlib.nullcontext() if processes.world_size() == 1 or last else self.module.no_sync():
            yield

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients."""
        loss.backward()

    def step(self, sound: bool) -> float:
        """Scale the gradients down to the largest norm allowed, and take the optimiser's step.

        Args:
            sound: whether the loss was finite. If it was not, or the gradients are not, no step is taken.

        Returns:
            The norm that the gradients had.
        """
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        total: Any = nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        norm = float(total.full_tensor() if hasattr(total, "full_tensor") else total)
        if sound and math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def whole(self, tensor: Tensor) -> Tensor | None:
        """One of the module's tensors or the optimiser's, whole and in the first process's memory; None in the others.

        All processes call this for the same tensors in the same order.
        """
        return tensor.detach().cpu().contiguous() if processes.is_main_process() else None

    def state(self) -> OptimizerState:
        """The optimiser's state, with whole tensors in the first process."""
        return {
            index: {key: self.whole(value) if isinstance(value, Tensor) else value for key, value in state.items()}
            for index, state in self.optimizer.state_dict()["state"].items()
        }

    def end(self) -> None:
        """Before the model is let go of."""


class Sharded(Parallel):
    """The model divided over the processes by FSDP2. Gradients are exchanged in each micro-batch, since nobody has room
    for all of them."""

    divided = True

    def __init__(self, logprobs: LogProbs, *, again: bool):
        """
        Args:
            logprobs: with the same weights in every process; its parameters are replaced.
            again: weights are gathered `again` for backward, or stay from forward on.
        """
        from torch.distributed.fsdp import fully_shard

        layers = set(getattr(logprobs.causal_lm, "_no_split_modules", None) or ())
        for module in logprobs.causal_lm.modules():
            if type(module).__name__ in layers:
                fully_shard(module, reshard_after_forward=again)
        # The rest (embeddings, head, last norm) is one group, gathered for the whole of forward and backward: the head
        # is read outside its own forward.
        self.module = fully_shard(logprobs, reshard_after_forward=False)

    def begin(self, optimizer: torch.optim.Optimizer, max_grad_norm: float, state: OptimizerState) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for index, values in state.items():
            like = parameters[index]
            for key, value in values.items():
                if isinstance(value, Tensor) and value.shape == like.shape:
                    values[key] = _divide(value, like)
        super().begin(optimizer, max_grad_norm, state)

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        yield

    def whole(self, tensor: Tensor) -> Tensor | None:
        return super().whole(tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor)


def _divide(full: Tensor, like: Any) -> Tensor:
    """A whole tensor, divided over the processes as another one is."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def totals(values: dict[str, float]) -> dict[str, float]:
    """The sum of each value over the processes."""
    if processes.world_size() == 1:
        return values
    import torch.distributed as dist

    sums = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(sums)
    return dict(zip(values, sums.tolist(), strict=True))


def share(trees: Sequence[PrefixTree], processes: int) -> list[list[int]]:
    """Divide trees over processes, as indices: the longest first, each to whoever has the least to do."""
    shares: list[list[int]] = [[] for _ in range(processes)]
    loads = [0] * processes
    for index in sorted(range(len(trees)), key=lambda index: (-len(trees[index]), index)):
        least = loads.index(min(loads))
        shares[least].append(index)
        loads[least] += len(trees[index])
    return [sorted(indices) for indices in shares]
