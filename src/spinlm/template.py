"""The recipe that `spinlm init` writes."""

from importlib.resources import files


def template() -> str:
    """A complete recipe with comments, to be edited."""
    return files("spinlm").joinpath("template.yaml").read_text(encoding="utf-8")
