"""Regime: measure, before an iteration trains, whether its gradient differs from that of fine-tuning."""

import gc
import logging
import math
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spinlm.distributed import processes
from spinlm.distributed.progress import track
from spinlm.errors import is_out_of_memory
from spinlm.evals import gradients
from spinlm.evals.forecast import Forecast, Schedule, forecast_margin, pair_pull
from spinlm.evals.gradients import GradientSample, Moments
from spinlm.evals.regime import describe_regime, has_fair_samples, has_fixed_weights, link_scale
from spinlm.model.players import Players
from spinlm.model.prefix_trees import PrefixTree, pack_batch
from spinlm.model.run import Run
from spinlm.recipe.fields import value_at
from spinlm.recipe.objective import Control
from spinlm.recipe.schema import Recipe
from spinlm.rundir.records import Example, RecordFile
from spinlm.training.activation_checkpointing import set_activation_checkpointing
from spinlm.training.batches import PairDataset, PromptGroup, pair_loss, plan_steps
from spinlm.training.schedule import learning_rate_at
from spinlm.training.trainer import LossFunction
from spinlm.utils.atomic import finite, write_json
from spinlm.utils.seeds import derive_seed
from spinlm.utils.signals import check_interrupt

log = logging.getLogger("spinlm")

MAX_COORDINATES = 1 << 20
"""Coordinates of a gradient that are kept. Inner products are estimated from them."""

RESPONSES_PER_PROMPT = 4
"""Mean number of responses to a prompt, the real one included, above which fewer prompts are measured."""


def regime(run: Run, t: int) -> None:
    """Measure the regime of iteration `t`, and write regime.json. Log what it says.

    The control and preference data have none, and neither has `evaluate.regime_prompts: 0`.
    """
    with run.stage("regime", t) as stage:
        if stage.done or not is_measured(run.recipe):
            return
        values = processes.on_rank_zero(_measure_or_reason, run, t)
        stage.outputs = [run.folder.regime(t)]
        if processes.is_main_process():
            for sentence in describe_regime(values, run.recipe, t):
                log.info("iteration %d: %s", t, sentence)


def is_measured(recipe: Recipe) -> bool:
    """Return whether the stage measures anything."""
    return recipe.evaluate.regime_prompts > 0 and not recipe.is_control and not recipe.preferences


def _measure_or_reason(run: Run, t: int) -> dict[str, Any]:
    if run.recipe.train.fsdp != "none":
        values: dict[str, Any] = {"not_measured": "train.fsdp divides the weights over processes"}
    else:
        try:
            values = measure_regime(run, t)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            values = {"not_measured": "too little memory for the gradient of one prompt"}
    gc.collect()
    write_json(run.folder.regime(t), values)
    return values


def measure_regime(run: Run, t: int, total_prompts: int | None = None) -> dict[str, Any]:
    """Measure the regime of iteration `t` from the gradients of a few prompts at θ_t.

    Args:
        run: a run with the pairs of iteration `t`.
        t: the iteration.
        total_prompts: number of training prompts, if the run holds only a part of them.

    Returns:
        The values of regime.json, which docs/run-folder.md defines.
    """
    recipe, players = run.recipe, run.players
    players.load(t - 1)  # θ_t
    groups = _draw_groups(run, t)
    set_activation_checkpointing(players.logprobs, recipe, players.prefix_sharing)
    weights = _Weights(recipe, t)
    with track(f"iteration {t}: regime", len(groups)) as advance:
        sample, total = _sample_gradients(players, groups, weights, derive_seed(recipe.seed, "regime", t), advance)
    rows = sum(len(group.pairs) + group.nll_only for group in groups)
    real_tokens = sum(len(group.tree.responses[0]) for group in groups) / len(groups)
    values: dict[str, Any] = {
        "prompts": len(groups),
        "responses": sum(len(group.tree.responses) for group in groups),
        "pairs": weights.pairs,
        "parameters": total,
        "coordinates": sample.sft.shape[1],
        "real_tokens": real_tokens,
        "beta": link_scale(recipe, t, real_tokens),
    }
    if not weights.pairs:
        return values
    schedule = _schedule(run, t, rows / len(groups), total_prompts)
    step_scale, margin_scale = (len(groups) * weights.per_prompt / count for count in (rows, weights.pairs))
    fair = has_fair_samples(recipe, t) and has_fixed_weights(recipe, t)
    seed = derive_seed(recipe.seed, "regime forecast", t)
    pull = pair_pull(recipe, t, values["beta"], weights.real - weights.nll)
    forecast = forecast_margin(sample, schedule, step_scale, margin_scale, fair, seed, pull)
    moments = Moments.from_sample(sample)
    measured = {
        "cosine": gradients.cosine(moments),
        "cosine_corrected": gradients.cosine_corrected(moments),
        "cosine_corrected_error": gradients.jackknife(gradients.cosine_corrected, moments),
        "noise_ratio": gradients.noise_ratio(moments, weights.real),
        "synthetic_noise_share": gradients.synthetic_noise_share(moments, weights.real, schedule.prompts_per_step),
        "real_weight": weights.real,
        "nll_share": weights.nll / weights.real,
        "forecast": None if forecast is None else _in_link_units(forecast, values["beta"]),
    }
    result: dict[str, Any] = finite(values | measured)
    return result


def _in_link_units(forecast: Forecast, beta: float) -> dict[str, Any]:
    return {
        "beta_margin_by_epoch": [beta * margin for margin in forecast.by_epoch],
        "beta_margin_train": beta * forecast.train,
        "beta_margin_train_error": beta * forecast.train_error,
        "beta_margin_heldout": beta * forecast.heldout,
        "beta_margin_heldout_error": beta * forecast.heldout_error,
    }


def _draw_groups(run: Run, t: int) -> list[PromptGroup]:
    """Draw prompts from the training examples, each with its pairs. A prompt without pairs has the real response only.

    The number of prompts is limited so that there are at most `RESPONSES_PER_PROMPT` responses for each prompt of
    `evaluate.regime_prompts`.
    """
    recipe = run.recipe
    examples = RecordFile(run.folder.examples("train"), Example)
    responses = RESPONSES_PER_PROMPT * recipe.evaluate.regime_prompts
    limit = max(2, responses // (1 + recipe.other_responses_per_prompt(t)))
    count = min(len(examples), recipe.evaluate.regime_prompts, limit)
    chosen = random.Random(derive_seed(recipe.seed, "regime prompts", t)).sample(range(len(examples)), count)
    pairs = PairDataset(run.train_pairs(t), sys.maxsize)
    index = {identifier: number for number, identifier in enumerate(pairs.ids)}
    return [
        pairs[index[example.id]]
        if example.id in index
        else PromptGroup(PrefixTree(example.prompt_ids, (example.response_ids,)))
        for example in (examples[number] for number in sorted(chosen))
    ]


class _Weights:
    """Weights of log p(y|x) of the responses to a prompt in the loss and in the margin, and their means."""

    def __init__(self, recipe: Recipe, t: int):
        assert not isinstance(recipe.objective, Control)
        self._loss: LossFunction = pair_loss(recipe, t)
        self._nll_weight = recipe.objective.nll_weight
        self.per_prompt = recipe.synthetic_per_prompt(t)  # responses; pairs that do not exist weigh 0
        self.pairs = 0  # so far, whose responses differ
        self._prompts = 0
        self._contrast: list[float] = []  # weight of the real response in each pair, of prompts without equal responses
        self._nll_sum = 0.0

    def add(self, group: PromptGroup, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights of the responses [S] in the objective (the loss times −1) and in the margin.

        The derivatives are those at θ = θ_t, where a log-probability equals the stored one. θ_0's responses have no
        stored log-probability; `logprobs` [S] has theirs.
        """
        contrast, rows = torch.zeros(len(group.tree.responses)), len(group.pairs) + group.nll_only
        self._prompts += 1
        if not rows:
            return contrast, contrast
        reference = torch.tensor(group.reference_logprobs)
        at = torch.where(reference.isnan(), logprobs.detach().cpu(), reference).requires_grad_()
        (gradient,) = torch.autograd.grad(self._loss(at, [group]).loss, at)
        for real, synthetic in group.pairs:
            contrast[real] += 1
            contrast[synthetic] -= 1
        nll = self._nll_weight * rows / len(group.tree.responses[0])
        self._nll_sum += nll
        differing = sum(real != synthetic for real, synthetic in group.pairs)
        self.pairs += differing
        if differing == len(group.pairs):
            self._contrast += [(-float(gradient[0]) - nll) / max(1, differing)] * differing
        return -gradient / self.per_prompt, contrast / self.per_prompt

    @property
    def nll(self) -> float:
        """Mean weight of ∇ log p(y|x) through the NLL term, over all prompts."""
        return self._nll_sum / (self._prompts * self.per_prompt)

    @property
    def real(self) -> float:
        """Mean weight of ∇ log p(y|x): that in a pair whose responses differ, and that of the NLL term."""
        return sum(self._contrast) / max(1, len(self._contrast)) + self.nll


def _sample_gradients(
    players: Players, groups: Sequence[PromptGroup], weights: _Weights, seed: int, advance: Any
) -> tuple[GradientSample, int]:
    """Compute the gradients of each prompt at randomly drawn coordinates.

    Returns:
        The gradients, and the number of trained parameters.
    """
    _train_without_dropout(players.logprobs)
    parameters = [parameter for _, parameter in players.parameters()]
    total = sum(parameter.numel() for parameter in parameters)
    chosen = gradients.coordinates(total, MAX_COORDINATES, seed)
    sft, objective, contrast = (torch.zeros(len(groups), len(chosen)) for _ in range(3))
    with _reading_gradients(parameters, chosen) as read:
        for row, group in enumerate(groups):
            check_interrupt()
            logprobs = players.logprobs(pack_batch([group.tree], players.prefix_sharing).to(players.device))
            real = torch.zeros(len(group.tree.responses))
            real[0] = 1
            in_objective, in_contrast = weights.add(group, logprobs)
            basis = [real]
            for wanted in (in_contrast, in_objective):  # both are often in the span of what is there
                if _coefficients(basis, wanted) is None:
                    basis.append(wanted)
            read_rows = [
                read(logprobs, vector, retain_graph=number + 1 < len(basis)) for number, vector in enumerate(basis)
            ]
            for matrix, wanted in ((sft, real), (objective, in_objective), (contrast, in_contrast)):
                factors = _coefficients(basis, wanted)
                assert factors is not None
                for factor, values in zip(factors, read_rows, strict=True):
                    matrix[row].add_(values, alpha=factor)
            advance(1, len(group.tree))
    return GradientSample(sft, objective, contrast, total / max(1, len(chosen))), total


def _coefficients(basis: Sequence[Tensor], wanted: Tensor) -> list[float] | None:
    """Return the factors with which the basis vectors [S] add up to another vector; None if they cannot."""
    matrix = torch.stack(list(basis), dim=1).double()
    factors = torch.linalg.lstsq(matrix, wanted.double()[:, None]).solution
    if not torch.allclose(matrix @ factors, wanted.double()[:, None], rtol=1e-6, atol=1e-9):
        return None
    values: list[float] = factors.flatten().tolist()
    return values


def _train_without_dropout(model: nn.Module) -> None:
    """Set the mode of training, in which activation checkpointing works, but without the adapter's dropout."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()


@contextmanager
def _reading_gradients(parameters: Sequence[nn.Parameter], chosen: Tensor) -> Iterator[Any]:
    """Yield a function `read(outputs, weights, retain_graph)` that returns the gradient of Σ weights · outputs: [C].

    The gradient of a parameter is freed as soon as its coordinates are read.

    Args:
        parameters: the trained parameters.
        chosen: coordinates over all of them, sorted: [C].
    """
    device = parameters[0].device
    values = torch.zeros(len(chosen), device=device)
    handles = []
    start = offset = 0
    for parameter in parameters:
        end = int(torch.searchsorted(chosen, offset + parameter.numel()))
        indices = (chosen[start:end] - offset).to(device)

        def keep(parameter: Tensor, where: slice = slice(start, end), indices: Tensor = indices) -> None:
            assert parameter.grad is not None
            values[where] = parameter.grad.flatten()[indices].float()
            parameter.grad = None

        parameter.grad = None
        handles.append(parameter.register_post_accumulate_grad_hook(keep))
        start, offset = end, offset + parameter.numel()

    def read(outputs: Tensor, weights: Tensor, retain_graph: bool) -> Tensor:
        values.zero_()
        outputs.backward(weights.to(outputs), retain_graph=retain_graph)
        return values.cpu().clone()

    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()
        for parameter in parameters:
            parameter.grad = None  # one may be left if memory ran out in the backward pass


def _schedule(run: Run, t: int, rows_per_prompt: float, total_prompts: int | None) -> Schedule:
    """Return the steps that training will take; with `total_prompts`, as far as these pairs tell."""
    recipe, train = run.recipe, run.recipe.train
    if total_prompts is None:
        prompts = len(RecordFile(run.folder.examples("train"), Example))
        dataset = PairDataset(run.train_pairs(t), train.batch_size)
        seed = derive_seed(recipe.seed, "train", t)
        epochs = [epoch for epoch, _ in plan_steps(dataset.batch_cost, train.batch_size, train.epochs, seed)]
    else:
        prompts = total_prompts
        steps = math.ceil(prompts * rows_per_prompt / train.batch_size)
        epochs = [epoch for epoch in range(train.epochs) for _ in range(steps)]
    return Schedule(
        optimizer=train.optimizer,
        max_grad_norm=train.max_grad_norm,
        prompts=prompts,
        prompts_per_step=prompts * train.epochs / len(epochs),
        epochs=epochs,
        learning_rates=[
            learning_rate_at(
                step,
                len(epochs),
                peak=value_at(train.learning_rate, t),
                warmup_ratio=train.warmup_ratio,
                lr_scheduler=train.lr_scheduler,
            )
            for step in range(len(epochs))
        ],
    )
