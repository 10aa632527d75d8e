"""Self-play fine-tuning (SPIN, arXiv 2401.01335) of language models."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from spinlm.errors import SpinError

if TYPE_CHECKING:
    from spinlm.chat import respond
    from spinlm.distributed.progress import show_progress
    from spinlm.recipe.load import load_recipe
    from spinlm.recipe.schema import Recipe
    from spinlm.report.page import write_report
    from spinlm.report.players_table import compare
    from spinlm.report.summary import results, verdict
    from spinlm.rundir.layout import RunDir
    from spinlm.selfplay import run

__all__ = [
    "Recipe",
    "RunDir",
    "SpinError",
    "__version__",
    "compare",
    "load_recipe",
    "respond",
    "results",
    "run",
    "show_progress",
    "verdict",
    "write_report",
]

_MODULES = {
    "Recipe": "recipe.schema",
    "RunDir": "rundir.layout",
    "compare": "report.players_table",
    "load_recipe": "recipe.load",
    "respond": "chat",
    "results": "report.summary",
    "run": "selfplay",
    "show_progress": "distributed.progress",
    "verdict": "report.summary",
    "write_report": "report.page",
}


def __getattr__(name: str) -> Any:
    """Names that bring pydantic or torch are imported when they are asked for."""
    if name in _MODULES:
        return getattr(import_module(f"spinlm.{_MODULES[name]}"), name)
    if name == "__version__":
        return version("spinlm")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
