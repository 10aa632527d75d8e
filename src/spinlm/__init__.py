"""Self-play fine-tuning (SPIN, arXiv 2401.01335) of language models."""

from typing import TYPE_CHECKING, Any

from spinlm.errors import SpinError

if TYPE_CHECKING:
    from spinlm.config import Recipe
    from spinlm.recipe import load_recipe
    from spinlm.selfplay import run

__all__ = ["Recipe", "SpinError", "__version__", "load_recipe", "run"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Names that bring pydantic or torch are imported when they are asked for."""
    if name == "Recipe":
        from spinlm.config import Recipe

        return Recipe
    if name == "load_recipe":
        from spinlm.recipe import load_recipe

        return load_recipe
    if name == "run":
        from spinlm.selfplay import run

        return run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
