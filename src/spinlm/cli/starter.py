"""The recipe and the example data that `spinlm init` writes."""

from importlib.resources import files
from pathlib import Path

from spinlm.utils.atomic import atomic_file, write_text

EXAMPLE_DATA = "data.jsonl"  # the value of data.path in the template


def template() -> str:
    """Return a complete recipe with comments, to be edited."""
    return files("spinlm.cli").joinpath("starter.yaml").read_text(encoding="utf-8")


def write_template(path: Path) -> Path | None:
    """Write the template, and its example data into the same folder.

    Returns:
        The data file; None if a file with that name is already there, which is left alone.
    """
    write_text(path, template())
    data = path.parent / EXAMPLE_DATA
    if data.exists():
        return None
    with atomic_file(data) as file:
        file.write(files("spinlm.cli").joinpath("starter.jsonl").read_bytes())
    return data
