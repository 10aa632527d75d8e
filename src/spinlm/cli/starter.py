"""The recipe that `spinlm init` writes."""

from importlib.resources import files
from pathlib import Path

from spinlm.data.demo import write_demo
from spinlm.utils.atomic import atomic_path, write_text

EXAMPLE_DATA = "data.jsonl"  # what the template names
EXAMPLE_ROWS = 256


def template() -> str:
    """A complete recipe with comments, to be edited."""
    return files("spinlm.cli").joinpath("starter.yaml").read_text(encoding="utf-8")


def write_template(path: Path) -> Path | None:
    """Write the template, and the data it names beside it, unless there are some; returns what data were written."""
    write_text(path, template())
    data = path.parent / EXAMPLE_DATA
    if data.exists():
        return None
    with atomic_path(data) as temporary:
        write_demo(temporary, EXAMPLE_ROWS)
    return data
