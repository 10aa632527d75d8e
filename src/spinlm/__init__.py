"""Self-play fine-tuning (SPIN, arXiv 2401.01335) of language models."""

from typing import TYPE_CHECKING, Any

from spinlm.config import Recipe
from spinlm.errors import SpinError
from spinlm.recipe import load_recipe

if TYPE_CHECKING:
    from spinlm.selfplay import run

__all__ = ["Recipe", "SpinError", "__version__", "load_recipe", "run"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "run":  # brings torch, so only when it is asked for
        from spinlm.selfplay import run

        return run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
