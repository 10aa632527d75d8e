"""Checkpoints of training: all that the next step depends on.

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
from spinlm.training.parallel import OptimizerState
from spinlm.utils.atomic import atomic_path, file_digest, read_json, short_digest, write_json

log = logging.getLogger("spinlm")

_FILES = ("weights.safetensors", "optimizer.safetensors")


def save_checkpoint(folder: Path, players: Players, step: int) -> None:
    """Save the state after so many complete steps, then remove older ones. Whoever goes on from it, the number of
    processes may be another."""
    parallel = players.parallel()
    tensors: dict[str, Any] = {}
    scalars: dict[str, Any] = {}
    for index, state in parallel.state().items():
        for key, value in state.items():
            kept = tensors if value is None or isinstance(value, Tensor) else scalars
            kept[f"{index}.{key}"] = value
    weights = {name: parallel.whole(parameter) for name, parameter in players.parameters()}
    processes.on_rank_zero(_write, folder, step, weights, tensors, scalars)


def _write(folder: Path, step: int, weights: dict[str, Any], tensors: dict[str, Any], scalars: dict[str, Any]) -> None:
    target = folder / f"step-{step:06d}"
    if names := non_finite_weights(weights.items()):
        kept = newest(folder)
        raise TrainingError(
            f"{target}: not saved: {names}. "
            + (f"The last good checkpoint is {kept}" if kept else "No checkpoint had been made yet")
            + ". Lower train.learning_rate, or compute in model.dtype: float32, and run in another --run-dir"
        )
    with atomic_path(target) as temporary:
        temporary.mkdir()
        save_file(weights, temporary / "weights.safetensors")
        save_file(tensors, temporary / "optimizer.safetensors")
        digests = {name: file_digest(temporary / name) for name in _FILES}  # safetensors has none
        noted = {"step": step, "optimizer": scalars, "files": digests}
        write_json(temporary / "state.json", noted | {"sum": short_digest(noted)})
    _remove_others(folder, target.name)


def _remove_others(folder: Path, kept: str) -> None:
    for other in folder.glob("step-*"):
        if other.name != kept:
            shutil.rmtree(other)


def _remove_unfinished(folder: Path) -> None:
    """What an end has left that came while a checkpoint was saved."""
    for half in folder.glob(".step-*.tmp"):
        shutil.rmtree(half)


def resume(folder: Path, players: Players) -> tuple[int, OptimizerState]:
    """Load the weights of the newest checkpoint of a folder, if there is one.

    Returns:
        The number of complete steps, and the optimiser's state.

    Raises:
        RunError: it is damaged.
    """
    name = processes.on_rank_zero(_newest_name, folder)
    processes.on_rank_zero(_remove_unfinished, folder)
    if name is None:
        return 0, {}
    found = folder / name
    try:
        noted = processes.on_rank_zero(_state, found)
        weights = load_file(found / "weights.safetensors")
        tensors: dict[str, Any] = dict(load_file(found / "optimizer.safetensors"))
        if names := non_finite_weights([*weights.items(), *tensors.items()]):
            raise RunError(names)
        with torch.no_grad():
            for name, parameter in players.parameters():
                parameter.copy_(weights[name])
    except (OSError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise RunError(
            f"{found}: damaged checkpoint ({error}). Delete it and run again: training starts over"
        ) from error
    state: OptimizerState = {}
    for name, value in {**tensors, **noted["optimizer"]}.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    processes.on_rank_zero(_remove_others, folder, found.name)  # which an end right after it was saved has left
    log.info("resuming after step %d", noted["step"])
    return int(noted["step"]), state


def _state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint notes, once it is clear that nothing in it has changed.

    Raises:
        RunError: something has.
    """
    noted: dict[str, Any] = read_json(checkpoint / "state.json")
    if noted.pop("sum") != short_digest(noted):
        raise RunError("state.json has changed since it was written")
    for name in _FILES:
        if noted["files"][name] != file_digest(checkpoint / name):
            raise RunError(f"{name} has changed since it was written")
    return noted


def _newest_name(folder: Path) -> str | None:
    found = newest(folder)
    return found.name if found else None


def newest(folder: Path) -> Path | None:
    """The newest checkpoint of a folder."""
    return max(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")), default=None)
