"""Self-play fine-tuning (SPIN, arXiv 2401.01335) of language models."""

from typing import TYPE_CHECKING, Any

from spinlm.errors import SpinError

if TYPE_CHECKING:
    from spinlm.recipe.load import load_recipe
    from spinlm.recipe.schema import Recipe
    from spinlm.selfplay import run

__all__ = ["Recipe", "SpinError", "__version__", "load_recipe", "run"]


def __getattr__(name: str) -> Any:
    """Names that bring pydantic or torch are imported when they are asked for."""
    if name == "Recipe":
        from spinlm.recipe.schema import Recipe

        return Recipe
    if name == "load_recipe":
        from spinlm.recipe.load import load_recipe

        return load_recipe
    if name == "run":
        from spinlm.selfplay import run

        return run
    if name == "__version__":
        from importlib.metadata import version

        return version("spinlm")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
