"""Log-probabilities and gradients of packed batches, against those from the model's full logits."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models import naive_logprob, tiny_model, tiny_recipe
from spinlm.errors import ModelError
from spinlm.model import attention
from spinlm.model import logprobs as logprobs_module
from spinlm.model import prefix_trees as trees_module
from spinlm.model.attention import register_tree_attention
from spinlm.model.fused import fuse_layers
from spinlm.model.loading import disable_dropout
from spinlm.model.logprobs import LogitTransform, LogProbs, max_logprob_error
from spinlm.model.players import Players
from spinlm.model.prefix_trees import PrefixTree, pack_batch
from spinlm.rundir.layout import RunDir
from spinlm.training.activation_checkpointing import switch_activation_checkpointing
from spinlm.training.parallel import FSDPStrategy

TREE_ARCHITECTURES = ("llama", "mistral", "qwen2", "gemma2", "gpt2", "gpt_neox", "gpt_neo")
# The layout of the batch is in the attention mask.
MASK_ARCHITECTURES = ("gptj", "codegen", "gpt_neox_japanese", "xglm", "stablelm", "nemotron")
V = 97

register_tree_attention()
Folders = Callable[[str], Path]
both_sharings = pytest.mark.parametrize("prefix_sharing", [True, False], ids=["shared", "unshared"])


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(3, V, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


# Responses longer than the sliding windows of 8, one-token prompts and responses, and two equal responses.
TREES = [
    PrefixTree(ids(12, 1), (ids(9, 2), ids(14, 3), ids(1, 4))),
    PrefixTree(ids(1, 5), (ids(11, 6),)),
    PrefixTree(ids(5, 7), (ids(1, 8), ids(4, 9), ids(4, 9))),
]
RESPONSES = [(tree.prompt, response) for tree in TREES for response in tree.responses]
# Distinct weights, so that mixed-up gradients of two responses do not go unnoticed.
UPSTREAM = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 0.25, -0.75])


def expected_logprobs(model: Any) -> Tensor:
    """Compute log-probabilities from the model's full logits of one unpadded row per response: [S]."""
    return torch.stack([naive_logprob(model, prompt, response) for prompt, response in RESPONSES])


def gradients(model: nn.Module, values: Tensor) -> dict[str, Tensor]:
    """Compute gradients of the responses' weighted log-probabilities, by name of the trained parameter."""
    model.zero_grad()
    (values * UPSTREAM).sum().backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: p.grad.clone() if p.grad is not None else torch.zeros_like(p) for name, p in trained.items()}


def assert_same_gradients(gradient: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Assert that the error of each parameter's gradient is within `tolerance` of the gradient's norm.

    Norms below 2e-3 of the largest count as that. Some gradients, as of the bias on attention keys, are rounding errors
    only.
    """
    assert gradient.keys() == expected.keys()
    floor = 2e-3 * max(grad.norm().item() for grad in expected.values())
    errors = {
        name: ((gradient[name] - grad).norm() / max(grad.norm().item(), floor)).item()
        for name, grad in expected.items()
    }
    assert max(errors.values()) <= tolerance, {name: error for name, error in errors.items() if error > tolerance}


def assert_same_as_full_logits(
    model: Any, prefix_sharing: bool, change: Callable[[Any], object] = lambda model: None
) -> None:
    """Assert that log-probabilities and gradients equal those from the full logits before `change`."""
    expected = expected_logprobs(model)
    expected_gradients = gradients(model, expected)
    change(model)
    packed = LogProbs(model)(pack_batch(TREES, prefix_sharing))
    assert ((packed - expected).abs() / expected.abs()).max() <= 1e-5
    assert_same_gradients(gradients(model, packed), expected_gradients)


@both_sharings
@pytest.mark.parametrize("architecture", (*TREE_ARCHITECTURES, *MASK_ARCHITECTURES))
def test_logprobs_and_gradients(architecture: str, prefix_sharing: bool) -> None:
    assert_same_as_full_logits(tiny_model(architecture, vocabulary=V), prefix_sharing)


@both_sharings
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("gemma2", {"final_logit_softcapping": 0.7, "attn_logit_softcapping": 1.5}),
        ("cohere", {}),  # logit_scale
        ("granite", {}),  # logits_scaling
        ("phi", {"tie_word_embeddings": False}),  # a head with a bias
        ("llama", {"tie_word_embeddings": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_output_heads(architecture: str, changes: dict[str, Any], prefix_sharing: bool) -> None:
    model = tiny_model(architecture, vocabulary=V, **changes)
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        nn.init.normal_(head.bias)
    assert_same_as_full_logits(model, prefix_sharing)


@pytest.mark.parametrize("architecture", ["gpt_neo", "xglm", "stablelm"])
def test_exchanged_attention_can_be_undone(architecture: str) -> None:
    """The model's own forward pass afterwards is its own, to the bit."""
    model = tiny_model(architecture, vocabulary=V)
    rows, logprobs = torch.tensor([ids(30, 20), ids(30, 21)]), LogProbs(model)
    expected = model(input_ids=rows).logits
    logprobs(pack_batch(TREES, True))
    logprobs.use_tree_attention(False)
    assert torch.equal(model(input_ids=rows).logits, expected)


def test_gpt_neo_scores_are_unscaled_and_its_windows_are_those_of_the_layers() -> None:
    """Each of the two properties matters to the log-probabilities of these trees."""
    model = tiny_model("gpt_neo", vocabulary=V)
    expected = expected_logprobs(model)
    for change in ({"window_size": 100}, {"attention_types": [[["local", "global"], 1]]}):
        other = tiny_model("gpt_neo", vocabulary=V, **change)
        assert (expected_logprobs(other) - expected).abs().max() > 0.1
        assert_same_as_full_logits(other, True)


def with_adapter(architecture: str, **settings: Any) -> Any:
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
    model = get_peft_model(tiny_model(architecture, vocabulary=V), config)
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


@both_sharings
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "gpt_neo"])
def test_adapters(architecture: str, prefix_sharing: bool) -> None:
    model = with_adapter(architecture)
    with model.disable_adapter():
        base = expected_logprobs(model)
    assert (expected_logprobs(model) - base).abs().max() > 1  # the adapter has an effect
    assert_same_as_full_logits(model, prefix_sharing)


@both_sharings
@pytest.mark.parametrize("architecture", TREE_ARCHITECTURES)
def test_fused_layers(monkeypatch: pytest.MonkeyPatch, architecture: str, prefix_sharing: bool) -> None:
    """With padding to a whole block of tokens."""
    monkeypatch.setattr(trees_module, "ROW_BLOCK", 16)
    padding = pack_batch(TREES, True).input_ids.shape[1] - sum(map(len, TREES))
    assert padding > 0
    assert_same_as_full_logits(with_adapter(architecture), prefix_sharing, fuse_layers)


@pytest.mark.parametrize(("architecture", "dropout"), [("llama", 0.0), ("llama", 0.5), ("gpt_neo", 0.5)])
def test_gradient_checkpointing_is_bit_identical(architecture: str, dropout: float) -> None:
    """A resumed run may turn checkpointing on, because less memory is free."""
    model = with_adapter(architecture, lora_dropout=dropout).train()
    disable_dropout(model)
    fuse_layers(model)
    logprobs = LogProbs(model)
    results = []
    for on in (False, True, False):
        switch_activation_checkpointing(logprobs.causal_lm, on=on)
        torch.manual_seed(6)
        values = logprobs(pack_batch(TREES, True))
        results.append({"values": values.detach(), **gradients(model, values)})
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in results[0])


@pytest.mark.parametrize("architecture", ["llama", "gpt_neo", "stablelm"])
def test_fsdp_passes_the_layout_on(architecture: str) -> None:
    """With gradient checkpointing, as in a run; values and gradients are the same to the bit."""
    results = []
    for sharded in (False, True):
        logprobs = LogProbs(tiny_model(architecture, vocabulary=V).train())
        disable_dropout(logprobs.causal_lm)
        switch_activation_checkpointing(logprobs.causal_lm, on=True)
        if sharded:
            torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            if sharded:
                FSDPStrategy(logprobs, reshard_after_forward=True)
            values = logprobs(pack_batch(TREES, True))
            trained = gradients(logprobs, values)
            full = {name: full_tensor(gradient) for name, gradient in trained.items()}
            results.append({"values": values.detach(), **full})
        finally:
            if sharded:
                torch.distributed.destroy_process_group()
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def full_tensor(tensor: Any) -> Tensor:
    result: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return result


@pytest.mark.parametrize("architecture", ["llama", "gpt_neo", "xglm"])
def test_checkpointed_layers_keep_their_layout(architecture: str) -> None:
    """Backward computes a layer again with the layout of its batch, not with that of the last forward pass."""
    model = tiny_model(architecture, vocabulary=V).train()
    disable_dropout(model)
    logprobs = LogProbs(model)
    expected = gradients(model, logprobs(pack_batch(TREES, True)))
    switch_activation_checkpointing(model, on=True)
    values = logprobs(pack_batch(TREES, True))
    logprobs(pack_batch(TREES[:1], True))
    assert_same_gradients(gradients(model, values), expected, 1e-6)


@both_sharings
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "cohere", "phi"])
def test_frozen_and_trained_head_give_the_same_hidden_gradients(architecture: str, prefix_sharing: bool) -> None:
    changes = {"final_logit_softcapping": 0.7} if architecture == "gemma2" else {}
    model = tiny_model(architecture, vocabulary=V, tie_word_embeddings=False, **changes)
    logprobs = LogProbs(model)
    values = logprobs(pack_batch(TREES, prefix_sharing))
    trained = gradients(model, values)
    for parameter in model.get_output_embeddings().parameters():
        parameter.requires_grad_(False)
    frozen_values = logprobs(pack_batch(TREES, prefix_sharing))
    frozen = gradients(model, frozen_values)

    assert torch.equal(frozen_values, values)
    assert {name.split(".")[0] for name in trained.keys() - frozen.keys()} == {"lm_head"}
    assert_same_gradients(frozen, {name: trained[name] for name in frozen}, 1e-6)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch, frozen: bool) -> None:
    model = tiny_model("gemma2", vocabulary=V, final_logit_softcapping=0.7, tie_word_embeddings=False)
    model.lm_head.requires_grad_(not frozen)
    logprobs = LogProbs(model)
    results = []
    for rows in (1000, 16, 17):  # 44 predicted tokens
        monkeypatch.setattr(logprobs_module, "CHUNK_ELEMENTS", rows * V)
        values = logprobs(pack_batch(TREES, True))
        results.append((values.detach(), gradients(model, values)))
    for values, grads in results[1:]:
        torch.testing.assert_close(values, results[0][0], rtol=1e-6, atol=0)
        assert_same_gradients(grads, results[0][1], 1e-6)


class LargestLogits(TorchDispatchMode):
    """Records the size of the largest tensor [..., V], except the transposed head."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.shape[-1:] == (V,) and func != torch.ops.aten.t.default:
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@both_sharings
def test_memory_of_logits_is_one_chunk(monkeypatch: pytest.MonkeyPatch, prefix_sharing: bool, frozen: bool) -> None:
    rows = 16  # of 44 predicted tokens
    monkeypatch.setattr(logprobs_module, "CHUNK_ELEMENTS", rows * V)
    model = tiny_model("llama", vocabulary=V)
    model.lm_head.requires_grad_(not frozen)
    with LargestLogits() as full:
        gradients(model, expected_logprobs(model))
    with LargestLogits() as chunked:
        gradients(model, LogProbs(model)(pack_batch(TREES, prefix_sharing)))
    assert full.largest == max(len(prompt) + len(response) for prompt, response in RESPONSES) * V
    assert chunked.largest == rows * V


def test_logit_transform_by_hand() -> None:
    hidden, weight, bias = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([1.0, 0.0])
    assert LogitTransform().logits(hidden, weight, bias).tolist() == [[4.0, 2.0]]
    assert LogitTransform(scale=0.5).logits(hidden, weight, bias).tolist() == [[2.0, 1.0]]
    capped = LogitTransform(scale=0.5, softcap=4.0).logits(hidden, weight, bias)
    assert capped[0].tolist() == pytest.approx([4 * math.tanh(0.5), 4 * math.tanh(0.25)])


def test_token_logprobs_add_up_to_responses() -> None:
    logprobs = LogProbs(tiny_model("llama", vocabulary=V))
    batch = pack_batch(TREES, True)
    parts = logprobs.token_logprobs(batch).split([len(response) for _, response in RESPONSES])
    torch.testing.assert_close(logprobs(batch), torch.stack([part.sum() for part in parts]))


@both_sharings
def test_features_are_mean_hidden_states(prefix_sharing: bool) -> None:
    model = tiny_model("llama", vocabulary=V).eval()
    means = []
    for prompt, response in RESPONSES:
        hidden = model.model(torch.tensor([[*prompt, *response]])).last_hidden_state[0]
        means.append(hidden[len(prompt) - 1 : -1].mean(dim=0))
    logprobs = LogProbs(model)
    batch = pack_batch(TREES, prefix_sharing)
    values, features = logprobs.logprobs_and_features(batch)
    torch.testing.assert_close(values, logprobs(batch))
    torch.testing.assert_close(features, torch.stack(means), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", TREE_ARCHITECTURES)
def test_a_token_changes_only_later_tokens_of_its_response(architecture: str) -> None:
    logprobs = LogProbs(tiny_model(architecture, vocabulary=V))
    before = logprobs.token_logprobs(pack_batch(TREES, True))
    first, second, third = TREES[0].responses
    changed = [*second[:3], 3 + (second[3] - 2) % (V - 3), *second[4:]]
    trees = [PrefixTree(TREES[0].prompt, (first, changed, third)), *TREES[1:]]
    difference = (before - logprobs.token_logprobs(pack_batch(trees, True))).abs()
    start, end = len(first) + 3, len(first) + len(second)  # from the changed token to the end of its response
    assert difference[:start].max() < 1e-5
    assert difference[start:end].min() > 1e-5
    assert difference[end:].max() < 1e-5


@both_sharings
def test_bfloat16_autocast_over_float32_weights(prefix_sharing: bool) -> None:
    model = tiny_model("llama", vocabulary=V)
    batch = pack_batch(TREES, prefix_sharing)
    expected, values = LogProbs(model)(batch), LogProbs(model, autocast=torch.bfloat16)(batch)
    error = ((expected - values).abs() / torch.tensor([len(response) for _, response in RESPONSES])).max()
    assert 1e-4 < error < 0.15
    assert {gradient.dtype for gradient in gradients(model, values).values()} == {torch.float32}


def test_bfloat16_autocast_of_a_head_with_a_bias() -> None:
    model = tiny_model("phi", vocabulary=V)
    assert max_logprob_error(LogProbs(model, autocast=torch.bfloat16), TREES, False) < 0.15


def test_an_adapter_on_the_head_is_refused() -> None:
    config = LoraConfig(r=4, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ModelError, match=r"lora\.target_modules: .*output head"):
        LogProbs(get_peft_model(tiny_model("llama", vocabulary=V), config))


# Whether a run shares prefixes


@pytest.mark.parametrize(
    ("architecture", "setting", "expected"),
    [
        ("llama", "auto", True),
        ("llama", "always", True),
        ("llama", "never", False),
        ("mistral", "auto", True),
        ("gpt_neo", "auto", True),
        ("gpt_neo", "always", True),
        ("gpt_neo", "never", False),
        ("gptj", "auto", True),
        ("stablelm", "auto", True),
        ("bloom", "auto", False),  # ALiBi
        ("bloom", "never", False),
        ("mpt", "auto", False),
        ("falcon", "auto", False),
    ],
)
def test_prefix_sharing_depends_on_model_and_recipe(
    model_folder: Folders, tmp_path: Path, architecture: str, setting: str, expected: bool
) -> None:
    recipe = tiny_recipe(model_folder(architecture), lora={"r": 4}, train={"prefix_sharing": setting})
    assert Players(recipe, RunDir(tmp_path)).measure_prefix_sharing(TREES) is expected


@pytest.mark.parametrize("architecture", ["bloom", "falcon"])
def test_prefix_sharing_on_request_is_an_error_where_it_does_not_work(
    model_folder: Folders, tmp_path: Path, architecture: str
) -> None:
    recipe = tiny_recipe(model_folder(architecture), lora={"r": 4}, train={"prefix_sharing": "always"})
    with pytest.raises(ModelError, match=r"train\.prefix_sharing"):
        Players(recipe, RunDir(tmp_path)).measure_prefix_sharing(TREES)


@pytest.mark.parametrize("architecture", ["bloom", "mpt", "falcon"])
def test_bfloat16_does_not_hide_wrong_attention(model_folder: Folders, tmp_path: Path, architecture: str) -> None:
    """With short responses to a long prompt, attention to other branches changes little."""
    trees = [PrefixTree(ids(60, 10), (ids(4, 11), ids(5, 12))), PrefixTree(ids(40, 13), (ids(6, 14), ids(3, 15)))]
    for dtype in ("float32", "bfloat16"):
        recipe = tiny_recipe(model_folder(architecture), lora={"r": 4}, model={"dtype": dtype})
        assert Players(recipe, RunDir(tmp_path / dtype)).measure_prefix_sharing(trees) is False, dtype


@pytest.mark.parametrize("architecture", ["gpt_neo", "codegen"])
def test_bfloat16_does_not_hide_attention_to_other_branches(
    model_folder: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    trees = [PrefixTree(ids(60, 10), (ids(4, 11), ids(5, 12))), PrefixTree(ids(40, 13), (ids(6, 14), ids(3, 15)))]
    monkeypatch.setattr(attention, "_segments", lambda spans, length: [attention._Segment(length, 0, 0)])
    recipe = tiny_recipe(model_folder(architecture), lora={"r": 4}, model={"dtype": "bfloat16"})
    assert Players(recipe, RunDir(tmp_path)).measure_prefix_sharing(trees) is False


@pytest.mark.parametrize("architecture", ["llama", "gpt_neo", "gptj", "codegen"])
def test_prefix_sharing_in_bfloat16(model_folder: Folders, tmp_path: Path, architecture: str) -> None:
    recipe = tiny_recipe(model_folder(architecture), lora={"r": 4}, model={"dtype": "bfloat16"})
    assert Players(recipe, RunDir(tmp_path)).measure_prefix_sharing(TREES) is True


def test_prefix_sharing_is_decided_once_per_run(model_folder: Folders, tmp_path: Path) -> None:
    recipe = tiny_recipe(model_folder("llama"), lora={"r": 4})
    assert Players(recipe, RunDir(tmp_path)).measure_prefix_sharing(TREES) is True
    record = RunDir(tmp_path).prefix_sharing
    record.write_text(record.read_text().replace('"prefix_sharing": true', '"prefix_sharing": false'))
    assert Players(recipe, RunDir(tmp_path)).measure_prefix_sharing(TREES) is False
