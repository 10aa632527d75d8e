"""Extrapolate: move the weights of a trained player further away from the start (ExPO, arXiv 2404.16792).

The new weights are θ_0 + W (θ − θ_0) = (1 − W) θ_0 + W θ. For LoRA, θ_0 and θ are adapters B_0 A_0 and B A over one
base, with one scale. The new adapter is [(1 − W) B_0, W B] [A_0; A]: exact, with twice the rank.
"""

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from spinlm.errors import ModelError
from spinlm.recipe.adapter import ADAPTER_CONFIG
from spinlm.utils.atomic import read_json, write_json

RANK_AXIS = {"lora_A": 0, "lora_embedding_A": 0, "lora_B": 1, "lora_embedding_B": 1}
"""The axis of the rank in the tensors of a LoRA adapter, by a part of their names."""


def extrapolate(start: Path, trained: Path, factor: float, target: Path) -> None:
    """Write the player (1 − W) θ_0 + W θ, file by file. All other files are those of θ.

    Args:
        start: the folder of θ_0.
        trained: the folder of θ.
        factor: W.
        target: the folder to write.

    Raises:
        ModelError: θ_0 lacks a weight of θ, or has it in another shape.
    """
    shutil.copytree(trained, target, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    places = {name: path for path in sorted(start.glob("*.safetensors")) for name in _names(path)}
    for path in sorted(trained.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors = {name: _combine(name, places, file.get_tensor(name), factor) for name in _names(path)}
            save_file(tensors, target / path.name, metadata=file.metadata())
    if (config := target / ADAPTER_CONFIG).exists():
        values = read_json(config)
        write_json(config, values | double_rank(values))


def double_rank(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a LoRA adapter with twice the rank and the same scale (alpha / r, or alpha / √r)."""
    scale = math.sqrt(2) if config.get("use_rslora") else 2
    factors = {"r": 2, "lora_alpha": scale, "rank_pattern": 2, "alpha_pattern": scale}
    return {name: _times(config[name], by) for name, by in factors.items() if config.get(name)}


def pad_rank(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    """Pad a tensor of a LoRA adapter with zeros to a shape with a larger rank. The adapter's output stays the same."""
    axis = _rank_axis(name)
    if axis is None or tensor.shape == shape:
        return tensor
    zeros = list(tensor.shape)
    zeros[axis] = shape[axis] - tensor.shape[axis]
    return torch.cat([tensor, tensor.new_zeros(zeros)], dim=axis)


def _times(value: Any, factor: float) -> Any:
    return {name: one * factor for name, one in value.items()} if isinstance(value, dict) else value * factor


def _names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _rank_axis(name: str) -> int | None:
    return next((axis for part, axis in RANK_AXIS.items() if part in name.split(".")), None)


def _combine(name: str, places: dict[str, Path], trained: Tensor, factor: float) -> Tensor:
    """Return the new value of a weight; `places` are the files of θ_0's weights."""
    if name not in places:
        raise ModelError(f"{name}: the start has no such weight, so it cannot be extrapolated")
    with safe_open(places[name], framework="pt") as file:
        start = file.get_tensor(name)
    if start.shape != trained.shape:
        raise ModelError(f"{name}: has shape {list(trained.shape)}, but {list(start.shape)} in the start")
    axis = _rank_axis(name)
    if axis == 0:  # A
        return torch.cat([start, trained]).contiguous()
    if not trained.is_floating_point():
        return trained
    parts = (1 - factor) * start.float(), factor * trained.float()
    both = torch.cat(parts, dim=1) if axis == 1 else parts[0] + parts[1]
    return both.to(trained.dtype).contiguous()
