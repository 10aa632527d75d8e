"""Fused LoRA layers and the products behind them compute what PEFT and plain PyTorch compute."""

import copy
from typing import Any

import pytest
import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from models import tiny_model
from spinlm.model.fused import fuse_layers, prepacked_adapters
from spinlm.model.kernels import linear, prepack
from spinlm.model.loading import add_adapter, disable_dropout
from spinlm.recipe.schema import Lora
from spinlm.training.activation_checkpointing import switch_checkpointing


class Small(nn.Module):
    """Two layers to adapt, as Llama and GPT-2 have them."""

    def __init__(self, kind: str):
        super().__init__()
        torch.manual_seed(0)
        self.one = Conv1D(5, 7) if kind == "conv" else nn.Linear(7, 5, bias=kind == "bias")
        self.two = Conv1D(3, 5) if kind == "conv" else nn.Linear(5, 3, bias=kind == "bias")

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


def adapted(kind: str, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[Linear]]:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=2, lora_alpha=3, lora_dropout=dropout, target_modules=["one", "two"])
    config.fan_in_fan_out = kind == "conv"
    model: nn.Module = inject_adapter_in_model(config, Small(kind).to(dtype))
    layers = [layer for layer in model.modules() if isinstance(layer, Linear)]
    for layer in layers:
        nn.init.normal_(layer.lora_B["default"].weight)
        layer.lora_A["default"].float(), layer.lora_B["default"].float()
    return model, layers


def result(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, and gradients of the input and of the adapters."""
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    out = model(x)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [out, *torch.autograd.grad(out.float().square().sum(), [x, *trained])]


@pytest.mark.parametrize("kind", ["plain", "bias", "conv"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_fused_layer_computes_what_pefts_does(kind: str, dropout: float) -> None:
    model, layers = adapted(kind, dropout)
    x = torch.randn(2, 4, 7)
    for training in (True, False):
        model.train(training)
        for layer in layers:
            vars(layer).pop("forward", None)
        expected = result(model, x)
        assert fuse_layers(model) == 2
        for ours, theirs in zip(result(model, x), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_fused_layer_in_bfloat16_is_as_exact_as_bfloat16() -> None:
    model, layers = adapted("plain", dtype=torch.bfloat16)
    exact, _ = adapted("plain")
    exact.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    x = torch.randn(2, 4, 7)
    fuse_layers(model)
    found = result(model, x.bfloat16())
    assert found[0].dtype == torch.bfloat16
    assert {parameter.dtype for layer in layers for parameter in (*layer.lora_A.parameters(),)} == {torch.float32}
    for ours, theirs in zip(found, result(exact, x), strict=True):
        assert (ours.float() - theirs).norm() < 0.02 * theirs.norm()


def test_a_layer_that_is_not_plain_stays_as_it_is() -> None:
    model, layers = adapted("bias")
    layers[0].base_layer.weight.requires_grad_()
    assert fuse_layers(model) == 1
    assert "forward" not in vars(layers[0])


def test_an_adapter_that_is_switched_off_or_merged_is_left_out() -> None:
    model, layers = adapted("plain")
    fuse_layers(model)
    x = torch.randn(2, 4, 7)
    with torch.no_grad():
        expected = model(x)
        for layer in layers:
            layer.merge()
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
        for layer in layers:
            layer.unmerge()
            layer.enable_adapters(False)
        torch.testing.assert_close(model(x), Small("plain")(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("architecture", "layers"),
    [
        ("llama", 3 * (7 + 1 + 2) + 1),  # LoRA layers, MLP and norms of each block, the last norm
        ("qwen2", 3 * (7 + 1 + 2) + 1),
        ("gemma2", 3 * (7 + 1)),  # its norms multiply with 1 + w
        ("gpt2", 3 * 4),
    ],
)
def test_every_layer_of_a_model_is_fused(architecture: str, layers: int) -> None:
    """And the whole computes what it did, forward and backward, with gradient checkpointing and without."""
    model = add_adapter(tiny_model(architecture), Lora(r=2), 0).train()
    disable_dropout(model)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
        elif "norm" in name and name.endswith("weight") and architecture != "gpt2":
            nn.init.uniform_(parameter, 0.5, 1.5)
    ids = torch.randint(3, 90, (2, 9))

    def gradients() -> list[Tensor]:
        logits = model(input_ids=ids).logits
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [logits, *torch.autograd.grad(logits.float().square().mean(), trained)]

    expected = gradients()
    assert fuse_layers(model) == layers
    found = [gradients()]
    switch_checkpointing(model.get_base_model(), on=True)
    found.append(gradients())
    for ours in found:
        for mine, theirs in zip(ours, expected, strict=True):
            assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


class ScaleShift(nn.Module):
    """Called an RMS norm, with the attributes of one, and something else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.full((4,), 2.0), requires_grad=False), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def test_what_only_looks_like_a_norm_stays_as_it_is() -> None:
    layer = type("OddRMSNorm", (ScaleShift,), {})()
    assert fuse_layers(nn.Sequential(layer)) == 0
    assert torch.equal(layer(torch.ones(1, 4)), torch.full((1, 4), 2.0))


@pytest.mark.parametrize(
    ("trained", "dtype", "fused"),
    [(False, torch.float32, 1), (True, torch.float32, 0), (False, torch.bfloat16, 0)],
)
def test_only_a_frozen_float32_norm_is_one_operation(trained: bool, dtype: torch.dtype, fused: int) -> None:
    norm = LlamaRMSNorm(8).to(dtype).requires_grad_(trained)
    plain = copy.deepcopy(norm)
    assert fuse_layers(nn.Sequential(norm)) == fused
    for other in (dtype, torch.bfloat16):  # of the input
        x = torch.randn(3, 8).to(other)
        y = norm(x)
        assert y.dtype == plain(x).dtype
        torch.testing.assert_close(y, plain(x), rtol=0 if other == torch.bfloat16 else 1e-5, atol=0)
        if trained:
            y.float().sum().backward()
            assert norm.weight.grad is not None


def test_a_gated_mlp_keeps_neither_its_activation_nor_their_product() -> None:
    model = add_adapter(tiny_model("llama"), Lora(r=2), 0).train()
    mlp = model.get_base_model().model.layers[0].mlp
    x = torch.randn(1, 8, 32, requires_grad=True)

    def kept() -> int:
        found: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = mlp(x)
        del out
        return sum(count == 8 * 64 for count in found.values())

    assert kept() == 4  # gate, up, activation, product
    fuse_layers(model)
    assert kept() == 2


@pytest.mark.parametrize("kind", ["plain", "bias", "conv"])
def test_packed_layers_compute_the_same_and_are_gone_after(kind: str) -> None:
    model, layers = adapted(kind)
    fuse_layers(model)
    x = torch.randn(2, 4, 7)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(x)
        with prepacked_adapters(model, 8):
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
            layers[0].lora_B["default"].weight.zero_()  # not seen by the packed weight
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
        assert (model(x) - expected).abs().max() > 0.01
    del before["one.lora_B.default.weight"]
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("bias", [True, False])
def test_products(rows: int, bias: bool) -> None:
    x, weight, offset = torch.randn(rows, 33), torch.randn(65, 33), torch.randn(65) if bias else None
    expected = nn.functional.linear(x.double(), weight.double(), None if offset is None else offset.double()).float()
    packed: Any = prepack(weight, rows)
    for found in (
        linear(x, weight, offset),
        linear(x, packed, offset),
        linear(x, weight.t().contiguous().t(), offset),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert linear(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16
    assert prepack(weight.bfloat16(), rows) is None


class Gated(nn.Module):
    """An MLP as Llama has it, with biases or without, and what may be odd about it."""

    def __init__(self, bias: bool = False, odd: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.gate_proj, self.up_proj = nn.Linear(6, 10, bias=bias), nn.Linear(6, 10, bias=bias)
        self.down_proj, self.act_fn, self.odd = nn.Linear(10, 6, bias=bias), nn.SiLU(), odd

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        return self.down_proj(self.act_fn(gate.clamp(max=0.1) if self.odd else gate) * self.up_proj(x))


def adapted_mlp(dropout: float = 0.0, dtype: torch.dtype = torch.float32, **kind: bool) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    names = ["gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=2, lora_alpha=3, lora_dropout=dropout, target_modules=names)
    mlp: nn.Module = inject_adapter_in_model(config, Gated(**kind).to(dtype))
    for layer in mlp.modules():
        if isinstance(layer, Linear):
            nn.init.normal_(layer.lora_B["default"].weight)
            layer.lora_A["default"].float(), layer.lora_B["default"].float()
    return mlp


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("training", [True, False])
def test_a_gated_mlp_computes_what_it_did(bias: bool, dropout: float, training: bool) -> None:
    mlp = adapted_mlp(dropout, bias=bias).train(training)
    x = torch.randn(2, 4, 6)
    expected = result(mlp, x)
    assert fuse_layers(mlp) == 3 + 1 and mlp.training == training
    for ours, theirs in zip(result(mlp, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        mlp.eval()
        torch.testing.assert_close(mlp(x), type(mlp).forward(mlp, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("state", ["switched off", "merged"])
def test_a_gated_mlp_whose_adapter_is_switched_off_or_merged(state: str) -> None:
    mlp = adapted_mlp(bias=True)
    fuse_layers(mlp)
    x = torch.randn(2, 4, 6)
    with torch.no_grad():
        expected = Gated(bias=True)(x) if state == "switched off" else mlp(x)
    for layer in mlp.modules():
        if isinstance(layer, Linear):
            layer.merge() if state == "merged" else layer.enable_adapters(False)
    torch.testing.assert_close(mlp(x), expected, rtol=1e-5, atol=1e-5)


def test_a_gated_mlp_in_bfloat16_is_as_exact_as_bfloat16() -> None:
    mlp, exact = adapted_mlp(dtype=torch.bfloat16), adapted_mlp()
    exact.load_state_dict({name: value.float() for name, value in mlp.state_dict().items()})
    assert fuse_layers(mlp) == 3 + 1
    x = torch.randn(2, 4, 6)
    for ours, theirs in zip(result(mlp, x.bfloat16()), result(exact, x), strict=True):
        assert (ours.float() - theirs).norm() < 0.03 * theirs.norm()


def test_what_only_looks_like_a_gated_mlp_stays_as_it_is() -> None:
    mlp = adapted_mlp(odd=True)
    assert fuse_layers(mlp) == 3
    assert "forward" not in vars(mlp)
