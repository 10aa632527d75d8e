"""Checkpoints of an unfinished training: everything that the next step depends on.

step-NNNNNN/  weights.safetensors  optimizer.safetensors  state.json
"""

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from spinlm.distributed import processes
from spinlm.errors import RunError, TrainingError
from spinlm.model.loading import non_finite_weights
from spinlm.model.players import Players
from spinlm.training.parallel import DDPStrategy, OptimizerState
from spinlm.utils.atomic import atomic_path, file_digest, read_json, short_digest, write_json

log = logging.getLogger("spinlm")

_FILES = ("weights.safetensors", "optimizer.safetensors")


def save_checkpoint(folder: Path, players: Players, strategy: DDPStrategy, step: int) -> None:
    """Save the state after `step` complete steps, then remove older checkpoints.

    Another number of processes can resume from the checkpoint.

    Raises:
        TrainingError: a weight is NaN or infinite.
    """
    tensors: dict[str, Any] = {}
    scalars: dict[str, Any] = {}
    for index, state in strategy.optimizer_state().items():
        for key, value in state.items():
            target = tensors if value is None or isinstance(value, Tensor) else scalars
            target[f"{index}.{key}"] = value
    weights = strategy.full_tensors(dict(players.parameters()))
    processes.on_rank_zero(_write, folder, step, weights, tensors, scalars)


def _write(folder: Path, step: int, weights: dict[str, Any], tensors: dict[str, Any], scalars: dict[str, Any]) -> None:
    target = folder / f"step-{step:06d}"
    if names := non_finite_weights(weights.items()):
        kept = newest_checkpoint(folder)
        raise TrainingError(
            f"{target}: not saved: {names}. "
            + (f"The last good checkpoint is {kept}" if kept else "There is no checkpoint yet")
            + ". Lower train.learning_rate, or compute in model.dtype: float32, and run in another --run-dir"
        )
    with atomic_path(target) as temporary:
        temporary.mkdir()
        save_file(weights, temporary / "weights.safetensors")
        save_file(tensors, temporary / "optimizer.safetensors")
        digests = {name: file_digest(temporary / name) for name in _FILES}  # safetensors files hold no checksum
        state = {"step": step, "optimizer": scalars, "files": digests}
        write_json(temporary / "state.json", state | {"sum": short_digest(state)})
    _remove_others(folder, target.name)


def _remove_others(folder: Path, kept: str) -> None:
    for other in folder.glob("step-*"):
        if other.name != kept:
            shutil.rmtree(other)


def _remove_partial(folder: Path) -> None:
    """Remove a checkpoint that was being written when the process was killed."""
    for partial in folder.glob(".step-*.tmp"):
        shutil.rmtree(partial)


def load_checkpoint(folder: Path, players: Players) -> tuple[int, OptimizerState]:
    """Load the weights of the newest checkpoint in a folder, if there is one.

    Returns:
        The number of complete steps and the state of the optimizer; (0, {}) if there is no checkpoint.

    Raises:
        RunError: the checkpoint is damaged.
    """
    name = processes.on_rank_zero(_newest_name, folder)
    processes.on_rank_zero(_remove_partial, folder)
    if name is None:
        return 0, {}
    path = folder / name
    try:
        saved = processes.on_rank_zero(_read_state, path)
        weights = load_file(path / "weights.safetensors")
        tensors: dict[str, Any] = dict(load_file(path / "optimizer.safetensors"))
        if names := non_finite_weights([*weights.items(), *tensors.items()]):
            raise RunError(names)
        with torch.no_grad():
            for name, parameter in players.parameters():
                parameter.copy_(weights[name])
    except (OSError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise RunError(
            f"{path}: damaged checkpoint ({error}). Delete it and run again: training starts over"
        ) from error
    state: OptimizerState = {}
    for name, value in {**tensors, **saved["optimizer"]}.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    processes.on_rank_zero(
        _remove_others, folder, path.name
    )  # older ones remain if the process was killed after saving
    log.info("resuming after step %d", saved["step"])
    return int(saved["step"]), state


def _read_state(checkpoint: Path) -> dict[str, Any]:
    """Read state.json of a checkpoint, and verify the digests of all its files.

    Raises:
        RunError: a file has changed since it was written.
    """
    state: dict[str, Any] = read_json(checkpoint / "state.json")
    if state.pop("sum") != short_digest(state):
        raise RunError("state.json has changed since it was written")
    for name in _FILES:
        if state["files"][name] != file_digest(checkpoint / name):
            raise RunError(f"{name} has changed since it was written")
    return state


def _newest_name(folder: Path) -> str | None:
    path = newest_checkpoint(folder)
    return path.name if path else None


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint in a folder; None if there is none."""
    return max(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")), default=None)
