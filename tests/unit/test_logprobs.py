"""Log-probabilities and their gradients, packed in every way, against the model's own full logits."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models import save_tiny_model, tiny_model, tiny_recipe
from spinlm.errors import ModelError
from spinlm.model import logprobs as logprobs_module
from spinlm.model import prefix_trees as trees_module
from spinlm.model.attention import register_tree_attention
from spinlm.model.fused import fuse_layers
from spinlm.model.logprobs import LogitTransform, LogProbs, max_logprob_error
from spinlm.model.players import Players
from spinlm.model.prefix_trees import PrefixTree, pack_batch
from spinlm.rundir.layout import RunDir
from spinlm.training.activation_checkpointing import switch_checkpointing

SHARINGS = (True, False)
TAKES_TREES = ("llama", "mistral", "qwen2", "gemma2", "gpt2", "gpt_neox")
V = 97

register_tree_attention()


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(3, V, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


# Some are longer than the sliding windows of 8; there are one-token prompts and responses, and two equal responses.
TREES = [
    PrefixTree(ids(12, 1), (ids(9, 2), ids(14, 3), ids(1, 4))),
    PrefixTree(ids(1, 5), (ids(11, 6),)),
    PrefixTree(ids(5, 7), (ids(1, 8), ids(4, 9), ids(4, 9))),
]
RESPONSES = [(tree.prompt, response) for tree in TREES for response in tree.responses]
# Weights of different size and sign, so that no response's gradient can stand in for another's.
UPSTREAM = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 0.25, -0.75])


def plain_logprobs(model: Any) -> Tensor:
    """One unpadded row for each response, all logits of the model itself: [S]."""
    found = []
    for prompt, response in RESPONSES:
        logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0].float()
        table = torch.log_softmax(logits, dim=-1)
        found.append(torch.stack([table[len(prompt) - 1 + place, token] for place, token in enumerate(response)]).sum())
    return torch.stack(found)


def gradients(model: nn.Module, values: Tensor) -> dict[str, Tensor]:
    """Of the weighted sum of the responses' log-probabilities, by name of the trained parameter."""
    model.zero_grad()
    (values * UPSTREAM).sum().backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: p.grad.clone() if p.grad is not None else torch.zeros_like(p) for name, p in trained.items()}


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Each parameter's error is within `tolerance` of its own gradient's norm.

    A gradient that is zero but for rounding, as that of a bias on attention keys, has no digits to compare: norms below
    1e-3 of the largest parameter's count as that.
    """
    assert ours.keys() == theirs.keys()
    floor = 1e-3 * max(gradient.norm().item() for gradient in theirs.values())
    wrong = {
        name: ((ours[name] - theirs[name]).norm() / max(theirs[name].norm().item(), floor)).item() for name in theirs
    }
    assert max(wrong.values()) <= tolerance, {name: error for name, error in wrong.items() if error > tolerance}


def assert_parity(model: Any, prefix_sharing: bool, change: Callable[[Any], object] = lambda model: None) -> None:
    """Log-probabilities and all gradients equal the plain ones to 1e-5, relatively, whatever is changed in between."""
    plain = plain_logprobs(model)
    theirs = gradients(model, plain)

    change(model)
    packed = LogProbs(model)(pack_batch(TREES, prefix_sharing))
    ours = gradients(model, packed)

    assert ((packed - plain).abs() / plain.abs()).max() <= 1e-5
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("prefix_sharing", SHARINGS)
@pytest.mark.parametrize("architecture", TAKES_TREES)
def test_log_probabilities_and_gradients_are_the_plain_ones(architecture: str, prefix_sharing: bool) -> None:
    assert_parity(tiny_model(architecture, vocabulary=V), prefix_sharing)


@pytest.mark.parametrize("prefix_sharing", SHARINGS)
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("gemma2", {"final_logit_softcapping": 0.7, "attn_logit_softcapping": 1.5}),
        ("cohere", {}),  # logits times logit_scale
        ("granite", {}),  # logits over logits_scaling
        ("phi", {"tie_word_embeddings": False}),  # a head with a bias
        ("llama", {"tie_word_embeddings": True}),  # the head's weights are also the embedding's
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_every_shape_of_head(architecture: str, changes: dict[str, Any], prefix_sharing: bool) -> None:
    model = tiny_model(architecture, vocabulary=V, **changes)
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        nn.init.normal_(head.bias)
    assert_parity(model, prefix_sharing)


@pytest.mark.parametrize("prefix_sharing", SHARINGS)
def test_gpt_neo_cannot_take_trees_but_pairs(prefix_sharing: bool) -> None:
    model = tiny_model("gpt_neo", vocabulary=V)
    if not prefix_sharing:
        assert_parity(model, prefix_sharing)
    else:
        with pytest.raises(ModelError, match="cannot be replaced"):
            max_logprob_error(LogProbs(model), TREES, prefix_sharing)


def with_adapter(architecture: str, **settings: Any) -> Any:
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
    model = get_peft_model(tiny_model(architecture, vocabulary=V), config)
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.parametrize("prefix_sharing", SHARINGS)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_adapters_have_the_plain_gradients(architecture: str, prefix_sharing: bool) -> None:
    model = with_adapter(architecture)
    with model.disable_adapter():
        base = plain_logprobs(model)
    assert (plain_logprobs(model) - base).abs().max() > 1  # the adapter matters, so that parity says something
    assert_parity(model, prefix_sharing)


@pytest.mark.parametrize("prefix_sharing", SHARINGS)
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "gemma2", "gpt2", "gpt_neox"])
def test_fused_layers_have_the_plain_gradients(
    monkeypatch: pytest.MonkeyPatch, architecture: str, prefix_sharing: bool
) -> None:
    """In a row that is padded to a whole block, too."""
    monkeypatch.setattr(trees_module, "ROW_BLOCK", 16)
    padding = pack_batch(TREES, True).input_ids.shape[1] - sum(map(len, TREES))
    assert padding > 0
    assert_parity(with_adapter(architecture), prefix_sharing, fuse_layers)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradient_checkpointing_changes_nothing_to_the_bit(dropout: float) -> None:
    """A run that is continued may find less memory free than it began with."""
    model = with_adapter("llama", lora_dropout=dropout).train()
    fuse_layers(model)
    logprobs = LogProbs(model)
    found = []
    for on in (False, True, False):
        switch_checkpointing(logprobs.causal_lm, on=on)
        torch.manual_seed(6)
        values = logprobs(pack_batch(TREES, True))
        found.append({"values": values.detach(), **gradients(model, values)})
    for other in found[1:]:
        assert all(torch.equal(other[name], found[0][name]) for name in found[0])


@pytest.mark.parametrize("prefix_sharing", SHARINGS)
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
    found = []
    for rows in (1000, 16, 17):  # 44 predicted tokens
        monkeypatch.setattr(logprobs_module, "CHUNK_ELEMENTS", rows * V)
        values = logprobs(pack_batch(TREES, True))
        found.append((values.detach(), gradients(model, values)))
    for values, grads in found[1:]:
        torch.testing.assert_close(values, found[0][0], rtol=1e-6, atol=0)
        assert_same_gradients(grads, found[0][1], 1e-6)


class LargestLogits(TorchDispatchMode):
    """Remembers the largest tensor with the vocabulary as its last dimension, the transposed head aside."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.shape[-1:] == (V,) and func != torch.ops.aten.t.default:
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("prefix_sharing", SHARINGS)
def test_logits_are_never_held_but_for_one_chunk(
    monkeypatch: pytest.MonkeyPatch, prefix_sharing: bool, frozen: bool
) -> None:
    rows = 16  # of 44 predicted tokens
    monkeypatch.setattr(logprobs_module, "CHUNK_ELEMENTS", rows * V)
    model = tiny_model("llama", vocabulary=V)
    model.lm_head.requires_grad_(not frozen)
    with LargestLogits() as plain:
        gradients(model, plain_logprobs(model))
    with LargestLogits() as ours:
        gradients(model, LogProbs(model)(pack_batch(TREES, prefix_sharing)))
    assert plain.largest == max(len(prompt) + len(response) for prompt, response in RESPONSES) * V  # it can see them
    assert ours.largest == rows * V


def test_head_shape_by_hand() -> None:
    hidden, weight, bias = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([1.0, 0.0])
    assert LogitTransform().logits(hidden, weight, bias).tolist() == [[4.0, 2.0]]
    assert LogitTransform(scale=0.5).logits(hidden, weight, bias).tolist() == [[2.0, 1.0]]
    capped = LogitTransform(scale=0.5, softcap=4.0).logits(hidden, weight, bias)
    assert capped[0].tolist() == pytest.approx([4 * math.tanh(0.5), 4 * math.tanh(0.25)])


def test_tokens_add_up_to_responses() -> None:
    logprobs = LogProbs(tiny_model("llama", vocabulary=V))
    batch = pack_batch(TREES, True)
    length_normalize = logprobs.token_logprobs(batch)
    assert length_normalize.shape == (sum(len(response) for _, response in RESPONSES),)
    sums = [part.sum() for part in length_normalize.split([len(response) for _, response in RESPONSES])]
    torch.testing.assert_close(logprobs(batch), torch.stack(sums))


@pytest.mark.parametrize("prefix_sharing", SHARINGS)
def test_reading_gives_log_probabilities_and_the_mean_state_of_each_response(prefix_sharing: bool) -> None:
    model = tiny_model("llama", vocabulary=V).eval()
    bodies = [model.model(torch.tensor([[*prompt, *response]])).last_hidden_state[0] for prompt, response in RESPONSES]
    states = [body[len(prompt) - 1 : -1].mean(dim=0) for body, (prompt, _) in zip(bodies, RESPONSES, strict=True)]
    logprobs = LogProbs(model)
    batch = pack_batch(TREES, prefix_sharing)
    values, features = logprobs.logprobs_and_features(batch)
    torch.testing.assert_close(values, logprobs(batch))
    torch.testing.assert_close(features, torch.stack(states), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", TAKES_TREES)
def test_a_token_changes_only_what_follows_it_in_its_own_branch(architecture: str) -> None:
    """Per-token log-probabilities, to a rounding error."""
    logprobs = LogProbs(tiny_model(architecture, vocabulary=V))
    before = logprobs.token_logprobs(pack_batch(TREES, True))
    first, second, third = TREES[0].responses
    other = [*second[:3], 3 + (second[3] - 2) % (V - 3), *second[4:]]
    after = logprobs.token_logprobs(pack_batch([PrefixTree(TREES[0].prompt, (first, other, third)), *TREES[1:]], True))

    apart = (before - after).abs()
    start = len(first) + 3  # the changed token itself is predicted differently, and all that follow it
    assert apart[:start].max() < 1e-5
    assert apart[start : len(first) + len(second)].min() > 1e-5
    assert apart[len(first) + len(second) :].max() < 1e-5


def test_computing_in_bfloat16_over_float32_weights() -> None:
    model = tiny_model("llama", vocabulary=V)
    exact, rough = LogProbs(model), LogProbs(model, autocast=torch.bfloat16)
    for prefix_sharing in SHARINGS:
        batch = pack_batch(TREES, prefix_sharing)
        gap = ((exact(batch) - rough(batch)).abs() / torch.tensor([len(r) for _, r in RESPONSES])).max()
        assert 1e-4 < gap < 0.15
        assert {gradient.dtype for gradient in gradients(model, rough(batch)).values()} == {torch.float32}


def test_a_head_with_a_bias_in_bfloat16_over_float32_weights() -> None:
    model = tiny_model("phi", vocabulary=V)
    assert max_logprob_error(LogProbs(model, autocast=torch.bfloat16), TREES, False) < 0.15


def test_an_adapter_on_the_head_is_refused() -> None:
    config = LoraConfig(r=4, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ModelError, match=r"lora\.target_modules: .*output head"):
        LogProbs(get_peft_model(tiny_model("llama", vocabulary=V), config))


# Which batch a run uses


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folders: dict[str, Path] = {}

    def save(architecture: str) -> Path:
        if architecture not in folders:
            folders[architecture] = save_tiny_model(tmp_path_factory.mktemp(architecture), architecture)
        return folders[architecture]

    return save


@pytest.mark.parametrize(
    ("architecture", "wanted", "chosen"),
    [
        ("llama", "auto", True),
        ("llama", "always", True),
        ("llama", "never", False),
        ("mistral", "auto", True),
        ("gpt_neo", "auto", False),
        ("gpt_neo", "never", False),
        ("bloom", "auto", False),
        ("stablelm", "auto", False),  # does not hand down what the tree attention needs
        ("stablelm", "never", False),
        ("nemotron", "auto", False),
    ],
)
def test_prefix_sharing_is_what_the_model_can_take(
    saved: Any, tmp_path: Path, architecture: str, wanted: str, chosen: bool
) -> None:
    recipe = tiny_recipe(saved(architecture), lora={"r": 4}, train={"prefix_sharing": wanted})
    assert Players(recipe, RunDir(tmp_path)).measure_prefix_sharing(TREES) == chosen


@pytest.mark.parametrize("architecture", ["gpt_neo", "stablelm"])
def test_trees_where_the_model_cannot_take_them_are_an_error(saved: Any, tmp_path: Path, architecture: str) -> None:
    recipe = tiny_recipe(saved(architecture), lora={"r": 4}, train={"prefix_sharing": "always"})
    with pytest.raises(ModelError, match=r"cannot take prefix trees.*Set train\.prefix_sharing: auto or never"):
        Players(recipe, RunDir(tmp_path)).measure_prefix_sharing(TREES)


@pytest.mark.parametrize("architecture", ["gpt_neo", "gptj", "bloom"])
def test_bfloat16_does_not_hide_that_a_model_cannot_take_trees(saved: Any, tmp_path: Path, architecture: str) -> None:
    """Short responses to a long prompt: what a branch should not see is little beside what it should."""
    trees = [PrefixTree(ids(60, 10), (ids(4, 11), ids(5, 12))), PrefixTree(ids(40, 13), (ids(6, 14), ids(3, 15)))]
    for dtype in ("float32", "bfloat16"):
        recipe = tiny_recipe(saved(architecture), lora={"r": 4}, model={"dtype": dtype})
        assert Players(recipe, RunDir(tmp_path / dtype)).measure_prefix_sharing(trees) is False, dtype


def test_bfloat16_does_not_stand_in_the_way_of_trees(saved: Any, tmp_path: Path) -> None:
    recipe = tiny_recipe(saved("llama"), lora={"r": 4}, model={"dtype": "bfloat16"})
    assert Players(recipe, RunDir(tmp_path)).measure_prefix_sharing(TREES) is True


def test_prefix_sharing_is_decided_once_for_a_run(saved: Any, tmp_path: Path) -> None:
    recipe = tiny_recipe(saved("llama"), lora={"r": 4})
    assert Players(recipe, RunDir(tmp_path)).measure_prefix_sharing(TREES) is True
    noted = RunDir(tmp_path).prefix_sharing
    noted.write_text(noted.read_text().replace('"prefix_sharing": true', '"prefix_sharing": false'))
    assert Players(recipe, RunDir(tmp_path)).measure_prefix_sharing(TREES) is False
