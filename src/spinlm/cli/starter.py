"""`spinlm init`: write a starter recipe and example data."""

from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from spinlm.errors import SpinError
from spinlm.utils.atomic import atomic_file, write_text

EXAMPLE_DATA = "data.jsonl"  # the file that starter.yaml names


def init(
    path: Annotated[Path, typer.Argument(help="Write this file.")] = Path("recipe.yaml"),
) -> None:
    """Write a starter recipe and example data.

    The recipe runs unchanged. Replace model.path and data.path by your own.
    """
    if path.exists():
        raise SpinError(f"{path}: already exists. Choose another file")
    data = write_starter(path)
    example = f" and {data} (example data)" if data else ""
    print(f"wrote {path}{example}. Set model.path and data.path to yours, then run: spinlm plan {path}")


def starter_recipe() -> str:
    """Return the text of the starter recipe."""
    return files("spinlm.cli").joinpath("starter.yaml").read_text(encoding="utf-8")


def write_starter(path: Path) -> Path | None:
    """Write the starter recipe, and example data into the same folder unless a data file exists.

    Returns:
        The data file that was written, or None.
    """
    write_text(path, starter_recipe())
    data = path.parent / EXAMPLE_DATA
    if data.exists():
        return None
    with atomic_file(data) as file:
        file.write(files("spinlm.cli").joinpath("starter.jsonl").read_bytes())
    return data
