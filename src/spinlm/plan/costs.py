"""What each iteration does: pairs, optimizer steps and tokens, counted from the recipe and the lengths of the data."""

import math
from dataclasses import dataclass
from functools import partial

from spinlm.plan.lengths import Lengths
from spinlm.recipe.schema import Recipe
from spinlm.rundir.stage_graph import START

ASSUMED_PROMPTS = 1000  # if neither the recipe nor the data say how many


@dataclass(frozen=True, slots=True)
class GenerationCost:
    """Responses to generate."""

    responses: int
    response_tokens: int  # of one response, as expected
    max_response_tokens: int  # of one response


@dataclass(frozen=True, slots=True)
class IterationCost:
    """The work of one iteration. Iteration `START` is the starting player's SFT, if any, and its evaluation."""

    iteration: int
    prompts: int
    responses: int  # synthetic responses to train on
    pairs: int
    steps: int
    prompts_per_step: int
    opponent: GenerationCost  # by the opponent, to training and held-out prompts
    heldout: GenerationCost  # by the player, to held-out prompts: greedy and sampled
    reference_tokens: int  # read by the opponent, and by the starting player if the reference is a mixture with it
    evaluation_tokens: int  # read by the player and the starting player
    guard_tokens: int  # held-out examples read between epochs
    training_tokens: int  # with gradients, in all epochs

    @property
    def generated(self) -> int:
        """Expected tokens of all generated responses."""
        return sum(part.responses * part.response_tokens for part in (self.opponent, self.heldout))

    @property
    def max_generated(self) -> int:
        """Tokens of all generated responses if each is as long as possible."""
        return sum(part.responses * part.max_response_tokens for part in (self.opponent, self.heldout))

    @property
    def scored(self) -> int:
        """Tokens read without gradients."""
        return self.reference_tokens + self.evaluation_tokens + self.guard_tokens


def num_reserved(recipe: Recipe) -> int:
    """Return the number of examples that self-play does not train on: held-out examples, and those of SFT alone."""
    return recipe.data.heldout + ((recipe.sft and recipe.sft.prompts) or 0)


def num_prompts(recipe: Recipe, lengths: Lengths) -> int:
    """Return the number of prompts in self-play; ASSUMED_PROMPTS if unknown."""
    if lengths.examples is None:
        return recipe.data.prompts or ASSUMED_PROMPTS
    available = max(0, lengths.examples - num_reserved(recipe))
    return min(recipe.data.prompts or available, available)


def iteration_costs(recipe: Recipe, lengths: Lengths, prefix_sharing: bool) -> tuple[IterationCost, ...]:
    """Return the cost of the start, then of each iteration."""
    iterations = (_iteration_cost(recipe, lengths, prefix_sharing, t) for t in range(recipe.selfplay.iterations))
    return _start_cost(recipe, lengths, prefix_sharing), *iterations


def _start_cost(recipe: Recipe, lengths: Lengths, prefix_sharing: bool) -> IterationCost:
    heldout, sft = recipe.data.heldout, recipe.sft
    prompts = (sft.prompts or num_prompts(recipe, lengths)) if sft else 0
    tokens = partial(lengths.tokens, prefix_sharing)
    return IterationCost(
        iteration=START,
        prompts=prompts,
        responses=0,
        pairs=0,
        steps=sft.epochs * math.ceil(prompts / sft.batch_size) if sft else 0,
        prompts_per_step=sft.batch_size if sft else 1,
        opponent=GenerationCost(0, 0, 0),
        heldout=_heldout_generation(recipe, lengths),
        reference_tokens=0,
        evaluation_tokens=tokens((2 * heldout, 1)),  # real response and one response of the player, read twice
        guard_tokens=tokens(((sft.epochs + 1) * heldout, 0)) if sft else 0,
        training_tokens=tokens((sft.epochs * prompts, 0)) if sft else 0,
    )


def _iteration_cost(recipe: Recipe, lengths: Lengths, prefix_sharing: bool, t: int) -> IterationCost:
    train, opponent, heldout = recipe.train, recipe.opponent, recipe.data.heldout
    prompts, samples, used = num_prompts(recipe, lengths), opponent.samples_per_prompt, recipe.synthetic_per_prompt(t)
    train_prompts = 0 if recipe.is_control else prompts  # prompts that the opponent responds to for training
    prompts_per_step, epochs = max(1, train.batch_size // used), 0 if recipe.extrapolates else train.epochs
    responses = 0 if recipe.preferences else (train_prompts + heldout) * samples
    tokens = partial(lengths.tokens, prefix_sharing)
    return IterationCost(
        iteration=t,
        prompts=prompts,
        responses=train_prompts * samples,
        pairs=train_prompts * used,
        # All pairs of a prompt are in the same step.
        steps=epochs * math.ceil(prompts / prompts_per_step),
        prompts_per_step=prompts_per_step,
        opponent=GenerationCost(responses, lengths.synthetic, opponent.max_new_tokens),
        heldout=_heldout_generation(recipe, lengths),
        reference_tokens=tokens((train_prompts * (1 + recipe.mixes_start(t)), used), (heldout, samples)),
        # The player reads the opponent's responses and one of its own; the starting player reads that one.
        evaluation_tokens=tokens((heldout, samples + 1), (heldout, 1)),
        guard_tokens=tokens((max(0, epochs - 1) * heldout if recipe.selfplay.guard else 0, 0)),
        training_tokens=tokens((epochs * prompts, recipe.other_responses_per_prompt(t))),
    )


def _heldout_generation(recipe: Recipe, lengths: Lengths) -> GenerationCost:
    """The responses to held-out prompts: greedy, from the player's own distribution, and at further temperatures."""
    limit = recipe.evaluate.max_new_tokens or recipe.opponent.max_new_tokens
    return GenerationCost(recipe.evaluate.responses_per_prompt * recipe.data.heldout, min(limit, lengths.real), limit)
