"""What a step keeps, measured, and gradient checkpointing where it would not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from models import save_tiny_model, tiny_recipe
from spinlm.model import memory
from spinlm.model.memory import checkpoint_if_needed, free_bytes, kept_bytes, most_tokens
from spinlm.model.players import Players
from spinlm.plan.shapes import shape_from_config
from spinlm.rundir import RunDir


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("memory"), num_hidden_layers=6)


def players(model: Path, folder: Path, **train: Any) -> Players:
    return Players(tiny_recipe(model, lora={"r": 2}, train=train), RunDir(folder))


def test_the_plan_counts_what_is_kept(model: Path, tmp_path: Path) -> None:
    ours = players(model, tmp_path)
    shape = shape_from_config(ours.logprobs.causal.config.to_dict())
    planned = shape.activation_bytes(4, 128, adapter=True, checkpointing=False)
    assert planned / 1.5 < kept_bytes(ours.logprobs, "tree") < planned * 1.5


def test_checkpointing_keeps_less(model: Path, tmp_path: Path) -> None:
    kept = kept_bytes(players(model, tmp_path / "without").logprobs, "tree")
    ours = players(model, tmp_path / "with", gradient_checkpointing=True)
    assert checkpoint_if_needed(ours.logprobs, ours.recipe, "tree")
    assert kept_bytes(ours.logprobs, "tree") < kept / 3


@pytest.mark.parametrize(("share", "on"), [(0.9, True), (1.1, False)])
def test_checkpointing_by_need(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, on: bool
) -> None:
    ours = players(model, tmp_path)
    need = memory.MEMORY_MARGIN * most_tokens(ours.recipe) * kept_bytes(ours.logprobs, "tree")
    monkeypatch.setattr(memory, "free_bytes", lambda device: share * need)
    assert checkpoint_if_needed(ours.logprobs, ours.recipe, "tree") == on
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2 * need)
    assert not checkpoint_if_needed(ours.logprobs, ours.recipe, "tree")  # and off again when there is room


def test_the_largest_micro_batch_is_the_budget_or_a_longer_tree(model: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        model,
        opponent={"max_new_tokens": 10, "samples_per_prompt": 2},
        selfplay={"iterations": 4, "replay": 1},
        train={"max_length": 100, "tokens_per_micro_batch": 50},
    )
    assert most_tokens(recipe) == 100 + 4 * 10
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"tokens_per_micro_batch": 500})})
    assert most_tokens(recipe) == 500


def test_free_memory_goes_down_as_it_is_taken() -> None:
    device = torch.device("cpu")
    before = free_bytes(device)
    taken = torch.ones(100_000_000)  # 400 MB
    assert before - free_bytes(device) > 1e8
    del taken
