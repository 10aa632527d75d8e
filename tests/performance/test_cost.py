"""What a step costs, in things that can be counted: tokens through the model, rows through the head, logits held.

No clock, so these hold on any machine. A number here only ever goes down.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models import save_tiny_model, tiny_recipe
from spinlm.generation import LocalEngine
from spinlm.generation.base import Sampling
from spinlm.model import logprobs as logprobs_module
from spinlm.model.kernels import ROW_BLOCK
from spinlm.model.players import Players
from spinlm.model.prefix_trees import PrefixTree, pack_batch
from spinlm.rundir.layout import RunDir
from spinlm.training.activation_checkpointing import switch_checkpointing
from spinlm.training.batches import pair_objective
from spinlm.training.trainer import Item

PROMPT, REAL, SYNTHETIC = 30, 20, 16


@pytest.fixture(scope="module")
def players(tmp_path_factory: pytest.TempPathFactory) -> Players:
    folder: Path = tmp_path_factory.mktemp("cost")
    return Players(tiny_recipe(save_tiny_model(folder / "model"), lora={"r": 2}), RunDir(folder / "run"))


def items(trees: int, opponents: int) -> list[Item]:
    def ids(count: int) -> list[int]:
        return torch.randint(3, 90, (count,)).tolist()

    return [
        Item(
            PrefixTree(ids(PROMPT), (ids(REAL), *(ids(SYNTHETIC) for _ in range(opponents)))),
            (-1.0,) * (1 + opponents),
            tuple((0, other + 1) for other in range(opponents)),
        )
        for _ in range(trees)
    ]


class Cost(TorchDispatchMode):
    """Counts tokens through a layer and rows through the head; remembers the most logits in one tensor."""

    def __init__(self, players: Players):
        super().__init__()
        self.vocabulary = players.logprobs.causal_lm.config.vocab_size
        self.head_rows = self.largest = self.tokens = 0
        self._layer = players.logprobs.causal_lm.base_model.layers[1].mlp.gate_proj

    def __enter__(self) -> "Cost":
        self._hook = self._layer.register_forward_pre_hook(self._count)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hook.remove()
        super().__exit__(*error)

    def _count(self, _: Any, args: tuple[Tensor]) -> None:
        self.tokens += args[0].shape[0] * args[0].shape[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dim() == 2 and out.shape[1] == self.vocabulary:
            name = str(func)
            if "linear" in name or "mm" in name:
                self.head_rows += out.shape[0]
            if name != "aten.t.default":
                self.largest = max(self.largest, out.numel())
        return out


def training(players: Players, part: list[Item], prefix_sharing: bool = True) -> None:
    players.logprobs.train()
    batch = pack_batch([item.tree for item in part], prefix_sharing)
    pair_objective(players.recipe, 0)(players.logprobs(batch), part).loss.backward()
    players.model.zero_grad()


def scoring(players: Players, part: list[Item], prefix_sharing: bool = True) -> None:
    players.response_logprobs([item.tree for item in part], prefix_sharing)


@pytest.mark.parametrize("work", [training, scoring])
@pytest.mark.parametrize("opponents", [1, 2])
def test_tokens_and_head_rows_of_a_tree(players: Players, work: Callable[..., None], opponents: int) -> None:
    """The prompt and the real response once, the last token of a response never; the head at response tokens alone."""
    with Cost(players) as cost:
        work(players, items(3, opponents))
    tokens = 3 * (PROMPT + (REAL - 1) + opponents * (SYNTHETIC - 1))
    assert tokens <= cost.tokens < tokens + ROW_BLOCK  # the row is padded to a whole block
    rows = REAL + opponents * SYNTHETIC
    assert 3 * rows <= cost.head_rows < 3 * rows + ROW_BLOCK  # products are padded to a whole block
    with Cost(players) as cost:
        work(players, items(1, 1))
    assert cost.tokens == PROMPT + REAL - 1 + SYNTHETIC - 1  # fewer than a block
    assert cost.head_rows == REAL + SYNTHETIC


def test_what_is_counted_can_go_up(players: Players) -> None:
    """One response to a row costs the prompt again, and padding."""
    with Cost(players) as cost:
        training(players, items(3, 2), False)
    assert cost.tokens == 3 * 3 * (PROMPT + REAL - 1)


def test_logits_are_held_a_chunk_at_a_time(players: Players, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = players.logprobs.causal_lm.config.vocab_size
    monkeypatch.setattr(logprobs_module, "CHUNK_ELEMENTS", 16 * vocabulary)
    for work in (training, scoring):
        with Cost(players) as cost:
            work(players, items(4, 2))
        assert cost.largest == 16 * vocabulary


def test_checkpointing_computes_every_token_once_more(players: Players) -> None:
    model = players.logprobs.causal_lm
    switch_checkpointing(model, on=True)
    with Cost(players) as cost:
        training(players, items(2, 1))
    switch_checkpointing(model, on=False)
    assert cost.tokens == 2 * 2 * (PROMPT + REAL - 1 + SYNTHETIC - 1)


def test_generation_computes_each_prompt_once_and_no_padding(players: Players) -> None:
    """Prompts of different lengths, two samples each: the head sees one row for each token that is drawn."""
    prompts = [[5] * length for length in (7, 30, 11, 23)]
    engine = LocalEngine(players.logprobs, 3, True)
    with Cost(players) as cost, torch.inference_mode():
        answers = engine.generate(prompts, Sampling(1.0, 1.0, 6, 500, 2, (50, 51, 52, 53, 54)), 0, lambda *_: None)
    drawn = sum(len(one.token_ids) for given in answers for one in given)
    again = 2  # a prompt whose second sample finds no row free beside its first
    assert cost.head_rows == drawn
    assert cost.tokens <= sum(map(len, prompts)) + again * 30 + drawn - len(prompts) * 2
