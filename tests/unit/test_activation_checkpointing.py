"""What a step keeps, measured, and gradient checkpointing where it would not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from models import save_tiny_model, tiny_recipe
from spinlm.model.players import Players
from spinlm.plan.model_shape import shape_from_config
from spinlm.recipe.model import Lora
from spinlm.rundir.layout import RunDir
from spinlm.training import activation_checkpointing
from spinlm.training.activation_checkpointing import (
    free_bytes,
    saved_activation_bytes,
    set_activation_checkpointing,
    switch_activation_checkpointing,
)
from spinlm.training.memory import MEMORY_MARGIN, optimizer_bytes
from spinlm.utils import hardware


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("memory"), num_hidden_layers=6)


def players(model: Path, folder: Path, **train: Any) -> Players:
    return Players(tiny_recipe(model, lora={"r": 2}, train=train), RunDir(folder))


@pytest.mark.parametrize(("architecture", "prefix_sharing"), [("llama", True), ("gpt_neo", True), ("gpt_neo", False)])
def test_the_plan_counts_what_is_kept(tmp_path: Path, architecture: str, prefix_sharing: bool) -> None:
    layers = {"attention_types": [[["global", "local"], 3]]} if architecture == "gpt_neo" else {}
    ours = players(save_tiny_model(tmp_path / "model", architecture, num_hidden_layers=6, **layers), tmp_path / "run")
    shape = shape_from_config(ours.logprobs.causal_lm.config.to_dict())
    planned = shape.activation_bytes(4, 128, Lora(), checkpointing=False, prefix_sharing=prefix_sharing)
    assert planned / 1.5 < saved_activation_bytes(ours.logprobs, prefix_sharing, 128) < planned * 1.5


def test_what_grows_with_the_row_is_counted(tmp_path: Path) -> None:
    """Attention that is not fused keeps its weights: a float32 number for each pair of tokens, 4 heads and 2 layers."""
    neo = players(save_tiny_model(tmp_path / "neo", "gpt_neo", max_position_embeddings=256), tmp_path / "run")
    short, long = (saved_activation_bytes(neo.logprobs, False, row) for row in (200, 1200))
    assert long - short == 1000 * 4 * 2 * 4
    fused = players(save_tiny_model(tmp_path / "llama"), tmp_path / "other")
    assert saved_activation_bytes(fused.logprobs, False, 1200) == saved_activation_bytes(fused.logprobs, False, 200)


def on(ours: Players) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in ours.model.modules())


def test_checkpointing_keeps_less_and_leaves_nothing_behind(model: Path, tmp_path: Path) -> None:
    ours = players(model, tmp_path, gradient_checkpointing=True)
    kept = saved_activation_bytes(ours.logprobs, True, 100)
    for _ in range(2):
        assert set_activation_checkpointing(ours.logprobs, ours.recipe, True) and on(ours)
    assert saved_activation_bytes(ours.logprobs, True, 100) < kept / 3
    switch_activation_checkpointing(ours.logprobs.causal_lm, on=False)
    assert not on(ours) and saved_activation_bytes(ours.logprobs, True, 100) == kept
    assert not ours.logprobs.causal_lm.get_input_embeddings()._forward_hooks


def bytes_needed(ours: Players, copy: int = 0) -> float:
    """What the largest micro-batch keeps, and gradients, optimizer state and a copy, which are still to come."""
    kept = saved_activation_bytes(ours.logprobs, True, ours.recipe.train.max_length)
    trained = sum(parameter.numel() for _, parameter in ours.parameters())
    state = 4 + optimizer_bytes(ours.recipe.train.optimizer) + copy
    return MEMORY_MARGIN * ours.recipe.max_micro_batch_tokens(True) * kept + trained * state


@pytest.mark.parametrize(("more", "needed"), [(-2, True), (2, False)])
@pytest.mark.parametrize("kind", ["adapter", "all weights", "all weights, computed in bfloat16"])
def test_checkpointing_by_need(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, more: int, needed: bool
) -> None:
    dtype = "bfloat16" if "bfloat16" in kind else "float32"
    lora = {"r": 2} if kind == "adapter" else None
    ours = Players(tiny_recipe(model, model={"path": str(model), "dtype": dtype}, lora=lora), RunDir(tmp_path))
    need = bytes_needed(ours, copy=2 if dtype == "bfloat16" else 0)
    monkeypatch.setattr(activation_checkpointing, "free_memory", lambda: int(need + more))
    for _ in range(2):  # what is kept with it on says nothing about what would be without
        assert set_activation_checkpointing(ours.logprobs, ours.recipe, True) == on(ours) == needed
    monkeypatch.setattr(activation_checkpointing, "free_memory", lambda: int(2 * need))
    assert not set_activation_checkpointing(ours.logprobs, ours.recipe, True) and not on(
        ours
    )  # off again when there is room


def test_a_model_that_cannot_checkpoint_is_left_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = players(model, tmp_path)
    monkeypatch.setattr(ours.logprobs.causal_lm, "supports_gradient_checkpointing", False)
    monkeypatch.setattr(activation_checkpointing, "free_memory", lambda: 0)
    assert not set_activation_checkpointing(ours.logprobs, ours.recipe, True) and not on(ours)


def test_the_largest_micro_batch_is_the_budget_or_a_longer_prompt_with_its_responses(model: Path) -> None:
    settings: dict[str, Any] = {
        "opponent": {"max_new_tokens": 10, "samples_per_prompt": 2},
        "selfplay": {"iterations": 4, "replay": 1},
    }
    recipe = tiny_recipe(model, **settings, train={"max_length": 100, "tokens_per_micro_batch": 50})
    assert recipe.max_micro_batch_tokens(True) == 100 + 4 * 10
    assert recipe.max_micro_batch_tokens(False) == 100 + 4 * 100
    recipe = tiny_recipe(model, **settings, train={"max_length": 100, "tokens_per_micro_batch": 700})
    assert recipe.max_micro_batch_tokens(True) == recipe.max_micro_batch_tokens(False) == 700


def test_memory_is_what_the_system_and_the_container_allow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(hardware, "CGROUP_FILES", ((str(limit), str(used)),))
    everything = hardware.total_memory()
    assert 0 < hardware.free_memory() < everything  # no such files
    used.write_text("300\n")
    limit.write_text("1000\n")
    assert (hardware.total_memory(), hardware.free_memory()) == (1000, 700)
    limit.write_text("max\n")
    assert hardware.total_memory() == everything
    assert free_bytes(torch.device("cpu")) > 1e6
