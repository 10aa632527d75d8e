"""Counted costs of a step: tokens through the model, rows through the head, logits in memory.

Nothing is timed, so the numbers hold on any machine. A change may lower a number here, but never raise it.
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
from spinlm.training.activation_checkpointing import switch_activation_checkpointing
from spinlm.training.batches import PromptGroup, pair_loss

PROMPT, REAL, SYNTHETIC = 30, 20, 16


@pytest.fixture(scope="module")
def players(tmp_path_factory: pytest.TempPathFactory) -> Players:
    folder: Path = tmp_path_factory.mktemp("cost")
    players = Players(tiny_recipe(save_tiny_model(folder / "model"), lora={"r": 2}), RunDir(folder / "run"))
    players.prefix_sharing = True
    return players


def random_groups(trees: int, opponents: int) -> list[PromptGroup]:
    def ids(count: int) -> list[int]:
        return torch.randint(3, 90, (count,)).tolist()

    return [
        PromptGroup(
            PrefixTree(ids(PROMPT), (ids(REAL), *(ids(SYNTHETIC) for _ in range(opponents)))),
            (-1.0,) * (1 + opponents),
            tuple((0, synthetic + 1) for synthetic in range(opponents)),
        )
        for _ in range(trees)
    ]


class Cost(TorchDispatchMode):
    """Counts tokens through a layer, rows through the head, and elements of the largest tensor of logits."""

    def __init__(self, players: Players):
        super().__init__()
        self.vocabulary = players.logprobs.causal_lm.config.vocab_size
        self.head_rows = self.largest_logits = self.tokens = 0
        names = ("layers.1.mlp.gate_proj", "h.1.mlp.c_fc")  # Llama, GPT-Neo
        modules = dict(players.logprobs.causal_lm.base_model.named_modules())
        self._layer = next(modules[name] for name in names if name in modules)

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
                self.largest_logits = max(self.largest_logits, out.numel())
        return out


def train_step(players: Players, groups: list[PromptGroup], prefix_sharing: bool = True) -> None:
    players.logprobs.train()
    batch = pack_batch([group.tree for group in groups], prefix_sharing)
    pair_loss(players.recipe, 0)(players.logprobs(batch), groups).loss.backward()
    players.model.zero_grad()


def score(players: Players, groups: list[PromptGroup]) -> None:
    players.response_logprobs([group.tree for group in groups])


@pytest.mark.parametrize("work", [train_step, score])
@pytest.mark.parametrize("opponents", [1, 2])
def test_tokens_and_head_rows_with_prefix_sharing(players: Players, work: Callable[..., None], opponents: int) -> None:
    """Prompt and real response count once, the last token of a response never. The head sees only response tokens."""
    with Cost(players) as cost:
        work(players, random_groups(3, opponents))
    tokens = 3 * (PROMPT + (REAL - 1) + opponents * (SYNTHETIC - 1))
    assert tokens <= cost.tokens < tokens + ROW_BLOCK  # the row is padded
    rows = REAL + opponents * SYNTHETIC
    assert 3 * rows <= cost.head_rows < 3 * rows + ROW_BLOCK  # products are padded
    with Cost(players) as cost:
        work(players, random_groups(1, 1))
    assert cost.tokens == PROMPT + REAL - 1 + SYNTHETIC - 1  # no padding
    assert cost.head_rows == REAL + SYNTHETIC


def test_tokens_without_prefix_sharing(players: Players) -> None:
    """Every response costs its prompt again, and padding."""
    with Cost(players) as cost:
        train_step(players, random_groups(3, 2), prefix_sharing=False)
    assert cost.tokens == 3 * 3 * (PROMPT + REAL - 1)


def test_gpt_neo_computes_a_prompt_once(tmp_path: Path) -> None:
    neo = Players(tiny_recipe(save_tiny_model(tmp_path / "model", "gpt_neo"), lora={"r": 2}), RunDir(tmp_path / "run"))
    groups = random_groups(3, 2)
    neo.measure_prefix_sharing([group.tree for group in groups])
    tokens = PROMPT + (REAL - 1) + 2 * (SYNTHETIC - 1)
    for work in (train_step, score):
        with Cost(neo) as cost:
            work(neo, groups)
        assert 3 * tokens <= cost.tokens < 3 * tokens + ROW_BLOCK  # the row is padded


def test_memory_of_logits_is_one_chunk(players: Players, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = players.logprobs.causal_lm.config.vocab_size
    monkeypatch.setattr(logprobs_module, "CHUNK_ELEMENTS", 16 * vocabulary)
    for work in (train_step, score):
        with Cost(players) as cost:
            work(players, random_groups(4, 2))
        assert cost.largest_logits == 16 * vocabulary


def test_checkpointing_computes_every_token_twice(players: Players) -> None:
    model = players.logprobs.causal_lm
    switch_activation_checkpointing(model, on=True)
    with Cost(players) as cost:
        train_step(players, random_groups(2, 1))
    switch_activation_checkpointing(model, on=False)
    assert cost.tokens == 2 * 2 * (PROMPT + REAL - 1 + SYNTHETIC - 1)


def test_generation_prefills_prompts_once_and_computes_no_padding(players: Players) -> None:
    """With prompts of different lengths and two samples each, the head sees one row per sampled token."""
    prompts = [[5] * length for length in (7, 30, 11, 23)]
    engine = LocalEngine(players.logprobs, 3, True)
    with Cost(players) as cost, torch.inference_mode():
        responses = engine.generate(prompts, Sampling(1.0, 1.0, 6, 500, 2, (50, 51, 52, 53, 54)), 0, lambda *_: None)
    sampled = sum(len(response.token_ids) for samples in responses for response in samples)
    repeated = 2  # prompts whose second sample starts later than the first
    assert cost.head_rows == sampled
    assert cost.tokens <= sum(map(len, prompts)) + repeated * 30 + sampled - len(prompts) * 2
