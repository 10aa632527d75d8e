"""The objectives against hand-worked numbers, DPO's published loss, and the theorems of the SPIN paper."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from models import naive_logprob, tiny_model, tiny_recipe
from spinlm.model.attention import register_tree_attention
from spinlm.model.logprobs import LogProbs
from spinlm.model.prefix_trees import PrefixTree, pack_batch
from spinlm.rundir.records import Pair, write_pairs
from spinlm.training.batches import PairDataset, PromptGroup, pair_indices, pair_loss
from spinlm.training.objectives import LINKS, dpo_positive, margin, mean_nll, space, spin, t_spin

SLOPE_AT_0 = {"logistic": 0.5, "hinge": 1.0, "exponential": 1.0}  # −ℓ'(0)
AT_0 = {"logistic": math.log(2), "hinge": 1.0, "exponential": 1.0}  # ℓ(0)

# r(y) = 1 and −0.5, r(y') = −1 and 1.5: the margins are 2 and −2.
REAL, SYNTHETIC = torch.tensor([-2.0, -3.0]), torch.tensor([-5.0, -2.0])
OPPONENT_REAL, OPPONENT_SYNTHETIC = torch.tensor([-3.0, -2.5]), torch.tensor([-4.0, -3.5])
FOUR = (REAL, SYNTHETIC, OPPONENT_REAL, OPPONENT_SYNTHETIC)


@pytest.mark.parametrize(
    ("link", "beta", "expected"),
    [
        ("logistic", 0.5, [0.313261688, 1.313261688]),  # log(1 + 1/e), log(1 + e)
        ("logistic", 2.0, [0.018149927, 4.018149927]),  # log(1 + e^−4), log(1 + e^4)
        ("hinge", 0.5, [0.0, 2.0]),
        ("hinge", 0.25, [0.5, 1.5]),
        ("exponential", 0.5, [0.367879441, 2.718281828]),
        ("exponential", 2.0, [0.018315639, 54.598150033]),
    ],
)
def test_spin_by_hand(link: str, beta: float, expected: list[float]) -> None:
    torch.testing.assert_close(spin(*FOUR, beta=beta, link=link), torch.tensor(expected))
    assert margin(*FOUR).tolist() == [2.0, -2.0]


def test_logistic_is_the_default() -> None:
    assert torch.equal(spin(*FOUR, beta=1.0), spin(*FOUR, beta=1.0, link="logistic"))


@pytest.mark.parametrize("beta", [0.1, 5.0])
def test_loss_is_ln_2_where_player_and_opponent_agree(beta: float) -> None:
    real, synthetic = torch.tensor([-1.5, -700.0]), torch.tensor([-90.25, -0.125])
    assert spin(real, synthetic, real, synthetic, beta=beta).tolist() == [pytest.approx(math.log(2), abs=1e-7)] * 2
    assert margin(real, synthetic, real, synthetic).tolist() == [0.0, 0.0]


def test_logistic_loss_stays_finite_at_large_margins() -> None:
    zero = torch.zeros(2)
    real = torch.tensor([-1000.0, 1000.0], requires_grad=True)
    loss = spin(real, zero, zero, zero, beta=5.0)
    loss.sum().backward()
    assert loss.tolist() == [5000.0, 0.0]
    assert real.grad is not None and real.grad.tolist() == [-5.0, 0.0]


def test_spin_is_dpo_with_the_real_response_chosen() -> None:
    """DPO, arXiv 2305.18290, equation 7: −log σ(β log π(y_w)/π_ref(y_w) − β log π(y_l)/π_ref(y_l))."""
    torch.manual_seed(1)
    chosen, rejected, reference_chosen, reference_rejected = -100 * torch.rand(4, 1000, dtype=torch.float64)

    ours = spin(chosen, rejected, reference_chosen, reference_rejected, beta=0.1)

    for row in range(1000):
        winner = math.exp(chosen[row]) / math.exp(reference_chosen[row])
        loser = math.exp(rejected[row]) / math.exp(reference_rejected[row])
        sigmoid = 1 / (1 + math.exp(-(0.1 * math.log(winner) - 0.1 * math.log(loser))))
        assert ours[row].item() == pytest.approx(-math.log(sigmoid), rel=1e-9)


# The other objectives, of the same pairs: r(y) = 1, −0.5; r(y') = −1, 1.5.


def test_length_normalized_spin_by_hand() -> None:
    """1/2 − (−1)/4 = 0.75 and −0.5/5 − 1.5/3 = −0.6."""
    tokens = torch.tensor([2, 5]), torch.tensor([4, 3])
    losses = spin(*FOUR, beta=2.0, tokens=tokens)
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-1.5)), math.log1p(math.exp(1.2))])


def test_dpo_positive_by_hand() -> None:
    """The second real response has become less likely, by 0.5: its margin of −2 is taken for −2 − 3 · 0.5."""
    losses = dpo_positive(*FOUR, beta=0.4, dpop_lambda=3.0)
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-0.8)), math.log1p(math.exp(1.4))])
    assert torch.equal(dpo_positive(*FOUR, beta=0.4, dpop_lambda=0.0), spin(*FOUR, beta=0.4))


@pytest.mark.parametrize("mu", [0.25, 1.0, 3.0])
def test_space_by_hand(mu: float) -> None:
    def sigma(mu: float, x: float) -> float:
        return 1 / (1 + mu * math.exp(-x))

    ratios = [(1.0, -1.0), (-0.5, 1.5)]
    expected = [-math.log(sigma(mu, r)) - mu * math.log(sigma(1 / mu, -other)) for r, other in ratios]
    assert space(*FOUR, mu=mu).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("mu", [0.25, 1.0, 3.0])
def test_space_is_least_at_the_ratio_of_data_and_opponent(mu: float) -> None:
    """Noise contrastive estimation: E over y ~ data and y' ~ opponent has its minimum where p_θ is the data."""
    theta = DATA.log().clone().requires_grad_()
    total = torch.zeros((), dtype=theta.dtype)
    player, opponent = torch.log_softmax(theta, dim=1), OPPONENT.log()
    for x, y, z in itertools.product(range(3), range(5), range(5)):
        total = total + DATA[x, y] * OPPONENT[x, z] * space(
            player[x, y], player[x, z], opponent[x, y], opponent[x, z], mu=mu
        )
    (gradient,) = torch.autograd.grad(total, theta)
    assert gradient.abs().max() < 1e-15


def test_space_asks_of_each_response_alone() -> None:
    """Both responses have become less likely by the same: SPIN sees nothing, SPACE brings the real one back."""
    real, synthetic = torch.tensor([-9.0], requires_grad=True), torch.tensor([-9.0], requires_grad=True)
    opponent = torch.tensor([-4.0])
    for loss, expected in (
        (spin(real, synthetic, opponent, opponent, beta=1.0), -0.5),
        (space(real, synthetic, opponent, opponent, mu=1.0), -1 / (1 + math.exp(-5))),
    ):
        assert torch.autograd.grad(loss.sum(), real)[0].item() == pytest.approx(expected)


@pytest.mark.parametrize("link", LINKS)
def test_t_spin_by_hand(link: str) -> None:
    """log p: −2, −5 and −6 in the first pair: ℓ(0.5 · 3) + 2 ℓ(0.5 · 1); −3, −2 and −1.5 in the second."""
    initial = torch.tensor([-6.0, -1.5])
    losses = t_spin(REAL, SYNTHETIC, initial, beta=0.5, history_weight=2.0, link=link)
    ell = {
        "logistic": lambda z: math.log1p(math.exp(-z)),
        "hinge": lambda z: max(0.0, 1 - z),
        "exponential": lambda z: math.exp(-z),
    }[link]
    assert losses.tolist() == pytest.approx([ell(1.5) + 2 * ell(0.5), ell(-0.5) + 2 * ell(-0.25)])


def test_t_spin_learns_nothing_from_a_response_beside_itself() -> None:
    """In iteration 0 the opponent is θ_0: the second term is a constant."""
    real, synthetic = torch.tensor([-2.0], requires_grad=True), torch.tensor([-5.0], requires_grad=True)
    both = []
    for weight in (0.0, 7.0):
        loss = t_spin(real, synthetic, synthetic, beta=0.5, history_weight=weight)
        both.append(torch.autograd.grad(loss.sum(), (real, synthetic)))
    assert both[0] == both[1]


def test_losses_stay_finite_at_large_margins() -> None:
    zero = torch.zeros(2)
    real = torch.tensor([-1000.0, 1000.0])
    assert dpo_positive(real, zero, zero, zero, beta=1.0, dpop_lambda=2.0).tolist() == [3000.0, 0.0]
    assert space(real, -real, zero, zero, mu=1.0).tolist() == [2000.0, 0.0]
    assert t_spin(real, zero, -real, beta=1.0, history_weight=1.0).tolist() == [2000.0, 0.0]


def test_mean_nll_is_per_token() -> None:
    assert mean_nll(torch.tensor([-6.0, -1.0]), torch.tensor([3, 4])).tolist() == [2.0, 0.25]


@pytest.mark.parametrize("link", LINKS)
def test_gradient_before_the_first_step(link: str) -> None:
    """It is −β · (−ℓ'(0)) · ∇[log p(y) − log p(y')], averaged over pairs; with the logistic ℓ that is β/2."""
    register_tree_attention()
    model = tiny_model("llama", vocabulary=64)
    trees = [PrefixTree([5, 9, 7, 11], ([20, 21, 22], [30, 31])), PrefixTree([8, 6], ([40], [41, 42, 43, 44]))]
    beta = 0.3

    logprobs = LogProbs(model)(pack_batch(trees, True))  # y, y' of each tree
    frozen = logprobs.detach()
    spin(logprobs[0::2], logprobs[1::2], frozen[0::2], frozen[1::2], beta=beta, link=link).mean().backward()
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model.zero_grad()
    model.set_attn_implementation("sdpa")
    gaps = [
        naive_logprob(model, tree.prompt, tree.responses[0]) - naive_logprob(model, tree.prompt, tree.responses[1])
        for tree in trees
    ]
    torch.stack(gaps).mean().backward()
    theirs = {name: -beta * SLOPE_AT_0[link] * parameter.grad for name, parameter in model.named_parameters()}
    assert distance(ours, theirs) < 1e-5


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """‖ours − theirs‖ / ‖theirs‖ over all parameters."""
    apart = sum((ours[name] - theirs[name]).square().sum() for name in theirs)
    return math.sqrt(apart / sum(gradient.square().sum() for gradient in theirs.values()))


# A world with 3 prompts and 5 responses, where every expectation is a finite sum.

torch.manual_seed(2)
DATA = torch.softmax(torch.randn(3, 5, dtype=torch.float64), dim=1)  # p_data(y|x)
OPPONENT = torch.softmax(torch.randn(3, 5, dtype=torch.float64), dim=1)  # p_θt(y|x)


def expected_loss(theta: Tensor, data: Tensor, opponent: Tensor, beta: float, link: str) -> Tensor:
    """E[ℓ] over prompts, y ~ data and y' ~ opponent, for the player softmax(theta)."""
    player, reference = torch.log_softmax(theta, dim=1), opponent.log()
    prompts, responses = theta.shape
    total = torch.zeros((), dtype=theta.dtype)
    for x in range(prompts):
        y, z = (index.flatten() for index in torch.meshgrid(*[torch.arange(responses)] * 2, indexing="ij"))
        losses = spin(player[x, y], player[x, z], reference[x, y], reference[x, z], beta=beta, link=link)
        total = total + (data[x, y] * opponent[x, z] * losses).sum() / prompts
    return total


def gradient_at(theta: Tensor, *game: object) -> Tensor:
    theta = theta.clone().requires_grad_()
    expected_loss(theta, *game).backward()  # type: ignore[arg-type]
    assert theta.grad is not None
    return theta.grad


def kl(data: Tensor, theta: Tensor) -> float:
    return (data * (data.log() - torch.log_softmax(theta, dim=1))).sum().item()


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("link", LINKS)
def test_the_data_is_a_fixed_point(link: str, beta: float) -> None:
    """Theorem 5.2: an opponent that equals the data leaves nothing to learn."""
    gradient = gradient_at(DATA.log(), DATA, DATA, beta, link)
    assert gradient.abs().max() < 1e-15
    assert expected_loss(DATA.log(), DATA, DATA, beta, link).item() == pytest.approx(AT_0[link], abs=1e-12)


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("link", LINKS)
def test_another_opponent_can_be_improved_on(link: str, beta: float) -> None:
    """At θ = θ_t the gradient is −β·(−ℓ'(0))·(p_data − p_θt), so a step against it goes toward the data."""
    theta = OPPONENT.log()
    gradient = gradient_at(theta, DATA, OPPONENT, beta, link)
    torch.testing.assert_close(gradient, -beta * SLOPE_AT_0[link] * (DATA - OPPONENT) / 3, rtol=1e-10, atol=1e-15)

    stepped = theta - 0.1 / beta * gradient
    assert expected_loss(stepped, DATA, OPPONENT, beta, link) < expected_loss(theta, DATA, OPPONENT, beta, link)
    assert kl(DATA, stepped) < kl(DATA, theta)


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_best_response_to_an_opponent(beta: float) -> None:
    """Theorem 5.4, logistic ℓ: the minimizer is p_θt · (p_data / p_θt)^(1/β), normalized."""
    best = OPPONENT.log() + (DATA / OPPONENT).log() / beta
    assert gradient_at(best, DATA, OPPONENT, beta, "logistic").abs().max() < 1e-15


@pytest.mark.parametrize("link", LINKS)
def test_the_game_comes_ever_closer_to_the_data(link: str) -> None:
    """A small step against each opponent, which then takes the player's place."""
    theta = OPPONENT.log()
    distances = [kl(DATA, theta)]
    for _ in range(100):
        theta = theta - gradient_at(theta, DATA, torch.softmax(theta, dim=1), 1.0, link)
        distances.append(kl(DATA, theta))
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.05 * distances[0]


def test_objective_of_a_micro_batch_by_hand(tmp_path) -> None:
    """Two trees, three pairs: the real response is shared by the pairs of its tree; sums, not means."""
    items = [
        PromptGroup(PrefixTree([1, 2], ([3, 4], [5], [6, 7, 8])), (-3.0, -4.0, -1.0), ((0, 1), (0, 2))),
        PromptGroup(PrefixTree([1], ([3, 4, 5, 6], [5])), (-2.5, -3.5), ((0, 1),)),
    ]
    logprobs = torch.tensor([-2.0, -5.0, -1.5, -3.0, -2.0], requires_grad=True)
    recipe = tiny_recipe(tmp_path, objective={"beta": [9.0, 0.5], "nll_weight": 0.1}, selfplay={"iterations": 2})

    total = pair_loss(recipe, 1)(logprobs, items)
    total.loss.backward()

    # Margins 1 + 1, 1 + 0.5 and −0.5 − 1.5; −log p(y)/|y| of the real ones: 2/2 (twice), 3/4.
    losses = [math.log1p(math.exp(-0.5 * margin)) for margin in (2.0, 1.5, -2.0)]
    assert total.loss.item() == pytest.approx(sum(losses) + 0.1 * (1 + 1 + 0.75))
    assert total.metrics == {"margin": 1.5, "accuracy": 2.0, "real_nll": 2.75}
    assert pair_indices(items).tolist() == [[0, 0, 3], [1, 2, 4], [1, 2, 4]]
    pulls = [0.5 / (1 + math.exp(0.5 * margin)) for margin in (2.0, 1.5, -2.0)]
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx(
        [-pulls[0] - pulls[1] - 0.1, pulls[0], pulls[1], -pulls[2] - 0.1 / 4, pulls[2]]
    )


ONE = tuple(torch.tensor([value]) for value in (-4.0, -5.0, -3.0, -4.0))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"name": "dpo-positive", "dpop_lambda": 3.0}, dpo_positive(*ONE, beta=0.1, dpop_lambda=3.0)),
        ({"name": "space", "mu": 2.0}, space(*ONE, mu=2.0)),
        ({"name": "spin", "link": "hinge", "beta": 2.0}, spin(*ONE, beta=2.0, link="hinge")),
        ({"name": "spin", "label_smoothing": 0.2}, spin(*ONE, beta=0.1, label_smoothing=0.2)),
        (
            {"name": "spin", "length_normalize": True},
            spin(*ONE, beta=0.1, tokens=(torch.tensor([2.0]), torch.tensor([1.0]))),
        ),
        (
            {"name": "t-spin", "history_weight": 0.3, "link": "exponential"},
            t_spin(ONE[0], ONE[1], torch.tensor([-7.0]), beta=0.1, history_weight=0.3, link="exponential"),
        ),
    ],
)
def test_the_recipes_settings_reach_the_objective(tmp_path, settings, expected) -> None:
    """A response of θ_0 stands beside the pair, for the objective that asks for it."""
    item = PromptGroup(PrefixTree([1], ([3, 4], [5], [6])), (-3.0, -4.0, math.nan), ((0, 1),), (2,))
    total = pair_loss(tiny_recipe(tmp_path, objective=settings), 0)(torch.tensor([-4.0, -5.0, -7.0]), [item])
    assert total.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_responses_of_the_start_beside_pairs(tmp_path) -> None:
    """A response that the tree already has is not computed twice."""
    with_start = [
        Pair("a", 1, 0, [1], [2, 3], [4], -1.0, -2.0, initial_ids=[5, 6]),
        Pair("a", 0, 0, [1], [2, 3], [5, 6], -1.0, -3.0, initial_ids=[5, 6]),
    ]
    write_pairs(tmp_path / "new.arrow", with_start)
    write_pairs(tmp_path / "without.arrow", [Pair("b", 0, 0, [1], [2], [4], -1.0, -2.0)])
    items = PairDataset([tmp_path / "without.arrow", tmp_path / "new.arrow"], batch_size=8)
    assert [items[0].tree.responses, items[0].initial] == [([2], [4]), ()]
    assert items[1].tree.responses == ([2, 3], [4], [5, 6]) and items[1].initial == (2, 2)
    alone = PairDataset([tmp_path / "new.arrow"], batch_size=1)[0]  # the group is split: y₀ is added
    assert (
        alone.tree.responses == ([2, 3], [4], [5, 6])
        and alone.initial == (2,)
        and math.isnan(alone.reference_logprobs[2])
    )


@pytest.mark.parametrize("mix", [1.0, 0.75, 0.0])
@pytest.mark.parametrize("settings", [{"name": "spin"}, {"name": "dpo-positive", "dpop_lambda": 3.0}])
def test_reference_mix_of_a_micro_batch_by_hand(tmp_path, settings, mix) -> None:
    """log p_θt −3 and −4, log p_θ0 −5 and −4: with m = 0.75 the reference is −3.5 and −4. The margin is against θ_t.

    r(y) = −4 + 3.5 = −0.5 and r(y') = −5 + 4 = −1 make z = 0.1 · 0.5; DPO-Positive takes 3 · 0.5 off.
    """
    pair = Pair("a", 0, 0, [1], [3, 4], [5], -3.0, -4.0, start_real=-5.0, start_synthetic=-4.0)
    write_pairs(tmp_path / "mixed.arrow", [pair])
    item = PairDataset([tmp_path / "mixed.arrow"], batch_size=8)[0]
    recipe = tiny_recipe(tmp_path, objective={**settings, "reference_mix": mix}, selfplay={"iterations": 2})
    total = pair_loss(recipe, 1)(torch.tensor([-4.0, -5.0]), [item])
    real_ratio = {1.0: -1.0, 0.75: -0.5, 0.0: 1.0}[mix]
    z = 0.1 * (real_ratio + 1 - settings.get("dpop_lambda", 0.0) * max(0, -real_ratio))
    assert total.loss.item() == pytest.approx(math.log1p(math.exp(-z)))
    assert total.metrics["margin"] == 0.0  # (−4 + 3) − (−5 + 4)
