"""Training in several processes with DeepSpeed: ZeRO-2 divides gradients and optimiser state, ZeRO-3 weights, too.

After arXiv 1910.02054. A step's gradient is what a single process would have computed, as with `parallel`.
"""

import contextlib
import copy
import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from spinlm.errors import MissingPackageError
from spinlm.model.loading import quieten_deepspeed
from spinlm.model.logprobs import LogProbs
from spinlm.training.parallel import OptimizerState, Parallel


def check_deepspeed() -> None:
    """Make sure that DeepSpeed can be used.

    Raises:
        MissingPackageError: it is not installed, or cannot be loaded.
    """
    _deepspeed()


def _deepspeed() -> Any:
    quieten_deepspeed()
    try:
        import deepspeed
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"train.sharding: zero-2 and zero-3 need a package that is not installed ({error.name}). "
            "Run: pip install 'spinlm[deepspeed]', or set train.sharding: full, which needs none"
        ) from error
    except Exception as error:  # what it looks for in a CUDA installation, it may miss in many ways
        raise MissingPackageError(
            f"train.sharding: DeepSpeed is installed, but cannot be loaded: {error}. Set train.sharding: full, which "
            "does the same without it"
        ) from error
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__ = {}  # kernels that it would compile when first used, for a minute
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


class Zero(Parallel):
    """The model divided over the processes by DeepSpeed. Its own optimisers and configuration files are not used: the
    recipe says what is done."""

    divided = True

    def __init__(self, logprobs: LogProbs, stage: int):
        """
        Args:
            logprobs: with the same weights in every process.
            stage: 2 or 3.
        """
        self._logprobs, self._stage = logprobs, stage

    def begin(self, optimizer: torch.optim.Optimizer, max_grad_norm: float, state: OptimizerState) -> None:
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # of which it makes nothing: a step's end is what we say
            "gradient_accumulation_steps": 1,
            "gradient_clipping": max_grad_norm,
            "zero_optimization": {"stage": self._stage},
            "zero_allow_untested_optimizer": True,
        }
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.optimizer = optimizer
        self.module, *_ = _deepspeed().initialize(model=self._logprobs, optimizer=optimizer, config=settings)
        if state:
            self._set(state)

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        self.module.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self.module.backward(loss)

    def step(self, sound: bool) -> float:
        if not sound:
            return math.nan  # it measures the gradients only to take a step
        self.module.step()
        return float(self.module.get_global_grad_norm())

    def whole(self, tensor: Tensor) -> Tensor | None:
        from deepspeed.utils import safe_get_full_fp32_param

        trained = tensor.requires_grad
        return super().whole(safe_get_full_fp32_param(tensor).to(tensor.dtype) if trained else tensor)

    def state(self) -> OptimizerState:
        from deepspeed.utils import safe_get_full_optimizer_state

        first = self.optimizer.state[self._flat()[0]]
        state: OptimizerState = {}
        for index, parameter in enumerate(self._parameters):
            state[index] = {}
            for key, value in first.items():
                if isinstance(value, Tensor):
                    full = safe_get_full_optimizer_state(parameter, key) if _by_element(value) else value.clone()
                    value = super().whole(full)
                state[index][key] = value
        return state

    def _set(self, state: OptimizerState) -> None:
        """Take over an optimiser's state, of which DeepSpeed keeps flat parts."""
        from deepspeed.utils import safe_set_full_optimizer_state

        for flat in self._flat():
            self.optimizer.state[flat] = {
                key: torch.zeros_like(flat) if _by_element(value) else copy.deepcopy(value)
                for key, value in state[0].items()
            }
        if self._stage == 2:
            self.module.optimizer._lazy_init_hp_params_optimizer_state()
        for index, parameter in enumerate(self._parameters):
            for key, value in state[index].items():
                if _by_element(value):
                    safe_set_full_optimizer_state(parameter, value, key)

    def _flat(self) -> list[Tensor]:
        """This process's parts of what is trained, one after the other, as the optimiser sees them."""
        zero = self.module.optimizer
        parts = zero.single_partition_of_fp32_groups if self._stage == 2 else zero.fp32_partitioned_groups_flat
        return list(parts)

    def end(self) -> None:
        self.module.destroy()


def _by_element(value: Any) -> bool:
    """Whether a value of an optimiser's state has a number for each of a weight's, and is divided as that is."""
    return isinstance(value, Tensor) and value.dim() > 0
