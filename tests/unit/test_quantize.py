"""QLoRA: 4-bit layers against transformers, PEFT and bitsandbytes, forward and backward."""

import importlib.util
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from models import naive_logprob, tiny_recipe
from spinlm.errors import MissingPackageError, ModelError
from spinlm.model.fused import PREPACKED, fuse_layers, prepacked_adapters
from spinlm.model.loading import add_adapter, disable_dropout, load_model
from spinlm.model.merge import save_merged
from spinlm.model.players import Players
from spinlm.model.prefix_trees import PrefixTree, pack_batch
from spinlm.model.quantize import bnb_config, check_4bit_support, count_parameters, dequantize, is_4bit
from spinlm.recipe.model import Lora
from spinlm.rundir.layout import RunDir

bitsandbytes = pytest.importorskip("bitsandbytes", reason="4 bits need the extra `bitsandbytes`")

LORA = {"r": 4, "alpha": 8.0}
TREES = [PrefixTree([5, 6, 7, 8], ([9, 10, 11], [12, 13])), PrefixTree([20, 21], ([22], [23, 24, 25]))]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture
def folder(model_folder: Callable[[str], Path]) -> Path:
    """A folder with a tiny Llama."""
    return model_folder("llama")


def players_in_4bit(folder: Path, run: Path, dtype: str = "float32", **lora: Any) -> Players:
    model = {"load_in_4bit": True, "dtype": dtype}
    players = Players(tiny_recipe(folder, lora=LORA | lora, model=model), RunDir(run))
    players.prefix_sharing = True
    return players


def randomize_adapter(model: nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)


def reference_model(folder: Path, **lora: Any) -> Any:
    """Load a 4-bit model with transformers, PEFT and bitsandbytes, without bitsandbytes' bfloat16 kernels."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=bnb_config(torch.float32)
    )
    for layer in model.modules():
        if is_4bit(layer):
            layer.support_avx512bf16_for_cpu = False
    model = add_adapter(model, Lora(**LORA | lora), 0)
    disable_dropout(model)
    randomize_adapter(model)
    return model.eval()


def logprobs_of_trees(model: Any) -> Tensor:
    return torch.stack([naive_logprob(model, tree.prompt, response) for tree in TREES for response in tree.responses])


@pytest.mark.parametrize("variant", [{"use_rslora": True}, {"use_dora": True}], ids=str)
def test_variants_of_lora_in_4bit(folder: Path, tmp_path: Path, variant: dict[str, bool]) -> None:
    players, reference = players_in_4bit(folder, tmp_path, **variant), reference_model(folder, **variant)
    randomize_adapter(players.model)
    expected = logprobs_of_trees(reference)
    torch.testing.assert_close(torch.tensor(players.response_logprobs(TREES)), expected, **TOLERANCE)
    batch = pack_batch(TREES, True)
    players.logprobs(batch).sum().backward()
    expected.sum().backward()
    ours, theirs = gradients(players.model), gradients(reference)
    assert ours.keys() == theirs.keys() and len(ours) == 3 * 7 * (3 if "use_dora" in variant else 2)
    for name, gradient in ours.items():
        assert (gradient - theirs[name]).norm() <= 1e-3 * theirs[name].norm(), name


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("targets", ["all-linear", "some"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "gpt2", "gpt_neox", "gpt_neo"])
def test_logprobs_and_gradients_equal_pefts(
    model_folder: Callable[[str], Path], tmp_path: Path, architecture: str, targets: str
) -> None:
    """With adapters on every layer, and with 4-bit layers that have no adapter."""
    some = {"gpt2": ["c_attn"], "gpt_neox": ["dense"]}.get(architecture, ["q_proj"])
    lora = {} if targets == "all-linear" else {"target_modules": some}
    players = players_in_4bit(model_folder(architecture), tmp_path, **lora)
    randomize_adapter(players.model)
    reference = reference_model(model_folder(architecture), **lora)
    expected = logprobs_of_trees(reference)
    players.prefix_sharing = True
    # Scoring first: outside of training, bitsandbytes would convert its weights in place.
    scores = players.response_logprobs(TREES)
    torch.testing.assert_close(torch.tensor(scores), expected.detach(), **TOLERANCE)
    values = players.logprobs.train()(pack_batch(TREES, True))
    torch.testing.assert_close(values, expected, **TOLERANCE)
    weights = torch.tensor([1.0, -2.0, 0.5, 1.5])
    (values * weights).sum().backward()
    (expected * weights).sum().backward()
    grads, expected_grads = gradients(players.model), gradients(reference)
    assert grads.keys() == expected_grads.keys() and all("lora_" in name for name in grads)
    largest = max(grad.abs().max().item() for grad in expected_grads.values())
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-5 * largest)


def test_adapter_dropout_equals_pefts(folder: Path) -> None:
    model = reference_model(folder, dropout=0.5).train()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(2, 5, 32)

    def output() -> Tensor:
        torch.manual_seed(0)
        y: Tensor = layer(x)
        return y

    expected = output()
    assert fuse_layers(model) > 0
    torch.testing.assert_close(output(), expected, **TOLERANCE)


def test_only_base_layers_are_in_4bit(folder: Path, tmp_path: Path) -> None:
    players = players_in_4bit(folder, tmp_path)
    names = {name.rpartition(".")[2] for name, layer in players.model.named_modules() if is_4bit(layer)}
    assert names == {"base_layer"}
    others = {parameter.dtype for name, parameter in players.model.named_parameters() if ".base_layer" not in name}
    assert others == {torch.float32}  # adapters, embeddings, head and norms
    unquantized = Players(tiny_recipe(folder, lora=LORA), RunDir(tmp_path))
    assert count_parameters(players.model.parameters()) == count_parameters(unquantized.model.parameters())
    assert len(players.parameters()) == len(unquantized.parameters())


def test_bfloat16(folder: Path, tmp_path: Path) -> None:
    players, exact = players_in_4bit(folder, tmp_path, "bfloat16"), players_in_4bit(folder, tmp_path)
    layer = next(layer for layer in players.model.modules() if is_4bit(layer))
    assert dequantize(layer).dtype == torch.bfloat16
    randomize_adapter(players.model)
    randomize_adapter(exact.model)
    values, expected = (torch.tensor(p.response_logprobs(TREES)) for p in (players, exact))
    assert 0 < (values - expected).abs().max() < 2


def test_fused_layers_in_4bit(folder: Path) -> None:
    """All LoRA layers, gated MLPs and norms of a Llama."""
    model = load_model(tiny_recipe(folder).model, str(folder), torch.float32, load_in_4bit=True)
    model = add_adapter(model, Lora(**LORA), 0)
    assert fuse_layers(model) == 3 * (7 + 1 + 2) + 1
    with prepacked_adapters(model, 4):
        assert not any(PREPACKED in vars(layer) for layer in model.modules())  # no merged weights in memory


def test_autograd_saves_no_dequantized_weight(folder: Path, tmp_path: Path) -> None:
    players = players_in_4bit(folder, tmp_path)
    weight_shapes = {tuple(dequantize(layer).shape) for layer in players.model.modules() if is_4bit(layer)}
    saved_shapes = set()

    def record(tensor: Tensor) -> Tensor:
        saved_shapes.add(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        players.logprobs.train()(pack_batch(TREES, True))
    assert saved_shapes and not weight_shapes & saved_shapes


# Saved players


def saved_player(folder: Path, run: Path) -> tuple[Players, Path]:
    """Players with a random adapter, and the folder where it is saved as the player of iteration 0."""
    players = players_in_4bit(folder, run)
    randomize_adapter(players.model)
    players.mark_modified()
    players.save(0)
    return players, players.folder.player(0)


def test_a_saved_player_is_an_adapter_for_peft(folder: Path, tmp_path: Path) -> None:
    players, player = saved_player(folder, tmp_path)
    assert {path.name for path in player.glob("*.safetensors")} == {"adapter_model.safetensors"}
    reloaded = players_in_4bit(folder, tmp_path)
    reloaded.load(0)
    values = players.response_logprobs(TREES)
    assert reloaded.response_logprobs(TREES) == values

    over_4bit = PeftModel.from_pretrained(reference_model(folder).unload(), player).eval()
    over_float32 = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), player).eval()
    with torch.no_grad():
        torch.testing.assert_close(logprobs_of_trees(over_4bit), torch.tensor(values), **TOLERANCE)
        assert (logprobs_of_trees(over_float32) - torch.tensor(values)).abs().max() > 1e-2


def test_an_adapter_is_merged_into_the_unquantized_base(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    players, player = saved_player(folder, tmp_path)
    with caplog.at_level(logging.INFO, logger="spinlm"):
        save_merged(players, 0, tmp_path / "output")
    assert "merged into the base in float32" in caplog.text and "nats per token" in caplog.text
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "output").eval()
    assert not any(is_4bit(layer) for layer in merged.modules())
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), player).eval()
    with torch.no_grad():
        torch.testing.assert_close(logprobs_of_trees(merged), logprobs_of_trees(expected), **TOLERANCE)


# Errors


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(MissingPackageError, match=r"pip install 'spinlm\[bitsandbytes\]'$"):
        check_4bit_support()


def test_a_device_without_support(monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_error(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("no kernel")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", raise_error)
    with pytest.raises(ModelError, match=r"model\.load_in_4bit: .*: no kernel"):
        check_4bit_support()


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_a_pre_quantized_model(folder: Path, tmp_path: Path, load_in_4bit: bool) -> None:
    quantized = tmp_path / "model"
    shutil.copytree(folder, quantized)
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantized / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="model: pre-quantized"):
        load_model(tiny_recipe(quantized).model, str(quantized), torch.float32, load_in_4bit=load_in_4bit)
