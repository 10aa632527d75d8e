"""QLoRA: a base in 4 bits computes what transformers and PEFT make of it, forward and backward, in every stage."""

import importlib.util
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import save_tiny_model, tiny_recipe
from spinlm.errors import MissingPackageError, ModelError
from spinlm.model.fused import fuse_layers, prepacked_adapters
from spinlm.model.loading import add_adapter, disable_dropout, load_model
from spinlm.model.merge import save_merged
from spinlm.model.players import Players
from spinlm.model.prefix_trees import PrefixTree, pack_batch
from spinlm.model.quantize import bnb_config, check_4bit_support, count_parameters, dequantize, is_4bit
from spinlm.rundir.layout import RunDir

bitsandbytes = pytest.importorskip("bitsandbytes", reason="4 bits need the extra `bitsandbytes`")

LORA = {"r": 4, "alpha": 8.0}
IN_4_BITS = {"load_in_4bit": True}
TREES = [PrefixTree([5, 6, 7, 8], ([9, 10, 11], [12, 13])), PrefixTree([20, 21], ([22], [23, 24, 25]))]
EXACT = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folders: dict[str, Path] = {}

    def save(architecture: str = "llama") -> Path:
        if architecture not in folders:
            folders[architecture] = save_tiny_model(tmp_path_factory.mktemp(architecture), architecture)
        return folders[architecture]

    return save


def stir(model: nn.Module) -> None:
    """Adapters as training would leave them."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)


def plain(folder: Path, **lora: Any) -> Any:
    """The quantised model with an adapter as transformers and PEFT have it, their layers told not to use bfloat16."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=bnb_config(torch.float32)
    )
    for layer in loaded.modules():
        if is_4bit(layer):
            layer.support_avx512bf16_for_cpu = False
    settings = tiny_recipe(folder, lora=LORA | lora).lora
    assert settings is not None
    model = add_adapter(loaded, settings, 0)
    disable_dropout(model)
    stir(model)
    return model.eval()


def logprob(model: Any, prompt: Any, response: list[int]) -> Tensor:
    ids = torch.tensor([[*prompt, *response]])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.float(), -1).gather(1, torch.tensor(response)[:, None]).sum()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("targets", ["all-linear", "some"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "gpt2", "gpt_neox", "gpt_neo"])
def test_logprobs_and_gradients_are_those_of_peft(saved: Any, tmp_path: Path, architecture: str, targets: str) -> None:
    """With an adapter on every layer, and with layers in 4 bits that have none."""
    names = {"gpt2": ["c_attn"], "gpt_neox": ["dense"]}.get(architecture, ["q_proj"])
    more = {} if targets == "all-linear" else {"target_modules": names}
    players = Players(tiny_recipe(saved(architecture), lora=LORA | more, model=IN_4_BITS), RunDir(tmp_path))
    stir(players.model)
    reference = plain(saved(architecture), **more)
    expected = torch.stack([logprob(reference, tree.prompt, one) for tree in TREES for one in tree.responses])
    prefix_sharing = architecture != "gpt_neo"
    scored = players.response_logprobs(
        TREES, prefix_sharing
    )  # first, since it is there that bitsandbytes changes its mind
    torch.testing.assert_close(torch.tensor(scored), expected.detach(), **EXACT)
    ours = players.logprobs.train()(pack_batch(TREES, prefix_sharing))
    torch.testing.assert_close(ours, expected, **EXACT)
    weights = torch.tensor([1.0, -2.0, 0.5, 1.5])
    (ours * weights).sum().backward()
    (expected * weights).sum().backward()
    found, wanted = gradients(players.model), gradients(reference)
    assert found.keys() == wanted.keys() and all("lora_" in name for name in found)
    largest = max(grad.abs().max().item() for grad in wanted.values())
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-5 * largest)


def test_dropout_of_the_adapter_is_pefts(saved: Any) -> None:
    model = plain(saved(), dropout=0.5).train()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(2, 5, 32)

    def result() -> Tensor:
        torch.manual_seed(0)
        found: Tensor = layer(x)
        return found

    expected = result()
    assert fuse_layers(model) > 0
    torch.testing.assert_close(result(), expected, **EXACT)


def test_what_is_in_four_bits_and_what_is_not(saved: Any, tmp_path: Path) -> None:
    players = Players(tiny_recipe(saved(), lora=LORA, model=IN_4_BITS), RunDir(tmp_path))
    quantised = {name.rpartition(".")[2] for name, layer in players.model.named_modules() if is_4bit(layer)}
    assert quantised == {"base_layer"}
    kinds = {parameter.dtype for name, parameter in players.model.named_parameters() if ".base_layer" not in name}
    assert kinds == {torch.float32}  # adapters, embeddings, head and norms
    full = Players(tiny_recipe(saved(), lora=LORA), RunDir(tmp_path))
    assert count_parameters(players.model.parameters()) == count_parameters(full.model.parameters())
    assert len(players.parameters()) == len(full.parameters())


def test_bfloat16_keeps_its_place(saved: Any, tmp_path: Path) -> None:
    players = Players(tiny_recipe(saved(), lora=LORA, model=IN_4_BITS | {"dtype": "bfloat16"}), RunDir(tmp_path))
    layer = next(layer for layer in players.model.modules() if is_4bit(layer))
    assert dequantize(layer).dtype == torch.bfloat16
    stir(players.model)
    exact = Players(tiny_recipe(saved(), lora=LORA, model=IN_4_BITS), RunDir(tmp_path))
    stir(exact.model)
    ours, theirs = (torch.tensor(one.response_logprobs(TREES, True)) for one in (players, exact))
    assert 0 < (ours - theirs).abs().max() < 2


def test_fused_layers_in_four_bits(saved: Any) -> None:
    """All LoRA layers and gated MLPs of a Llama, and its norms."""
    model = load_model(tiny_recipe(saved()).model, str(saved()), torch.float32, load_in_4bit=True)
    lora = tiny_recipe(saved(), lora=LORA, model=IN_4_BITS).lora
    assert lora is not None
    model = add_adapter(model, lora, 0)
    assert fuse_layers(model) == 3 * (7 + 1 + 2) + 1
    with prepacked_adapters(model, 4):
        assert not any("spinlm_packed" in vars(layer) for layer in model.modules())  # no merged weights in memory


def test_weights_are_unpacked_and_not_kept(saved: Any, tmp_path: Path) -> None:
    """Autograd keeps nothing of a weight's size."""
    players = Players(tiny_recipe(saved(), lora=LORA, model=IN_4_BITS), RunDir(tmp_path))
    sizes = {tuple(dequantize(layer).shape) for layer in players.model.modules() if is_4bit(layer)}
    kept = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        players.logprobs.train()(pack_batch(TREES, True))
    assert kept and not sizes & set(kept)


def test_players_are_adapters_that_plain_peft_loads(saved: Any, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    players = Players(tiny_recipe(saved(), lora=LORA, model=IN_4_BITS), RunDir(tmp_path))
    stir(players.model)
    players.changed()
    players.save(0)
    folder = tmp_path / "iteration-0" / "player"
    assert {path.name for path in folder.glob("*.safetensors")} == {"adapter_model.safetensors"}
    assert "in 4 bits" in (folder / "README.md").read_text()
    later = Players(tiny_recipe(saved(), lora=LORA, model=IN_4_BITS), RunDir(tmp_path))
    later.become(0)
    assert later.response_logprobs(TREES, True) == players.response_logprobs(TREES, True)

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved()), folder).eval()
    same = PeftModel.from_pretrained(plain(saved()).unload(), folder).eval()
    with torch.no_grad():
        values = [[logprob(one, t.prompt, r) for t in TREES for r in t.responses] for one in (same, loaded)]
    ours = torch.tensor(players.response_logprobs(TREES, True))
    torch.testing.assert_close(torch.stack(values[0]), ours, **EXACT)
    assert (torch.stack(values[1]) - ours).abs().max() > 1e-2  # over the base as it came: another model


def test_a_merged_export_is_over_the_base_as_it_came(
    saved: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    recipe, run = tiny_recipe(saved(), lora=LORA, model=IN_4_BITS), RunDir(tmp_path)
    players = Players(recipe, run)
    stir(players.model)
    players.changed()
    players.save(0)
    with caplog.at_level(logging.INFO, logger="spinlm"):
        save_merged(recipe, run, 0, tmp_path / "out")
    assert "trained over a 4-bit base and is merged into the base in torch.float32" in caplog.text
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert not any(is_4bit(layer) for layer in merged.modules())
    base = AutoModelForCausalLM.from_pretrained(saved())
    expected = PeftModel.from_pretrained(base, tmp_path / "iteration-0" / "player").eval()
    with torch.no_grad():
        torch.testing.assert_close(
            logprob(merged, [5, 6, 7], [8, 9]), logprob(expected, [5, 6, 7], [8, 9]), rtol=1e-4, atol=1e-4
        )


# What cannot be


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(MissingPackageError, match=r"pip install 'spinlm\[bitsandbytes\]'$"):
        check_4bit_support()


def test_a_machine_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("no kernel")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", fail)
    with pytest.raises(ModelError, match=r"model\.load_in_4bit: .*: no kernel"):
        check_4bit_support()


@pytest.mark.parametrize("quantize", [True, False])
def test_a_model_that_comes_quantised(saved: Any, tmp_path: Path, quantize: bool) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved(), folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="model: pre-quantized models are not supported"):
        load_model(tiny_recipe(folder).model, str(folder), torch.float32, load_in_4bit=quantize)
