"""Optimizers by name: any of torch.optim that needs only a learning rate and a weight decay."""

from collections.abc import Iterable
from typing import Any

import torch

from spinlm.errors import RecipeError


def find_optimizer(name: str, where: str = "optimizer") -> type[torch.optim.Optimizer]:
    """Return the optimizer class of torch.optim with this name; case does not matter.

    Raises:
        RecipeError: torch.optim has no such optimizer.
    """
    known = {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    if name.lower() not in known:
        raise RecipeError(f"{where}: no {name!r} in torch.optim; known: {', '.join(sorted(known))}")
    return known[name.lower()]


def check_optimizer(name: str, weight_decay: float, where: str) -> None:
    """Try an optimizer on a small matrix, so that an unusable optimizer fails before hours of other work.

    Args:
        name: the name of the optimizer.
        weight_decay: the weight decay of the recipe.
        where: the recipe field that names the optimizer, for the message.

    Raises:
        RecipeError: there is no such optimizer, or it needs more than training passes (settings, a closure, …).
    """
    make: Any = find_optimizer(name, where)
    weight = torch.nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    try:
        make([weight], lr=1e-3, weight_decay=weight_decay).step()
    except (TypeError, ValueError, RuntimeError) as error:
        raise RecipeError(
            f"{where}: {name} cannot be used: {error}; choose another, such as adamw or rmsprop"
        ) from error


def make_optimizer(
    name: str, parameters: Iterable[torch.nn.Parameter], learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Make a new optimizer.

    Raises:
        RecipeError: there is no such optimizer, or it does not take a learning rate and a weight decay.
    """
    make: Any = find_optimizer(name)
    try:
        optimizer: torch.optim.Optimizer = make(list(parameters), lr=learning_rate, weight_decay=weight_decay)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"optimizer {name}: {error}; choose another, such as adamw or rmsprop") from error
    return optimizer
