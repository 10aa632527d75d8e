"""What a run was made from: its recipe, versions, command line and machine."""

import datetime
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from spinlm.distributed import processes
from spinlm.errors import RunError
from spinlm.recipe.load import parse_yaml
from spinlm.recipe.schema import Recipe
from spinlm.rundir.layout import RunDir
from spinlm.utils.atomic import read_json

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "numpy")


def read_recipe(folder: RunDir) -> dict[str, Any]:
    """Read a run's recipe as plain data. Imports no torch.

    Raises:
        RunError: the folder holds no run, or the recipe has changed since the run began.
    """
    if not folder.is_run():
        raise RunError(f"{folder.root}: no run here. `spinlm run RECIPE` makes one")
    if not folder.recipe.exists() or not folder.is_unchanged(folder.recipe):
        raise RunError(
            f"{folder.recipe}: has changed since the run began. Undo the change, or restore the file: "
            "`spinlm run` with the original recipe writes it again"
        )
    values: dict[str, Any] = parse_yaml(folder.recipe.read_text(encoding="utf-8"), str(folder.recipe))
    return values


def recorded_inputs(folder: RunDir) -> dict[str, Any]:
    """Return the digests and commits of "model" and "data" that the run began with; empty for a new run."""
    values = read_json(folder.provenance) if folder.provenance.exists() else {}
    inputs: dict[str, Any] = values.get("inputs", {}) if isinstance(values, dict) else {}
    return inputs


def pin_model(recipe: Recipe, folder: RunDir) -> Recipe:
    """Set the revisions of a hub model and its base to the commits that the run began with: branches move."""
    recorded = recorded_inputs(folder).get("model", {})
    commits = {"revision": recorded.get("commit"), "base_revision": recorded.get("base", {}).get("commit")}
    update = {name: commit for name, commit in commits.items() if commit}
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=update)})


def current_provenance() -> dict[str, Any]:
    """Return versions, command line and machine of this process."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "spinlm": importlib.metadata.version("spinlm"),
        "commit": _git_commit(),
        "command": sys.argv,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "processes": processes.world_size(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _git_commit() -> str | None:
    """Return the commit of spinlm; None if spinlm does not run from its own checkout."""
    checkout = Path(__file__).parents[3]
    if not (checkout / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # git is not installed
        return None
