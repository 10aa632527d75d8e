"""The training loop: gradients do not depend on how they are summed, and training resumes after a kill."""

import math
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from models import naive_logprob, save_tiny_model, tiny_recipe
from spinlm.errors import ModelError, RecipeError, RunError, StoppedError, TrainingError
from spinlm.model.logprobs import LogProbs
from spinlm.model.players import Players
from spinlm.model.prefix_trees import PackedBatch, PrefixTree
from spinlm.rundir.layout import RunDir
from spinlm.rundir.stage_graph import START
from spinlm.training.batches import PromptGroup, pair_loss, plan_steps, sft_loss
from spinlm.training.optimizers import check_optimizer, find_optimizer, make_optimizer
from spinlm.training.schedule import learning_rate_at
from spinlm.training.trainer import LossFunction, TrainConfig, Trainer
from spinlm.utils.signals import graceful_shutdown

CONFIG = TrainConfig(
    epochs=1,
    batch_size=4,
    learning_rate=1e-2,
    optimizer="adamw",
    warmup_ratio=0.0,
    lr_scheduler="linear",
    weight_decay=0.0,
    max_grad_norm=1e9,
    tokens_per_micro_batch=40,
    save_steps=100,
    seed=7,
)


CONFIG_AT_REST = replace(CONFIG, batch_size=100, optimizer="sgd", learning_rate=0.0)
"""One step that changes nothing."""


class InMemory:
    """A dataset in a list; costs and weights are those of the stages."""

    num_pairs = 0

    def __init__(self, items: Sequence[PromptGroup], weights: Sequence[int]):
        self.items = items
        self.batch_cost = np.array([max(len(item.pairs), 1) for item in items])
        self.loss_weight = np.array(weights)

    def __getitem__(self, index: int) -> PromptGroup:
        return self.items[index]


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(3, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def pair_groups(count: int, synthetic: tuple[int, int] = (1, 1)) -> InMemory:
    """Make groups of responses of uneven lengths, with invented opponent log-probabilities.

    `synthetic` holds the number of synthetic responses to even and to odd prompts.
    """
    items = []
    for n in range(count):
        lengths = [1 + (7 * n + 3 * k) % 11 for k in range(1 + synthetic[n % 2])]
        tree = PrefixTree(
            ids(2 + 5 * n % 13, 100 + n), tuple(ids(length, 10 * n + k) for k, length in enumerate(lengths))
        )
        opponent = tuple(-6.0 * length - k for k, length in enumerate(lengths))
        items.append(PromptGroup(tree, opponent, tuple((0, k) for k in range(1, len(lengths)))))
    return InMemory(items, [len(item.pairs) for item in items])


def sft_groups(count: int) -> InMemory:
    items = [PromptGroup(PrefixTree(ids(2 + 3 * n % 7, 200 + n), (ids(1 + 5 * n % 9, 300 + n),))) for n in range(count)]
    return InMemory(items, [len(item.tree.responses[0]) for item in items])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("llama"))


NewPlayers = Callable[..., Players]


@pytest.fixture
def new_players(saved: Path, tmp_path: Path) -> NewPlayers:
    """Make players as a new process would; no weight of the adapter is zero."""

    def make(**sections: Any) -> Players:
        players = Players(tiny_recipe(saved, **sections), RunDir(tmp_path))
        players.prefix_sharing = True
        torch.manual_seed(5)
        for name, parameter in players.parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        return players

    return make


def spin_loss(players: Players) -> LossFunction:
    return pair_loss(players.recipe, 0)


def run_fit(
    players: Players, groups: InMemory, loss_fn: LossFunction, config: TrainConfig, folder: Path, **options: Any
) -> list[dict[str, float]]:
    """Train, and return the measurements of each step."""
    steps: list[dict[str, float]] = []
    trainer = Trainer(players, config, checkpoints=folder / "checkpoints", label="test")
    trainer.fit(groups, loss_fn, **({"on_step": steps.append} | options))
    return steps


def rate_at(step: int, steps: int, config: TrainConfig) -> float:
    ratio, scheduler = config.warmup_ratio, config.lr_scheduler
    return learning_rate_at(step, steps, peak=config.learning_rate, warmup_ratio=ratio, lr_scheduler=scheduler)


@pytest.fixture
def seen() -> Iterator[list[list[Tensor]]]:
    """The gradients of each optimizer step."""
    found: list[list[Tensor]] = []

    def note(optimizer: Any, *_: Any) -> None:
        found.append([parameter.grad.clone() for parameter in optimizer.param_groups[0]["params"]])

    handle = register_optimizer_step_pre_hook(note)
    yield found
    handle.remove()


def apart(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """‖ours − theirs‖ / ‖theirs‖, over all parameters together."""
    difference = sum((a - b).double().square().sum().item() for a, b in zip(ours, theirs, strict=True))
    return math.sqrt(difference / sum(b.double().square().sum().item() for b in theirs))


# The gradient of a step


def plain_gradient(players: Players, loss: Callable[[Callable[[Sequence[int], Sequence[int]], Tensor]], Tensor]) -> Any:
    """Return a loss and its gradient. `loss` gets a function that computes log p(response | prompt) naively."""
    players.logprobs.use_tree_attention(False)

    value = loss(partial(naive_logprob, players.model))
    return value.item(), torch.autograd.grad(value, [parameter for _, parameter in players.parameters()])


@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["full", "lora"])
def test_a_step_has_the_gradient_of_the_mean_over_pairs(
    new_players: NewPlayers, seen: list[list[Tensor]], tmp_path: Path, lora: Any
) -> None:
    """For all micro-batches, with and without prefix sharing: 9 pairs in 6 trees, computed pair by pair."""
    items = pair_groups(6, synthetic=(1, 2))
    config = replace(CONFIG, batch_size=100, optimizer="sgd", learning_rate=0.0)
    recipe: dict[str, Any] = {"lora": lora, "objective": {"beta": 0.05, "nll_weight": 0.3}}

    def naive(logprob: Any) -> Tensor:
        losses = []
        for item in items.items:
            responses = item.tree.responses
            for _, k in item.pairs:
                real, synthetic = logprob(item.tree.prompt, responses[0]), logprob(item.tree.prompt, responses[k])
                margin = (real - item.reference_logprobs[0]) - (synthetic - item.reference_logprobs[k])
                losses.append(torch.log1p(torch.exp(-0.05 * margin)) - 0.3 * real / len(responses[0]))
        return torch.stack(losses).mean()

    players = new_players(**recipe)
    value, expected = plain_gradient(players, naive)
    for number, (budget, prefix_sharing) in enumerate(
        [(10**6, True), (1, True), (25, True), (10**6, False), (25, False)]
    ):
        folder = tmp_path / str(number)
        changed = replace(config, tokens_per_micro_batch=budget)
        players.prefix_sharing = prefix_sharing
        (step,) = run_fit(players, items, spin_loss(players), changed, folder)
        assert step["loss"] == pytest.approx(value, rel=1e-5)
        assert step["grad_norm"] == pytest.approx(math.sqrt(sum(g.square().sum().item() for g in expected)), rel=1e-4)
        assert apart(seen[-1], expected) < 1e-5


def test_an_sft_step_has_the_gradient_of_the_mean_over_tokens(
    new_players: NewPlayers, seen: list[list[Tensor]], tmp_path: Path
) -> None:
    items = sft_groups(6)
    players = new_players(lora={"r": 4})

    def naive(logprob: Any) -> Tensor:
        values = [logprob(item.tree.prompt, item.tree.responses[0]) for item in items.items]
        return -torch.stack(values).sum() / sum(len(item.tree.responses[0]) for item in items.items)

    value, expected = plain_gradient(players, naive)
    for budget in (1, 10**6):
        config = replace(CONFIG, batch_size=100, optimizer="sgd", learning_rate=0.0, tokens_per_micro_batch=budget)
        (step,) = run_fit(players, items, sft_loss, config, tmp_path / str(budget))
        assert step["loss"] == pytest.approx(value, rel=1e-5)
        assert apart(seen[-1], expected) < 1e-5


def test_steps_do_not_add_up_each_others_gradients(
    new_players: NewPlayers, seen: list[list[Tensor]], tmp_path: Path
) -> None:
    items = pair_groups(1)
    players = new_players(lora={"r": 4})
    config = replace(CONFIG, epochs=3, optimizer="sgd", learning_rate=0.0)
    run_fit(players, items, spin_loss(players), config, tmp_path)
    assert len(seen) == 3
    for later in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(later, seen[0], strict=True))


def test_the_first_loss_is_ln_2(new_players: NewPlayers, tmp_path: Path) -> None:
    """Player and opponent have the same weights."""
    players = new_players(lora={"r": 4}, objective={"beta": 5.0})
    items = pair_groups(5)
    for number, item in enumerate(items.items):
        opponent = tuple(players.response_logprobs([item.tree]))
        items.items[number] = replace(item, reference_logprobs=opponent)  # type: ignore[index]
    (step,) = run_fit(players, items, spin_loss(players), replace(CONFIG, batch_size=100), tmp_path)
    assert step["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert step["margin"] == pytest.approx(0, abs=1e-4)


def test_rows_without_contrast_count_in_the_loss_and_not_in_margin_and_accuracy(
    new_players: NewPlayers, tmp_path: Path
) -> None:
    """Two pairs, and three rows with the NLL term alone, in one step; then a step of such rows only."""
    players = new_players(lora={"r": 4}, objective={"nll_weight": 0.3})
    pairs = pair_groups(2)
    (plain,) = run_fit(players, pairs, spin_loss(players), CONFIG_AT_REST, tmp_path / "pairs")
    alone = [PromptGroup(PrefixTree(ids(4, 1), (ids(6, 2),)), (math.nan,), nll_only=3)]
    nll = -players.response_logprobs([alone[0].tree])[0] / 6

    mixed = InMemory([*pairs.items, *alone], [1, 1, 3])
    (step,) = run_fit(players, mixed, spin_loss(players), CONFIG_AT_REST, tmp_path / "mixed")
    assert [step["margin"], step["accuracy"]] == pytest.approx([plain["margin"], plain["accuracy"]], abs=1e-4)
    assert step["loss"] == pytest.approx((2 * plain["loss"] + 3 * 0.3 * nll) / 5, rel=1e-5)
    assert step["real_nll"] == pytest.approx((2 * plain["real_nll"] + 3 * nll) / 5, rel=1e-5)

    (step,) = run_fit(players, InMemory(alone, [3]), spin_loss(players), CONFIG_AT_REST, tmp_path / "alone")
    assert step["loss"] == pytest.approx(0.3 * nll, rel=1e-5)
    assert not {"margin", "accuracy"} & step.keys()


def test_gradients_are_clipped_to_the_norm(new_players: NewPlayers, seen: list[list[Tensor]], tmp_path: Path) -> None:
    players = new_players(lora={"r": 4})
    config = replace(CONFIG, batch_size=100, optimizer="sgd", learning_rate=0.0)
    norms = []
    for number, limit in enumerate((1e9, 1e-3)):
        (step,) = run_fit(
            players, pair_groups(4), spin_loss(players), replace(config, max_grad_norm=limit), tmp_path / str(number)
        )
        norms.append(step["grad_norm"])
    free, clipped = seen
    assert norms[0] == norms[1] > 1e-2  # what is reported is the norm before
    assert math.sqrt(sum(g.square().sum().item() for g in clipped)) == pytest.approx(1e-3, rel=1e-3)
    assert apart([g * (norms[0] / 1e-3) for g in clipped], free) < 1e-3


def test_training_can_end_after_an_epoch_and_does_again_when_resumed(new_players: NewPlayers, tmp_path: Path) -> None:
    """A process that is killed at the end of the epoch calls `on_epoch` again when it resumes."""
    config = replace(CONFIG, epochs=3, batch_size=2)
    ended = []
    for _ in range(2):
        players = new_players(lora={"r": 4})
        asked: list[int] = []

        def until_two(epoch: int, asked: list[int] = asked) -> bool:
            asked.append(epoch)
            return epoch < 2

        steps = run_fit(players, pair_groups(4), spin_loss(players), config, tmp_path, on_epoch=until_two)
        ended.append(([step["step"] for step in steps], asked, weights_of(players)))
    (first, asked_first, before), (second, asked_second, after) = ended
    assert (first, asked_first) == ([1, 2, 3, 4], [1, 2])
    assert (second, asked_second) == ([], [2])
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_kill_in_on_epoch_loses_no_step(new_players: NewPlayers, tmp_path: Path) -> None:
    """`on_epoch` may set evaluation mode: dropout is on again in the next epoch, resumed or not."""
    config = replace(CONFIG, epochs=2, batch_size=2)
    items = pair_groups(4)
    lora = {"r": 4, "dropout": 0.3}

    def look(players: Players, kill: bool) -> Callable[[int], bool]:
        def measure(epoch: int) -> bool:
            players.logprobs.eval()
            if kill and epoch == 1:
                raise KeyboardInterrupt
            return True

        return measure

    straight = new_players(lora=lora)
    run_fit(straight, items, spin_loss(straight), config, tmp_path / "straight", on_epoch=look(straight, False))
    killed = new_players(lora=lora)
    with pytest.raises(KeyboardInterrupt):
        run_fit(killed, items, spin_loss(killed), config, tmp_path / "parts", on_epoch=look(killed, True))
    continued = new_players(lora=lora)
    rest = run_fit(continued, items, spin_loss(continued), config, tmp_path / "parts", on_epoch=look(continued, False))
    assert [step["step"] for step in rest] == [3, 4]
    assert_equal_to_the_bit(weights_of(continued), weights_of(straight))


def test_report_of_each_step(new_players: NewPlayers, tmp_path: Path) -> None:
    players = new_players(lora={"r": 4})
    epochs: list[int] = []
    config = replace(CONFIG, epochs=2, batch_size=2)
    steps = run_fit(
        players,
        pair_groups(4),
        spin_loss(players),
        config,
        tmp_path,
        on_epoch=lambda epoch: epochs.append(epoch) is None,
    )
    assert [(step["step"], step["steps"], step["epoch"]) for step in steps] == [
        (1, 4, 1),
        (2, 4, 1),
        (3, 4, 2),
        (4, 4, 2),
    ]
    assert [step["learning_rate"] for step in steps] == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    assert epochs == [1, 2]
    assert all(step["tokens_per_second"] > 0 and 0 <= step["accuracy"] <= 1 for step in steps)


def test_training_goes_down_the_loss(new_players: NewPlayers, tmp_path: Path) -> None:
    players = new_players(lora={"r": 4})
    steps = run_fit(players, pair_groups(4), spin_loss(players), replace(CONFIG, epochs=8, batch_size=100), tmp_path)
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]
    assert steps[-1]["margin"] > steps[0]["margin"]


# Which items, and how fast


@given(
    sizes=st.lists(st.integers(1, 5), max_size=30),
    batch_size=st.integers(1, 9),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 2**63 - 1),
)
@settings(max_examples=100, deadline=None)
def test_every_epoch_takes_every_item_once(sizes: list[int], batch_size: int, epochs: int, seed: int) -> None:
    counted = np.array(sizes, dtype=np.int64)
    steps = plan_steps(counted, batch_size, epochs, seed)
    assert [epoch for epoch, _ in steps] == sorted(epoch for epoch, _ in steps)
    for epoch in range(epochs if sizes else 0):
        taken = [chosen.tolist() for number, chosen in steps if number == epoch]
        assert sorted(index for chosen in taken for index in chosen) == list(range(len(sizes)))
        for number, chosen in enumerate(taken):
            assert counted[chosen].sum() <= batch_size or len(chosen) == 1
            if number + 1 < len(taken):  # a step is as full as the order allows
                assert counted[chosen].sum() + counted[taken[number + 1][0]] > batch_size
    again = plan_steps(counted, batch_size, epochs, seed)
    assert [(epoch, chosen.tolist()) for epoch, chosen in again] == [
        (epoch, chosen.tolist()) for epoch, chosen in steps
    ]


def test_epochs_and_seeds_differ_in_order() -> None:
    sizes = np.ones(50, dtype=np.int64)
    orders = [plan_steps(sizes, 50, 2, seed)[epoch][1].tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert plan_steps(np.array([], dtype=np.int64), 4, 2, 0) == []


@pytest.mark.parametrize(
    ("schedule", "warmup_ratio", "expected"),
    [
        ("linear", 0.2, [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ("linear", 0.0, [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        ("linear", 1.0, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        ("linear", 0.15, [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),  # 1.5 steps are 2
        ("constant", 0.2, [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        (
            "cosine",  # after the rise ½(1 − cos(π·left)), left = 1, ⅞, ¾, …, ⅛
            0.2,
            [0.5, 1.0, 1.0, 0.9619397663, 0.8535533906, 0.6913417162, 0.5, 0.3086582838, 0.1464466094, 0.0380602337],
        ),
    ],
)
def test_learning_rate_of_each_of_ten_steps(schedule: str, warmup_ratio: float, expected: list[float]) -> None:
    config = replace(CONFIG, learning_rate=3e-4, lr_scheduler=schedule, warmup_ratio=warmup_ratio)
    assert [rate_at(step, 10, config) for step in range(10)] == pytest.approx([3e-4 * share for share in expected])


@given(
    steps=st.integers(1, 300),
    warmup_ratio=st.floats(0, 1),
    schedule=st.sampled_from(["linear", "cosine", "constant"]),
)
@settings(max_examples=100, deadline=None)
def test_learning_rate_rises_to_its_peak_and_never_beyond(steps: int, warmup_ratio: float, schedule: str) -> None:
    config = replace(CONFIG, learning_rate=3e-4, lr_scheduler=schedule, warmup_ratio=warmup_ratio)
    rates = [rate_at(step, steps, config) for step in range(steps)]
    assert all(0 < rate <= config.learning_rate for rate in rates)
    assert max(rates) == config.learning_rate
    peak = rates.index(config.learning_rate)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_find_optimizer() -> None:
    assert find_optimizer("adamw") is torch.optim.AdamW
    assert find_optimizer("RMSprop") is torch.optim.RMSprop
    for unknown in ("adamwx", "optimizer", "lr_scheduler", ""):
        with pytest.raises(RecipeError, match=r"no '.*' in torch\.optim; known: .*adamw.*rmsprop"):
            find_optimizer(unknown)


def test_an_optimizer_that_takes_other_settings() -> None:
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    with pytest.raises(RecipeError, match=r"optimizer lbfgs: .*weight_decay.*choose another"):
        make_optimizer("lbfgs", weights, 1e-3, 0.1)
    optimizer = make_optimizer("rmsprop", weights, 1e-3, 0.1)
    assert isinstance(optimizer, torch.optim.RMSprop)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(1e-3, 0.1)]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 3


@pytest.mark.parametrize("name", ["lbfgs", "SparseAdam", "nothing"])
def test_an_unusable_optimizer_is_refused_early(name: str) -> None:
    with pytest.raises(RecipeError, match=r"train.optimizer: (.* cannot be used|no 'nothing' in torch.optim)"):
        check_optimizer(name, 0.1, "train.optimizer")


@pytest.mark.parametrize("name", ["adamw", "rmsprop", "sgd", "adafactor", "muon"])
def test_an_optimizer_that_can_be_used(name: str) -> None:
    check_optimizer(name, 0.1, "train.optimizer")


# Checkpoints


def weights_of(players: Players) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in players.parameters()}


def assert_equal_to_the_bit(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def interrupted_at(call: int, objective: LossFunction) -> LossFunction:
    """The objective, with Ctrl-C pressed during its nth call."""
    calls = 0

    def wrapped(logprobs: Tensor, items: Sequence[PromptGroup]) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGINT)
        return objective(logprobs, items)

    return wrapped


@pytest.mark.parametrize("lora", [None, {"r": 4, "dropout": 0.3}], ids=["full", "lora"])
@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_an_interrupted_training_ends_in_the_same_weights(
    new_players: NewPlayers, tmp_path: Path, optimizer: str, lora: Any
) -> None:
    config = replace(
        CONFIG,
        epochs=2,
        batch_size=2,
        optimizer=optimizer,
        warmup_ratio=0.3,
        max_grad_norm=1.0,
        tokens_per_micro_batch=1,
    )
    items = pair_groups(6)

    straight = new_players(lora=lora)
    before = weights_of(straight)
    whole = run_fit(straight, items, spin_loss(straight), config, tmp_path / "straight")
    assert len(whole) == 6
    assert any(not torch.equal(before[name], value) for name, value in weights_of(straight).items())

    # Each step has two micro-batches: after the seventh call half of the fourth step is done.
    stopped = new_players(lora=lora)
    with graceful_shutdown(), pytest.raises(StoppedError):
        run_fit(stopped, items, interrupted_at(7, spin_loss(stopped)), config, tmp_path / "parts")
    assert [path.name for path in (tmp_path / "parts" / "checkpoints").iterdir()] == ["step-000003"]

    torch.manual_seed(99)  # a new process is in another random state
    continued = new_players(lora=lora)
    rest = run_fit(continued, items, spin_loss(continued), config, tmp_path / "parts")
    assert_equal_to_the_bit(weights_of(continued), weights_of(straight))
    timeless = [{key: value for key, value in step.items() if key != "tokens_per_second"} for step in whole]
    assert [{key: value for key, value in step.items() if key != "tokens_per_second"} for step in rest] == timeless[3:]


def test_a_killed_training_resumes_from_its_last_checkpoint(new_players: NewPlayers, tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=3, batch_size=2, save_steps=2)
    items = pair_groups(4)
    lora = {"r": 4, "dropout": 0.3}
    straight = new_players(lora=lora)
    run_fit(straight, items, spin_loss(straight), config, tmp_path / "straight")

    def die(step: dict[str, float]) -> None:
        if step["step"] == 5:
            raise KeyboardInterrupt

    killed = new_players(lora=lora)
    with pytest.raises(KeyboardInterrupt):
        run_fit(killed, items, spin_loss(killed), config, tmp_path / "parts", on_step=die)
    continued = new_players(lora=lora)
    rest = run_fit(continued, items, spin_loss(continued), config, tmp_path / "parts")
    assert [step["step"] for step in rest] == [5, 6]
    assert_equal_to_the_bit(weights_of(continued), weights_of(straight))
    assert [path.name for path in (tmp_path / "parts" / "checkpoints").iterdir()] == ["step-000006"]

    shutil.copytree(
        tmp_path / "parts" / "checkpoints" / "step-000006", tmp_path / "parts" / "checkpoints" / "step-000005"
    )
    done = new_players(lora=lora)  # a complete training is loaded, not done again
    assert run_fit(done, items, spin_loss(done), config, tmp_path / "parts") == []
    assert_equal_to_the_bit(weights_of(done), weights_of(straight))
    assert [path.name for path in (tmp_path / "parts" / "checkpoints").iterdir()] == ["step-000006"]


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_checkpoint_is_named(new_players: NewPlayers, tmp_path: Path, file: str, damage: str) -> None:
    players = new_players(lora={"r": 4})
    run_fit(players, pair_groups(1), spin_loss(players), CONFIG, tmp_path)
    path = tmp_path / "checkpoints" / "step-000001" / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]) if damage == "cut" else path.unlink()
    with pytest.raises(RunError, match=re.escape(str(path.parent))):
        run_fit(players, pair_groups(1), spin_loss(players), CONFIG, tmp_path)


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "state.json"])
def test_a_flipped_bit_of_a_checkpoint_is_noticed(new_players: NewPlayers, tmp_path: Path, file: str) -> None:
    players = new_players(lora={"r": 4})
    run_fit(players, pair_groups(1), spin_loss(players), CONFIG, tmp_path)
    path = tmp_path / "checkpoints" / "step-000001" / file
    content = path.read_bytes()
    for place in range(0, len(content), len(content) // 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(RunError, match=r"damaged checkpoint .*Delete it and run again: training starts over"):
            run_fit(players, pair_groups(1), spin_loss(players), CONFIG, tmp_path)


# Numbers that are not finite


def poison(players: Players) -> None:
    with torch.no_grad():
        players.parameters()[-1][1].view(-1)[0] = math.nan


def contents_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_loss_that_is_not_finite_stops_training_and_spares_the_checkpoint(
    new_players: NewPlayers, tmp_path: Path
) -> None:
    players = new_players(lora={"r": 4})
    config = replace(CONFIG, epochs=2, batch_size=1)  # two steps an epoch, and a checkpoint after each epoch
    checkpoint = tmp_path / "checkpoints" / "step-000002"
    contents = []

    def watch(step: dict[str, float]) -> None:
        if step["step"] == 3:
            contents.append(contents_of(checkpoint))
            poison(players)

    with pytest.raises(TrainingError, match=r"test, step 4: the loss is nan") as caught:
        run_fit(players, pair_groups(2), spin_loss(players), config, tmp_path, on_step=watch)
    assert str(checkpoint) in str(caught.value)
    assert "Lower train.learning_rate" in str(caught.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
    assert contents == [contents_of(checkpoint)]


def test_a_loss_that_is_not_finite_at_once(new_players: NewPlayers, tmp_path: Path) -> None:
    players = new_players()
    poison(players)
    with pytest.raises(TrainingError, match=r"test, step 1: the loss is nan.*there is no checkpoint yet"):
        run_fit(players, pair_groups(2), spin_loss(players), CONFIG, tmp_path)


def test_weights_that_are_not_finite_are_not_saved(new_players: NewPlayers, tmp_path: Path) -> None:
    """The loss and the gradients were finite. The earlier checkpoint stays."""
    players = new_players(lora={"r": 4})
    config = replace(CONFIG, epochs=2, batch_size=2)

    def watch(step: dict[str, float]) -> None:
        if step["step"] == 2:
            poison(players)

    with pytest.raises(TrainingError, match=r"step-000002: not saved: 1 weights are not finite") as caught:
        run_fit(players, pair_groups(2), spin_loss(players), config, tmp_path, on_step=watch)
    kept = tmp_path / "checkpoints" / "step-000001"
    assert f"The last good checkpoint is {kept}. Lower train.learning_rate" in str(caught.value)
    assert list((tmp_path / "checkpoints").iterdir()) == [kept]
    with pytest.raises(ModelError, match=r"player: not saved: 1 weights are not finite"):
        players.save(0)
    assert not players.folder.player(0).exists()


@pytest.mark.parametrize("lora", [{"r": 4}, None])
def test_a_player_that_is_not_finite_is_neither_loaded_nor_measured(new_players: NewPlayers, lora: Any) -> None:
    players = new_players(lora=lora)
    players.save(0)
    poison(players)
    tree = PrefixTree(ids(4, 1), (ids(3, 2), ids(5, 3)))
    for measure in (players.response_logprobs, players.logprobs_and_features):
        with pytest.raises(ModelError, match=r"player: its log-probabilities are not finite"):
            measure([tree])
    (path,) = players.folder.player(0).glob("*.safetensors")
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = math.inf
    save_file(tensors, path, metadata={"format": "pt"})
    players.mark_modified()
    with pytest.raises(ModelError, match=r"1 weights are not finite .*diverged"):
        players.load(0)


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(new_players: NewPlayers, tmp_path: Path) -> None:
    """Two responses at equal distance from their opponent, at a β so large that only the gradient overflows."""
    players = new_players(lora={"r": 4}, objective={"beta": 1e30})
    tree = PrefixTree(ids(4, 1), (ids(3, 2), ids(5, 3)))
    items = InMemory([PromptGroup(tree, tuple(players.response_logprobs([tree])), ((0, 1),))], [1])
    before = weights_of(players)
    with pytest.raises(TrainingError, match=r"norm of the gradients inf"):
        run_fit(players, items, spin_loss(players), CONFIG, tmp_path)
    assert_equal_to_the_bit(weights_of(players), before)


def test_a_loss_that_is_not_finite_stops_even_a_finite_gradient(new_players: NewPlayers, tmp_path: Path) -> None:
    """The opponent gives the synthetic response probability 0: ℓ is infinite, its slope is −1."""
    players = new_players(lora={"r": 4})
    items = InMemory([PromptGroup(PrefixTree(ids(4, 1), (ids(3, 2), ids(5, 3))), (-10.0, -math.inf), ((0, 1),))], [1])
    with pytest.raises(TrainingError, match=r"the loss is inf and the norm of the gradients [0-9]"):
        run_fit(players, items, spin_loss(players), CONFIG, tmp_path)


def little_memory(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Make a forward pass fail if it has more tokens."""
    forward = LogProbs.forward

    def limited(self: LogProbs, layout: PackedBatch) -> Tensor:
        if layout.input_ids.numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, layout)

    monkeypatch.setattr(LogProbs, "forward", limited)


def test_too_little_memory_makes_micro_batches_smaller_and_changes_nothing(
    new_players: NewPlayers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    items, config = pair_groups(8), replace(CONFIG, tokens_per_micro_batch=1000)
    players = new_players(lora={"r": 4}, train={"gradient_checkpointing": False})
    expected = run_fit(players, items, spin_loss(players), config, tmp_path / "plenty")
    weights = [parameter.detach().clone() for _, parameter in players.parameters()]
    again = new_players(lora={"r": 4}, train={"gradient_checkpointing": False})
    little_memory(monkeypatch, most=60)
    with caplog.at_level("WARNING"):
        found = run_fit(again, items, spin_loss(again), config, tmp_path / "little")
    assert "test: out of memory; continuing with " in caplog.text
    assert caplog.text.count("out of memory") == 1, "it stays with what fits"
    for one, other in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    for (_, one), two in zip(again.parameters(), weights, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_too_little_memory_for_a_single_tree_is_an_error(
    new_players: NewPlayers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    players = new_players(lora={"r": 4}, train={"gradient_checkpointing": False})
    little_memory(monkeypatch, most=5)
    with pytest.raises(torch.OutOfMemoryError):
        run_fit(players, pair_groups(4), spin_loss(players), CONFIG, tmp_path)


def test_other_errors_are_raised(new_players: NewPlayers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    players = new_players(lora={"r": 4})
    calls = []

    def broken(self: LogProbs, layout: PackedBatch) -> Tensor:
        calls.append(layout)
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(LogProbs, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        run_fit(players, pair_groups(4), spin_loss(players), CONFIG, tmp_path)
    assert len(calls) == 1


def test_training_can_be_tried_again_in_the_same_process(new_players: NewPlayers, tmp_path: Path) -> None:
    players = new_players(lora={"r": 4})
    players.save(START)
    poison(players)
    with pytest.raises(TrainingError):
        run_fit(players, pair_groups(2), spin_loss(players), CONFIG, tmp_path / "first")
    players.load(START)
    (step,) = run_fit(players, pair_groups(2), spin_loss(players), CONFIG, tmp_path / "second")
    assert math.isfinite(step["loss"])
