"""Packed batches by hand and by property, and tree attention against attention under a dense mask."""

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models import tiny_model
from spinlm.model import attention
from spinlm.model.attention import AttentionShape, BlockMasks, flex_attention_works, tree_attention
from spinlm.model.kernels import ROW_BLOCK
from spinlm.model.prefix_trees import PackedBatch, PrefixTree, TreeSpan, micro_batches, pack_batch

TREES = [PrefixTree([10, 11, 12], ([20, 21, 22], [30], [40, 41])), PrefixTree([50], ([60],))]


def test_one_row_with_prefix_sharing() -> None:
    batch = pack_batch(TREES, prefix_sharing=True)
    #                                  prompt       | 1     | 3 | prompt
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21, 40, 50]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0]]
    assert batch.logits_indices.tolist() == [2, 3, 4, 2, 2, 5, 6]
    assert batch.targets.tolist() == [20, 21, 22, 30, 40, 41, 60]
    assert batch.response_indices.tolist() == [0, 0, 0, 1, 2, 2, 3]
    assert batch.num_responses == 4
    assert batch.spans == (TreeSpan(0, 3, ((3, 2), (5, 0), (5, 1))), TreeSpan(6, 1, ((7, 0),)))
    assert [len(tree) for tree in TREES] == [6, 1]


def test_one_row_per_response_without_prefix_sharing() -> None:
    batch = pack_batch(TREES, prefix_sharing=False)
    assert batch.input_ids.tolist() == [
        [10, 11, 12, 20, 21],
        [10, 11, 12, 0, 0],
        [10, 11, 12, 40, 0],
        [50, 0, 0, 0, 0],
    ]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 4
    assert batch.logits_indices.tolist() == [2, 3, 4, 7, 12, 13, 15]
    assert batch.targets.tolist() == [20, 21, 22, 30, 40, 41, 60]
    assert batch.response_indices.tolist() == [0, 0, 0, 1, 2, 2, 3]
    assert batch.num_responses == 4
    assert batch.spans is None


token_lists = st.lists(st.integers(0, 99), min_size=1, max_size=6)
prefix_trees = st.builds(PrefixTree, token_lists, st.lists(token_lists, min_size=1, max_size=4).map(tuple))


def visible_indices(spans: tuple[TreeSpan, ...], row_length: int) -> list[list[int]]:
    """For each index in a row, the indices it may attend to: its tree's prompt and its own branch, up to itself.

    Padding at the end of the row counts as a tree.
    """
    owner: list[tuple[int, int]] = []  # tree, and branch or −1 for the prompt
    for number, span in enumerate(spans):
        assert span.start == len(owner)
        owner += [(number, -1)] * span.prompt_length
        for branch, (start, length) in enumerate(span.branches):
            assert start == len(owner)
            owner += [(number, branch)] * length
    assert row_length - len(owner) in range(ROW_BLOCK)
    owner += [(len(spans), -1)] * (row_length - len(owner))
    return [
        [j for j in range(i + 1) if owner[j] in {(tree, -1), (tree, branch)}] for i, (tree, branch) in enumerate(owner)
    ]


def contexts(batch: PackedBatch) -> list[list[tuple[int, int]]]:
    """The (position, token) pairs that each predicted token is predicted from."""
    rows, length = batch.input_ids.shape
    ids, positions = batch.input_ids.flatten().tolist(), batch.position_ids.flatten().tolist()
    if batch.spans is None:
        visible = [list(range(index - index % length, index + 1)) for index in range(rows * length)]
    else:
        visible = visible_indices(batch.spans, length)
    return [[(positions[j], ids[j]) for j in visible[index]] for index in batch.logits_indices.tolist()]


@pytest.mark.parametrize("prefix_sharing", [True, False])
@given(trees=st.lists(prefix_trees, min_size=1, max_size=5))
@settings(max_examples=100, deadline=None)
def test_every_response_token_is_predicted_once_from_its_prefix(prefix_sharing: bool, trees: list[PrefixTree]) -> None:
    batch = pack_batch(trees, prefix_sharing)
    responses = [(tree.prompt, response) for tree in trees for response in tree.responses]
    expected = [
        (number, token, list(enumerate([*prompt, *response[:index]])))
        for number, (prompt, response) in enumerate(responses)
        for index, token in enumerate(response)
    ]
    packed = list(zip(batch.response_indices.tolist(), batch.targets.tolist(), contexts(batch), strict=True))
    assert packed == expected
    assert batch.num_responses == len(responses)
    if prefix_sharing:
        tokens = sum(len(tree) for tree in trees)
        padded = tokens if tokens <= ROW_BLOCK else math.ceil(tokens / ROW_BLOCK) * ROW_BLOCK
        assert batch.input_ids.shape == (1, padded)


def test_micro_batches_by_hand() -> None:
    trees = [PrefixTree([0] * length, ([1],)) for length in (4, 9, 2, 4, 3)]
    assert micro_batches(trees, 8) == [[1], [0, 3], [4, 2]]  # from the longest; the tree over the budget is alone
    assert micro_batches(trees, 100) == [[1, 0, 3, 4, 2]]
    assert micro_batches(trees, 1) == [[1], [0], [3], [4], [2]]
    assert micro_batches([], 8) == []


@pytest.mark.parametrize("prefix_sharing", [True, False])
@given(trees=st.lists(prefix_trees, max_size=12), budget=st.integers(1, 60))
@settings(max_examples=100, deadline=None)
def test_micro_batches_cover_all_trees_within_the_budget(
    prefix_sharing: bool, trees: list[PrefixTree], budget: int
) -> None:
    """Every response is in one micro-batch, whose tensor has at most `budget` elements, padding included."""
    batches = micro_batches(trees, budget, prefix_sharing)
    assert Counter(index for indices in batches for index in indices) == Counter(range(len(trees)))
    for indices in batches:
        batch = pack_batch([trees[index] for index in indices], prefix_sharing)
        assert batch.num_responses == sum(len(trees[index].responses) for index in indices)
        assert len(indices) == 1 or batch.input_ids.numel() <= budget


# Attention

BATCHES = [
    TREES,
    [PrefixTree([1] * 7, ([2] * 9, [3] * 4, [4], [5] * 12))],
    [PrefixTree([1] * 40, ([2] * 9, [3] * 30)), PrefixTree([1] * 5, ([2] * 4,))],
    [
        PrefixTree([1], ([2],)),
        PrefixTree([1] * 3, ([2], [3] * 6)),
        PrefixTree([1] * 11, ([2] * 5, [3] * 5)),
        PrefixTree([1], ([2] * 8,) * 3),
    ],
]
BATCH_NAMES = ["small", "long", "padded", "many"]


def random_qkv(length: int, heads: int, kv_heads: int, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    return (
        3 * torch.randn(1, heads, length, size),
        torch.randn(1, kv_heads, length, size),
        torch.randn(1, kv_heads, length, size),
    )


def dense_attention(
    batch: PackedBatch,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """Compute attention for one query and one head at a time, in float64: [1, L, H, E]."""
    assert batch.spans is not None
    query, key, value = query.double(), key.double(), value.double()
    positions = batch.position_ids[0].tolist()
    _, heads, length, size = query.shape
    output = torch.zeros(1, length, heads, size, dtype=torch.float64)
    for i, visible in enumerate(visible_indices(batch.spans, length)):
        near = [j for j in visible if window is None or positions[i] - positions[j] < window]
        for head in range(heads):
            kv_head = head // (heads // key.shape[1])
            scores = key[0, kv_head, near] @ query[0, head, i] * (1 / math.sqrt(size) if scaling is None else scaling)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            output[0, i, head] = torch.softmax(scores, dim=0) @ value[0, kv_head, near]
    return output


@pytest.fixture(params=["segments", "FlexAttention"])
def block_masks(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[[PackedBatch], BlockMasks | None]:
    """A function that returns None, or the batch's block masks with FlexAttention running uncompiled."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(attention, "_flex_attention", lambda: flex_attention)
    if request.param == "segments":
        return lambda batch: None
    return lambda batch: BlockMasks(batch.spans or (), batch.position_ids)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("trees", BATCHES, ids=BATCH_NAMES)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=["mha", "gqa"])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_tree_attention_equals_attention_under_a_dense_mask(
    block_masks: Callable[[PackedBatch], BlockMasks | None],
    trees: list[PrefixTree],
    heads: tuple[int, int],
    window: int | None,
    softcap: float | None,
    scaling: float | None,
) -> None:
    batch = pack_batch(trees, prefix_sharing=True)
    qkv = random_qkv(batch.input_ids.shape[1], *heads)
    output, weights = tree_attention(
        torch.nn.Module(),
        *qkv,
        None,
        scaling=scaling,
        softcap=softcap,
        sliding_window=window,
        spans=batch.spans,
        block_masks=block_masks(batch),
    )
    tokens = sum(map(len, trees))
    expected = dense_attention(batch, *qkv, scaling, softcap, window)
    assert torch.isfinite(output).all()
    torch.testing.assert_close(output[:, :tokens].double(), expected[:, :tokens], rtol=1e-5, atol=1e-6)
    assert weights is None


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("trees", BATCHES, ids=BATCH_NAMES)
def test_a_token_changes_only_outputs_that_attend_to_it(
    trees: list[PrefixTree], window: int | None, softcap: float | None
) -> None:
    """Bit for bit, whatever the other branches, other trees and later tokens contain."""
    batch = pack_batch(trees, prefix_sharing=True)
    assert batch.spans is not None
    length, tokens = batch.input_ids.shape[1], sum(map(len, trees))
    positions = batch.position_ids[0].tolist()
    visible = visible_indices(batch.spans, length)
    query, key, value = random_qkv(length, 4, 2)

    def attend() -> Tensor:
        return tree_attention(
            torch.nn.Module(), query, key, value, None, softcap=softcap, sliding_window=window, spans=batch.spans
        )[0]

    before = attend()
    for j in range(length):
        original = key[:, :, j].clone(), value[:, :, j].clone()
        key[:, :, j], value[:, :, j] = -original[0], original[1] + 1
        after = attend()
        key[:, :, j], value[:, :, j] = original
        changed = (before != after).any(dim=-1).any(dim=-1)[0].tolist()
        expected = [j in visible[i] and (window is None or positions[i] - positions[j] < window) for i in range(length)]
        assert changed[:tokens] == expected[:tokens]


def test_gradients_of_tree_attention_equal_those_under_a_dense_mask() -> None:
    batch = pack_batch(BATCHES[3], prefix_sharing=True)
    qkv = [tensor.requires_grad_() for tensor in random_qkv(batch.input_ids.shape[1], 4, 2)]
    upstream = torch.randn(1, batch.input_ids.shape[1], 4, 8)
    output, _ = tree_attention(torch.nn.Module(), *qkv, None, sliding_window=5, spans=batch.spans)
    expected = dense_attention(batch, *qkv, None, None, 5)
    gradients = torch.autograd.grad(output, qkv, upstream)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected, qkv, upstream.double()), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5)


def test_block_masks_are_built_once_per_window() -> None:
    batch = pack_batch(BATCHES[1], prefix_sharing=True)
    masks = BlockMasks(batch.spans or (), batch.position_ids)
    assert masks.get(None) is masks.get(None) and masks.get(4) is masks.get(4) and masks.get(4) is not masks.get(None)


def test_a_failure_of_flex_attention_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a CPU FlexAttention has no backward pass. The check works in inference mode, too."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(attention, "_flex_attention", lambda: flex_attention)
    with torch.inference_mode():
        assert not flex_attention_works(torch.device("cpu"), torch.float32, AttentionShape(4, 2, 8, None, None))
    assert "FlexAttention is not used: NotImplementedError" in caplog.text


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_check_of_flex_attention_compares_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(attention, "_flex_attention", lambda: flex_attention)
    monkeypatch.setattr(torch.autograd, "grad", lambda out, inputs: [])  # no backward pass on a CPU
    monkeypatch.setattr(Tensor, "requires_grad_", lambda tensor: tensor)
    arguments = torch.device("cpu"), torch.float32, AttentionShape(4, 2, 8, 1.5, 70)
    for window in (None, 70):
        assert attention._flex_agrees(*arguments, window, attention._TEST_TREES)
    monkeypatch.setattr(BlockMasks, "mask_mod", lambda self, window: lambda b, h, q, k: q >= k)
    assert not attention._flex_agrees(*arguments, None, attention._TEST_TREES)


def test_flex_attention_with_wrong_results_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cpu = torch.device("cpu"), torch.float32
    monkeypatch.setattr(attention, "_flex_agrees", lambda *arguments: arguments[3] is None)  # wrong under a window
    assert flex_attention_works(*cpu, AttentionShape(1, 1, 3, None, None))
    assert "differ" not in caplog.text
    assert not flex_attention_works(*cpu, AttentionShape(1, 1, 3, None, 9))
    assert "differ" in caplog.text


def test_out_of_memory_in_the_check_of_flex_attention_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: object) -> bool:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(attention, "_flex_agrees", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        flex_attention_works(torch.device("cpu"), torch.float32, AttentionShape(1, 1, 4, None, None))


def test_attention_shape_of_a_config() -> None:
    shape = AttentionShape.from_config
    assert shape(tiny_model("llama", head_dim=16).config) == AttentionShape(4, 2, 16, None, None)
    assert shape(tiny_model("llama").config) == AttentionShape(4, 2, 8, None, None)
    assert shape(tiny_model("gemma2").config) == AttentionShape(4, 2, 8, 50.0, 8)
    assert shape(tiny_model("gpt2").config) == AttentionShape(4, 4, 8, None, None)
    assert shape(tiny_model("gpt_neo").config) == AttentionShape(4, 4, 8, None, 8)


def test_values_may_have_another_head_size_than_queries() -> None:
    batch = pack_batch(BATCHES[2], prefix_sharing=True)
    query, key, _ = random_qkv(batch.input_ids.shape[1], 2, 2)
    value = torch.randn(1, 2, batch.input_ids.shape[1], 5)
    output, _ = tree_attention(torch.nn.Module(), query, key, value, None, spans=batch.spans)
    assert output.shape == (1, batch.input_ids.shape[1], 2, 5)
