"""Arguments and options that several commands share, and what the commands do with them."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spinlm.rundir.layout import RunDir

if TYPE_CHECKING:
    from spinlm.recipe.schema import Recipe


def _set_quiet(quiet: bool) -> bool:
    if quiet:
        root = logging.getLogger()
        root.setLevel(max(root.level, logging.WARNING))
    return quiet


RecipePath = Annotated[
    Path, typer.Argument(help="Read this recipe, a YAML file. `spinlm init` writes one.", show_default=False)
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Change settings of the recipe: section.key=value.", show_default=False)
]
RunPath = Annotated[Path, typer.Argument(help="Use this run folder.", show_default=False)]
RunDirOption = Annotated[Path | None, typer.Option(help="Use this run folder. The default is runs/NAME-OF-RECIPE.")]
Iteration = Annotated[int, typer.Option(help="Choose the iteration. The first one is 0.", show_default=False)]
PlayersOption = Annotated[
    str, typer.Option("--iteration", help="Choose players: numbers, `start` or `best`, separated by commas.")
]
Baseline = Annotated[
    Path | None, typer.Option(help="Compare with this run, after the last iteration that both have finished.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings and the result.", callback=_set_quiet)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def load_recipe_file(path: Path, overrides: list[str] | None) -> "Recipe":
    """Load a recipe and apply the overrides of the command line."""
    from spinlm.recipe.load import load_recipe

    return load_recipe(path, overrides or ())


def run_folder(recipe: Path, run_dir: Path | None) -> Path:
    """Return the run folder of a recipe: `--run-dir`, or a folder in runs/ with the recipe's name."""
    return run_dir or Path("runs") / recipe.stem


def read_run(path: Path) -> tuple[RunDir, "Recipe"]:
    """Open a run folder and read its recipe.

    Raises:
        RunError: the folder holds no run, or the recipe is damaged.
    """
    from spinlm.recipe.load import parse_recipe
    from spinlm.rundir.provenance import read_recipe

    folder = RunDir(path)
    return folder, parse_recipe(read_recipe(folder), str(folder.recipe))


def parse_players(folder: RunDir, names: str) -> list[int]:
    """Return the iterations of the players that `--iteration` names, each once.

    Raises:
        RunError: the run has no such player.
    """
    from spinlm.rundir.player_names import parse_player

    return list(dict.fromkeys(parse_player(folder, name.strip()) for name in names.split(",")))
