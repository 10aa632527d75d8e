"""Extrapolation in weight space: numbers by hand, and log-probabilities of tiny models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from models import naive_logprob, save_adapter, save_tiny_model
from spinlm.errors import ModelError
from spinlm.model.adapters import continue_adapter
from spinlm.model.extrapolate import double_rank, extrapolate, pad_rank
from spinlm.recipe.model import Lora, Model


def save(folder: Path, weights: dict[str, Any], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    name = "model" if config is None else "adapter_model"
    save_file({key: torch.tensor(value) for key, value in weights.items()}, folder / f"{name}.safetensors")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("factor", "expected"), [(0.0, [1.0, 4.0]), (1.0, [2.0, 2.0]), (2.0, [3.0, 0.0])])
def test_whole_models(tmp_path: Path, factor: float, expected: list[float]) -> None:
    """θ_0 = (1, 4), θ = (2, 2): twice the way ends at (3, 0)."""
    start = save(tmp_path / "start", {"w": [1.0, 4.0], "ids": [7]})
    trained = save(tmp_path / "trained", {"w": [2.0, 2.0], "ids": [8]})
    extrapolate(start, trained, factor, tmp_path / "new")
    weights = load_file(tmp_path / "new" / "model.safetensors")
    assert weights["w"].tolist() == expected and weights["ids"].tolist() == [8]
    assert (tmp_path / "new" / "tokenizer.json").exists()


@pytest.mark.parametrize("use_rslora", [False, True])
def test_adapters(tmp_path: Path, use_rslora: bool) -> None:
    """Rank 1, layer of 2 × 2. With s the scale: s·B_0 A_0 = s·[[1, 0], [0, 0]], s·B A = s·[[0, 0], [6, 0]].

    Twice the way is s·[[−1, 0], [12, 0]].
    """
    config = {"r": 1, "lora_alpha": 3, "use_rslora": use_rslora, "rank_pattern": {}, "alpha_pattern": {}}
    start = save(tmp_path / "start", {"q.lora_A.weight": [[1.0, 0.0]], "q.lora_B.weight": [[1.0], [0.0]]}, config)
    trained = save(tmp_path / "trained", {"q.lora_A.weight": [[2.0, 0.0]], "q.lora_B.weight": [[0.0], [3.0]]}, config)
    extrapolate(start, trained, 2.0, tmp_path / "new")
    weights = load_file(tmp_path / "new" / "adapter_model.safetensors")
    product = weights["q.lora_B.weight"] @ weights["q.lora_A.weight"]
    assert product.tolist() == [[-1.0, 0.0], [12.0, 0.0]]
    new = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    scale = new["lora_alpha"] / (new["r"] ** 0.5 if use_rslora else new["r"])
    assert new["r"] == 2 and scale == pytest.approx(3.0)


def test_patterns_of_ranks_are_doubled_as_well() -> None:
    config = {"r": 4, "lora_alpha": 8, "rank_pattern": {"q": 2}, "alpha_pattern": {"q": 3}, "use_rslora": False}
    assert double_rank(config) == {"r": 8, "lora_alpha": 16, "rank_pattern": {"q": 4}, "alpha_pattern": {"q": 6}}


@pytest.mark.parametrize(
    "lora", [{"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}}, {"use_rslora": True}]
)
def test_an_adapter_of_another_program_with_twice_the_rank(tmp_path: Path, lora: dict[str, Any]) -> None:
    """The start of a run that trains an adapter further computes the same log-probabilities."""
    base = save_tiny_model(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], **lora)
    section, model = Lora(dropout=0.0), Model(path=str(base))
    values = []
    for double in (False, True):
        loaded = continue_adapter(AutoModelForCausalLM.from_pretrained(base), adapter, section, model, double=double)
        values.append(float(naive_logprob(loaded.eval(), [5, 6, 7], [8, 9])))
        assert loaded.peft_config["default"].r == (8 if double else 4)
    assert values[0] == pytest.approx(values[1], abs=1e-5)


def test_padding_keeps_the_product() -> None:
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]])
    wide_a = pad_rank("q.lora_A.weight", a, torch.Size([2, 2]))
    wide_b = pad_rank("q.lora_B.weight", b, torch.Size([2, 2]))
    assert torch.equal(wide_b @ wide_a, b @ a) and wide_a.shape == wide_b.shape == (2, 2)
    assert pad_rank("q.weight", a, torch.Size([2, 2])) is a


def test_players_that_do_not_fit_together(tmp_path: Path) -> None:
    start = save(tmp_path / "start", {"w": [1.0]})
    with pytest.raises(ModelError, match="no such weight"):
        extrapolate(start, save(tmp_path / "other", {"v": [1.0]}), 2.0, tmp_path / "new")
    with pytest.raises(ModelError, match="shape"):
        extrapolate(start, save(tmp_path / "longer", {"w": [1.0, 2.0]}), 2.0, tmp_path / "new")
