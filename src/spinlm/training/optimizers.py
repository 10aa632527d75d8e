"""Optimisers by the name that a recipe gives: any of torch.optim that does with a learning rate and weight decay."""

from collections.abc import Iterable
from typing import Any

import torch

from spinlm.errors import RecipeError


def find_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """The optimiser of torch.optim with a name, in any case.

    Raises:
        RecipeError: there is none.
    """
    known = {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    if name.lower() not in known:
        raise RecipeError(f"optimizer: no {name!r} in torch.optim; known: {', '.join(sorted(known))}")
    return known[name.lower()]


def check_optimizer(name: str, weight_decay: float, where: str) -> None:
    """Try an optimiser on a small matrix, so that one that cannot be used is told before hours of other work.

    Args:
        name: of the optimiser.
        weight_decay: the recipe's.
        where: the recipe's field that names it, for the message.

    Raises:
        RecipeError: there is no such optimiser, or it needs what training does not give (settings, a closure, …).
    """
    make: Any = find_optimizer(name)
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
    """A fresh optimiser.

    Raises:
        RecipeError: there is none of this name, or it takes other settings than a learning rate and weight decay.
    """
    make: Any = find_optimizer(name)
    try:
        optimizer: torch.optim.Optimizer = make(list(parameters), lr=learning_rate, weight_decay=weight_decay)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"optimizer {name}: {error}; choose another, such as adamw or rmsprop") from error
    return optimizer
