"""Layouts, literally and by their defining property, and the tree attention against a dense mask."""

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spinlm.model import attention
from spinlm.model.attention import AttentionShape, BlockMasks, flex_attention_works, tree_attention
from spinlm.model.kernels import ROW_BLOCK
from spinlm.model.prefix_trees import PackedBatch, PrefixTree, TreeSpan, micro_batches, pack_batch

TREES = [PrefixTree([10, 11, 12], ([20, 21, 22], [30], [40, 41])), PrefixTree([50], ([60],))]


def test_tree_layout_literally() -> None:
    batch = pack_batch(TREES, True)
    #                                  prompt       | 1     | 3 | prompt
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21, 40, 50]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0]]
    assert batch.logits_indices.tolist() == [2, 3, 4, 2, 2, 5, 6]
    assert batch.targets.tolist() == [20, 21, 22, 30, 40, 41, 60]
    assert batch.response_indices.tolist() == [0, 0, 0, 1, 2, 2, 3]
    assert batch.num_responses == 4
    assert batch.spans == (TreeSpan(0, 3, ((3, 2), (5, 0), (5, 1))), TreeSpan(6, 1, ((7, 0),)))
    assert [len(tree) for tree in TREES] == [6, 1]


def test_pair_layout_literally() -> None:
    batch = pack_batch(TREES, False)
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


tokens = st.lists(st.integers(0, 99), min_size=1, max_size=6)
trees_of = st.builds(PrefixTree, tokens, st.lists(tokens, min_size=1, max_size=4).map(tuple))
batches_of = st.lists(trees_of, min_size=1, max_size=5)


def visible_in(spans: tuple[TreeSpan, ...], length: int) -> list[list[int]]:
    """For each place in a row of trees, the places it may see: its tree's prompt and its own branch, up to itself.

    Padding at the row's end is a tree of its own.
    """
    owner: list[tuple[int, int]] = []  # tree, and branch or −1 for the prompt
    for number, span in enumerate(spans):
        assert span.start == len(owner)
        owner += [(number, -1)] * span.prompt_length
        for branch, (start, size) in enumerate(span.branches):
            assert start == len(owner)
            owner += [(number, branch)] * size
    assert length - len(owner) in range(ROW_BLOCK)
    owner += [(len(spans), -1)] * (length - len(owner))
    return [
        [j for j in range(i + 1) if owner[j] in {(tree, -1), (tree, branch)}] for i, (tree, branch) in enumerate(owner)
    ]


def contexts(batch: PackedBatch) -> list[list[tuple[int, int]]]:
    """What each predicted token is predicted from: (position, token) of every place its predictor sees."""
    rows, width = batch.input_ids.shape
    ids, positions = batch.input_ids.flatten().tolist(), batch.position_ids.flatten().tolist()
    if batch.spans is None:
        seen = [list(range(place - place % width, place + 1)) for place in range(rows * width)]
    else:
        seen = visible_in(batch.spans, width)
    return [[(positions[j], ids[j]) for j in seen[place]] for place in batch.logits_indices.tolist()]


@pytest.mark.parametrize("prefix_sharing", [True, False])
@given(trees=batches_of)
@settings(max_examples=100, deadline=None)
def test_every_response_token_is_predicted_once_from_what_precedes_it(
    prefix_sharing: bool, trees: list[PrefixTree]
) -> None:
    batch = pack_batch(trees, prefix_sharing)
    responses = [(tree.prompt, response) for tree in trees for response in tree.responses]
    expected = [
        (number, token, list(enumerate([*prompt, *response[:place]])))
        for number, (prompt, response) in enumerate(responses)
        for place, token in enumerate(response)
    ]
    found = list(zip(batch.response_indices.tolist(), batch.targets.tolist(), contexts(batch), strict=True))
    assert found == expected
    assert batch.num_responses == len(responses)
    if prefix_sharing:
        tokens = sum(len(tree) for tree in trees)
        assert batch.input_ids.shape == (
            1,
            tokens if tokens <= ROW_BLOCK else math.ceil(tokens / ROW_BLOCK) * ROW_BLOCK,
        )


def test_micro_batches_by_hand() -> None:
    sizes = [4, 9, 2, 4, 3]
    trees = [PrefixTree([0] * size, ([1],)) for size in sizes]
    assert micro_batches(trees, 8) == [[1], [0, 3], [4, 2]]  # longest first; the one that does not fit is alone
    assert micro_batches(trees, 100) == [[1, 0, 3, 4, 2]]
    assert micro_batches(trees, 1) == [[1], [0], [3], [4], [2]]
    assert micro_batches([], 8) == []


@pytest.mark.parametrize("prefix_sharing", [True, False])
@given(trees=st.lists(trees_of, max_size=12), budget=st.integers(1, 60))
@settings(max_examples=100, deadline=None)
def test_micro_batches_cover_all_and_keep_the_budget(
    prefix_sharing: bool, trees: list[PrefixTree], budget: int
) -> None:
    """Every response is in one micro-batch, and what that takes as a tensor is in the budget, padding included."""
    batches = micro_batches(trees, budget, prefix_sharing)
    assert Counter(index for indices in batches for index in indices) == Counter(range(len(trees)))
    for indices in batches:
        batch = pack_batch([trees[index] for index in indices], prefix_sharing)
        assert batch.num_responses == sum(len(trees[index].responses) for index in indices)
        rounded = ROW_BLOCK - 1 if prefix_sharing and budget > ROW_BLOCK else 0
        assert len(indices) == 1 or batch.input_ids.numel() <= budget + rounded


# The attention

SHAPES = [
    TREES,
    [PrefixTree([1] * 7, ([2] * 9, [3] * 4, [4], [5] * 12))],
    [PrefixTree([1] * 40, ([2] * 9, [3] * 30)), PrefixTree([1] * 5, ([2] * 4,))],  # with padding
    [
        PrefixTree([1], ([2],)),
        PrefixTree([1] * 3, ([2], [3] * 6)),
        PrefixTree([1] * 11, ([2] * 5, [3] * 5)),
        PrefixTree([1], ([2] * 8,) * 3),
    ],
]


def random_qkv(length: int, heads: int, key_heads: int, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    return (
        3 * torch.randn(1, heads, length, size),
        torch.randn(1, key_heads, length, size),
        torch.randn(1, key_heads, length, size),
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
    """One place and one head at a time, in float64."""
    assert batch.spans is not None
    query, key, value = query.double(), key.double(), value.double()
    positions = batch.position_ids[0].tolist()
    _, heads, length, size = query.shape
    out = torch.zeros(1, length, heads, size, dtype=torch.float64)
    for i, seen in enumerate(visible_in(batch.spans, length)):
        near = [j for j in seen if window is None or positions[i] - positions[j] < window]
        for head in range(heads):
            shared = head // (heads // key.shape[1])
            scores = key[0, shared, near] @ query[0, head, i] * (1 / math.sqrt(size) if scaling is None else scaling)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            out[0, i, head] = torch.softmax(scores, dim=0) @ value[0, shared, near]
    return out


@pytest.fixture(params=["pieces", "blocks"])
def masks_of(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[[PackedBatch], BlockMasks | None]:
    """Nothing, or the block masks of a batch, under FlexAttention as it computes without a compiler."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(attention, "_flex_attention", lambda: flex_attention)
    if request.param == "pieces":
        return lambda batch: None
    return lambda batch: BlockMasks(batch.spans or (), batch.position_ids)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("trees", SHAPES, ids=["literal", "long", "padded", "many"])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=["mha", "gqa"])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_tree_attention_is_attention_under_a_dense_mask(
    masks_of: Callable[[PackedBatch], BlockMasks | None],
    trees: list[PrefixTree],
    heads: tuple[int, int],
    window: int | None,
    softcap: float | None,
    scaling: float | None,
) -> None:
    batch = pack_batch(trees, True)
    qkv = random_qkv(batch.input_ids.shape[1], *heads)
    ours, weights = tree_attention(
        torch.nn.Module(),
        *qkv,
        None,
        scaling=scaling,
        softcap=softcap,
        sliding_window=window,
        spans=batch.spans,
        block_masks=masks_of(batch),
    )
    real = sum(map(len, trees))
    theirs = dense_attention(batch, *qkv, scaling, softcap, window)
    assert torch.isfinite(ours).all()
    torch.testing.assert_close(ours[:, :real].double(), theirs[:, :real], rtol=1e-5, atol=1e-6)
    assert weights is None


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("trees", SHAPES, ids=["literal", "long", "padded", "many"])
def test_a_place_reaches_only_those_that_see_it(
    trees: list[PrefixTree], window: int | None, softcap: float | None
) -> None:
    """Whatever stands in other branches, other trees or later on, the output is the same to the bit."""
    batch = pack_batch(trees, True)
    assert batch.spans is not None
    length = batch.input_ids.shape[1]
    positions = batch.position_ids[0].tolist()
    seen = visible_in(batch.spans, length)
    query, key, value = random_qkv(length, 4, 2)

    def attend() -> Tensor:
        return tree_attention(
            torch.nn.Module(), query, key, value, None, softcap=softcap, sliding_window=window, spans=batch.spans
        )[0]

    before = attend()
    for j in range(length):
        kept = key[:, :, j].clone(), value[:, :, j].clone()
        key[:, :, j], value[:, :, j] = -kept[0], kept[1] + 1
        after = attend()
        key[:, :, j], value[:, :, j] = kept
        changed = (before != after).any(dim=-1).any(dim=-1)[0].tolist()
        near = [j in seen[i] and (window is None or positions[i] - positions[j] < window) for i in range(length)]
        assert changed[: sum(map(len, trees))] == near[: sum(map(len, trees))]


def test_tree_attention_passes_gradients_as_the_dense_mask_does() -> None:
    batch = pack_batch(SHAPES[3], True)
    qkv = [tensor.requires_grad_() for tensor in random_qkv(batch.input_ids.shape[1], 4, 2)]
    upstream = torch.randn(1, batch.input_ids.shape[1], 4, 8)
    ours = torch.autograd.grad(
        tree_attention(torch.nn.Module(), *qkv, None, sliding_window=5, spans=batch.spans)[0], qkv, upstream
    )
    theirs = torch.autograd.grad(dense_attention(batch, *qkv, None, None, 5), qkv, upstream.double())
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)


def test_block_masks_are_made_once_for_each_window() -> None:
    batch = pack_batch(SHAPES[1], True)
    masks = BlockMasks(batch.spans or (), batch.position_ids)
    assert masks.get(None) is masks.get(None) and masks.get(4) is masks.get(4) and masks.get(4) is not masks.get(None)


def test_where_flex_attention_fails_it_is_not_used_and_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a CPU it has no backward pass. Asked while sampling, too."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(attention, "_flex_attention", lambda: flex_attention)
    with torch.inference_mode():
        assert not flex_attention_works(torch.device("cpu"), torch.float32, AttentionShape(4, 2, 8, None, None))
    assert "FlexAttention is not used: NotImplementedError" in caplog.text


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_probe_of_flex_attention_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its comparison, forward, of block masks that are right and of some that let everything through."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(attention, "_flex_attention", lambda: flex_attention)
    monkeypatch.setattr(torch.autograd, "grad", lambda out, inputs: [])  # on a CPU there is no backward
    monkeypatch.setattr(Tensor, "requires_grad_", lambda tensor: tensor)
    given = torch.device("cpu"), torch.float32, AttentionShape(4, 2, 8, 1.5, 70)
    for window in (None, 70):
        assert attention._flex_agrees(*given, window, attention._TEST_TREES)
    monkeypatch.setattr(BlockMasks, "mask_mod", lambda self, window: lambda b, h, q, k: q >= k)
    assert not attention._flex_agrees(*given, None, attention._TEST_TREES)


def test_flex_attention_that_gives_something_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = torch.device("cpu"), torch.float32
    monkeypatch.setattr(attention, "_flex_agrees", lambda *given: given[3] is None)  # wrong under a window alone
    assert flex_attention_works(*asked, AttentionShape(1, 1, 3, None, None))
    assert "differ" not in caplog.text
    assert not flex_attention_works(*asked, AttentionShape(1, 1, 3, None, 9))
    assert "differ" in caplog.text


def test_no_memory_for_the_probe_is_not_taken_for_a_missing_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> bool:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(attention, "_flex_agrees", full)
    with pytest.raises(torch.OutOfMemoryError):
        flex_attention_works(torch.device("cpu"), torch.float32, AttentionShape(1, 1, 4, None, None))


def test_head_sizes_as_configs_say() -> None:
    from models import tiny_model

    assert AttentionShape.from_config(tiny_model("llama", head_dim=16).config) == AttentionShape(4, 2, 16, None, None)

    assert AttentionShape.from_config(tiny_model("llama").config) == AttentionShape(4, 2, 8, None, None)
    assert AttentionShape.from_config(tiny_model("gemma2").config) == AttentionShape(4, 2, 8, 50.0, 8)
    assert AttentionShape.from_config(tiny_model("gpt2").config) == AttentionShape(4, 4, 8, None, None)


def test_values_may_have_another_size_than_queries() -> None:
    batch = pack_batch(SHAPES[2], True)
    query, key, _ = random_qkv(batch.input_ids.shape[1], 2, 2)
    value = torch.randn(1, 2, batch.input_ids.shape[1], 5)
    ours, _ = tree_attention(torch.nn.Module(), query, key, value, None, spans=batch.spans)
    assert ours.shape == (1, batch.input_ids.shape[1], 2, 5)
