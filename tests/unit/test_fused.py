"""Fused layers and matrix products, against PEFT, transformers and PyTorch."""

import copy
from typing import Any

import pytest
import torch
from peft.tuners.lora import Linear
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from models import tiny_model
from spinlm.model.fused import fuse_layers, prepacked_adapters
from spinlm.model.kernels import linear, prepack
from spinlm.model.loading import add_adapter, disable_dropout
from spinlm.recipe.model import Lora
from spinlm.training.activation_checkpointing import switch_activation_checkpointing


class Small(nn.Module):
    """Two layers for adapters: linear as in Llama, or Conv1D as in GPT-2."""

    def __init__(self, kind: str):
        super().__init__()
        torch.manual_seed(0)
        self.first = Conv1D(5, 7) if kind == "conv" else nn.Linear(7, 5, bias=kind == "bias")
        self.second = Conv1D(3, 5) if kind == "conv" else nn.Linear(5, 3, bias=kind == "bias")

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class GatedMlp(nn.Module):
    """An MLP as in Llama. With `clamp` it has the same parts, but computes something else."""

    def __init__(self, bias: bool = False, clamp: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.gate_proj, self.up_proj = nn.Linear(6, 10, bias=bias), nn.Linear(6, 10, bias=bias)
        self.down_proj, self.act_fn, self.clamp = nn.Linear(10, 6, bias=bias), nn.SiLU(), clamp

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        return self.down_proj(self.act_fn(gate.clamp(max=0.1) if self.clamp else gate) * self.up_proj(x))


def with_adapters(module: nn.Module, dropout: float = 0.0) -> tuple[nn.Module, list[Linear]]:
    """Add PEFT adapters in float32 to every linear layer, with random weights."""
    from peft import LoraConfig, inject_adapter_in_model

    names = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear | Conv1D)]
    config = LoraConfig(r=2, lora_alpha=3, lora_dropout=dropout, target_modules=names)
    config.fan_in_fan_out = any(isinstance(layer, Conv1D) for layer in module.modules())
    model: nn.Module = inject_adapter_in_model(config, module)
    layers = [layer for layer in model.modules() if isinstance(layer, Linear)]
    for layer in layers:
        nn.init.normal_(layer.lora_B["default"].weight)
        layer.lora_A["default"].float(), layer.lora_B["default"].float()
    return model, layers


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Compute the output, and the gradients of the input and the adapters."""
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    output = model(x)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [output, *torch.autograd.grad(output.float().square().sum(), [x, *trained])]


def assert_all_close(tensors: list[Tensor], expected: list[Tensor], rtol: float = 1e-5, atol: float = 1e-6) -> None:
    for tensor, reference in zip(tensors, expected, strict=True):
        torch.testing.assert_close(tensor, reference, rtol=rtol, atol=atol)


@pytest.mark.parametrize("kind", ["plain", "bias", "conv"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_fused_lora_layer_equals_pefts(kind: str, dropout: float) -> None:
    model, layers = with_adapters(Small(kind), dropout)
    x = torch.randn(2, 4, 7)
    for training in (True, False):
        model.train(training)
        for layer in layers:
            vars(layer).pop("forward", None)
        expected = results(model, x)
        assert fuse_layers(model) == 2
        assert_all_close(results(model, x), expected)


def test_a_fused_lora_layer_in_bfloat16() -> None:
    model, layers = with_adapters(Small("plain").bfloat16())
    exact, _ = with_adapters(Small("plain"))
    exact.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    x = torch.randn(2, 4, 7)
    fuse_layers(model)
    rounded = results(model, x.bfloat16())
    assert rounded[0].dtype == torch.bfloat16
    assert {parameter.dtype for layer in layers for parameter in layer.lora_A.parameters()} == {torch.float32}
    for tensor, reference in zip(rounded, results(exact, x), strict=True):
        assert (tensor.float() - reference).norm() < 0.02 * reference.norm()


@pytest.mark.parametrize(("variant", "fused"), [({"use_rslora": True}, True), ({"use_dora": True}, False)])
def test_variants_of_lora(variant: dict[str, bool], fused: bool) -> None:
    model = add_adapter(tiny_model("llama"), Lora(r=4, alpha=8, **variant), 0).train()
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    ids, scale = torch.randint(3, 90, (2, 9)), 8 / 4**0.5 if fused else 8 / 4
    assert layer.scaling["default"] == scale

    def results() -> list[Tensor]:
        logits = model(input_ids=ids).logits
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [logits, *torch.autograd.grad(logits.square().mean(), trained)]

    expected = results()
    fuse_layers(model)
    assert ("forward" in vars(layer)) is fused
    for tensor, reference in zip(results(), expected, strict=True):
        assert (tensor - reference).norm() <= 2e-5 * reference.norm()
    x, base = torch.randn(3, 32), layer.base_layer.weight
    update = base + scale * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    if not fused:
        update = update / update.norm(dim=1, keepdim=True) * layer.lora_magnitude_vector["default"].weight[:, None]
    torch.testing.assert_close(layer(x), x @ update.T, rtol=1e-4, atol=1e-5)


def test_dora_keeps_its_weight_norms_while_decoding_and_no_longer() -> None:
    model = add_adapter(tiny_model("llama"), Lora(r=4, use_dora=True), 0).eval()
    causal_lm, ids = model.get_base_model(), torch.randint(3, 90, (2, 9))
    (magnitude, *_) = [module for module in causal_lm.modules() if isinstance(module, DoraLinearLayer)]
    for seed in (1, 2):  # weights change between two generations
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
            expected = model(input_ids=ids).logits
            with prepacked_adapters(causal_lm, 2):
                for _ in range(2):
                    assert torch.equal(model(input_ids=ids).logits, expected)
                assert magnitude._dora_cache
            assert not magnitude._dora_cache and not magnitude.training


def test_a_layer_with_a_trained_base_is_not_fused() -> None:
    model, layers = with_adapters(Small("bias"))
    layers[0].base_layer.weight.requires_grad_()
    assert fuse_layers(model) == 1
    assert "forward" not in vars(layers[0])


def test_disabled_and_merged_adapters() -> None:
    model, layers = with_adapters(Small("plain"))
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
        ("llama", 3 * (7 + 1 + 2) + 1),  # 7 LoRA layers, an MLP and 2 norms per block, the last norm
        ("qwen2", 3 * (7 + 1 + 2) + 1),
        ("gemma2", 3 * (7 + 1)),  # its norms multiply by 1 + w and are not fused
        ("gpt2", 3 * 4),
        ("gpt_neo", 2 * (6 + 1)),  # 6 LoRA layers and a GELU per block
    ],
)
def test_all_layers_of_a_model(architecture: str, layers: int) -> None:
    """Forward and backward, with and without gradient checkpointing."""
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
    for checkpointing in (False, True):
        switch_activation_checkpointing(model.get_base_model(), on=checkpointing)
        for tensor, reference in zip(gradients(), expected, strict=True):
            assert (tensor - reference).norm() <= 2e-5 * reference.norm()


class ScaleShift(nn.Module):
    """A layer with the attributes of an RMS norm that computes something else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.full((4,), 2.0), requires_grad=False), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def test_a_layer_that_only_looks_like_a_norm_is_not_fused() -> None:
    layer = type("OddRMSNorm", (ScaleShift,), {})()
    assert fuse_layers(nn.Sequential(layer)) == 0
    assert torch.equal(layer(torch.ones(1, 4)), torch.full((1, 4), 2.0))


@pytest.mark.parametrize(
    ("trained", "dtype", "fused"),
    [(False, torch.float32, 1), (True, torch.float32, 0), (False, torch.bfloat16, 0)],
)
def test_only_frozen_float32_norms_are_fused(trained: bool, dtype: torch.dtype, fused: int) -> None:
    norm = LlamaRMSNorm(8).to(dtype).requires_grad_(trained)
    original = copy.deepcopy(norm)
    assert fuse_layers(nn.Sequential(norm)) == fused
    for input_dtype in (dtype, torch.bfloat16):
        x = torch.randn(3, 8).to(input_dtype)
        y = norm(x)
        torch.testing.assert_close(y, original(x), rtol=0 if input_dtype == torch.bfloat16 else 1e-5, atol=0)
        if trained:
            y.float().sum().backward()
            assert norm.weight.grad is not None


@pytest.mark.parametrize(
    ("architecture", "plain", "fused"),
    [
        ("llama", 4, 2),  # gate, up, activation, product
        ("gpt_neo", 5, 2),  # the input and output of the GELU, and three of its steps
    ],
)
def test_a_fused_mlp_saves_fewer_intermediates(architecture: str, plain: int, fused: int) -> None:
    model = add_adapter(tiny_model(architecture), Lora(r=2), 0).train()
    mlp = next(module for name, module in model.named_modules() if name.endswith("0.mlp"))
    x = torch.randn(1, 8, 32, requires_grad=True)
    width = 64 if architecture == "llama" else 128

    def saved_intermediates() -> int:
        """Number of distinct saved tensors with 8 tokens of `width` intermediate features."""
        sizes: dict[int, int] = {}

        def record(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            output = mlp(x)
        del output
        return sum(size == 8 * width for size in sizes.values())

    assert saved_intermediates() == plain
    fuse_layers(model)
    assert saved_intermediates() == fused


@pytest.mark.parametrize("kind", ["plain", "bias", "conv"])
def test_prepacked_adapters(kind: str) -> None:
    model, layers = with_adapters(Small(kind))
    fuse_layers(model)
    x = torch.randn(2, 4, 7)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(x)
        with prepacked_adapters(model, 8):
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
            layers[0].lora_B["default"].weight.zero_()  # the prepacked weight does not change
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
        assert (model(x) - expected).abs().max() > 0.01
    del before["first.lora_B.default.weight"]
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("bias", [True, False])
def test_matrix_products(rows: int, bias: bool) -> None:
    x, weight, offset = torch.randn(rows, 33), torch.randn(65, 33), torch.randn(65) if bias else None
    expected = nn.functional.linear(x.double(), weight.double(), None if offset is None else offset.double()).float()
    packed: Any = prepack(weight, rows)
    for layout in (weight, packed, weight.t().contiguous().t()):
        torch.testing.assert_close(linear(x, layout, offset), expected, rtol=1e-5, atol=1e-4)
    assert linear(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16
    assert prepack(weight.bfloat16(), rows) is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("training", [True, False])
def test_a_fused_gated_mlp_equals_the_original(bias: bool, dropout: float, training: bool) -> None:
    mlp, _ = with_adapters(GatedMlp(bias), dropout)
    mlp.train(training)
    x = torch.randn(2, 4, 6)
    expected = results(mlp, x)
    assert fuse_layers(mlp) == 3 + 1 and mlp.training == training
    assert_all_close(results(mlp, x), expected, atol=1e-5)
    with torch.no_grad():
        mlp.eval()
        torch.testing.assert_close(mlp(x), type(mlp).forward(mlp, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("state", ["disabled", "merged"])
def test_a_fused_gated_mlp_with_a_disabled_or_merged_adapter(state: str) -> None:
    mlp, layers = with_adapters(GatedMlp(bias=True))
    fuse_layers(mlp)
    x = torch.randn(2, 4, 6)
    with torch.no_grad():
        expected = GatedMlp(bias=True)(x) if state == "disabled" else mlp(x)
    for layer in layers:
        layer.merge() if state == "merged" else layer.enable_adapters(False)
    torch.testing.assert_close(mlp(x), expected, rtol=1e-5, atol=1e-5)


def test_a_fused_gated_mlp_in_bfloat16() -> None:
    (mlp, _), (exact, _) = with_adapters(GatedMlp().bfloat16()), with_adapters(GatedMlp())
    exact.load_state_dict({name: value.float() for name, value in mlp.state_dict().items()})
    assert fuse_layers(mlp) == 3 + 1
    x = torch.randn(2, 4, 6)
    for tensor, reference in zip(results(mlp, x.bfloat16()), results(exact, x), strict=True):
        assert (tensor.float() - reference).norm() < 0.03 * reference.norm()


def test_a_layer_that_only_looks_like_a_gated_mlp_is_not_fused() -> None:
    mlp, _ = with_adapters(GatedMlp(clamp=True))
    assert fuse_layers(mlp) == 3
    assert "forward" not in vars(mlp)
