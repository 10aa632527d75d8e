"""Choose the pairs of an iteration: which synthetic responses stand against the real one, and which do not."""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

from spinlm.recipe.objective import Control, TSpin
from spinlm.recipe.schema import Recipe
from spinlm.rundir.records import Example, Generation, Pair

ResponseKey = tuple[int, str, int]
"""Iteration, example and sample of a synthetic response."""


def response_key(generation: Generation) -> ResponseKey:
    """Return the key of a response."""
    return generation.iteration, generation.id, generation.sample


def no_pairs_reason(recipe: Recipe) -> str:
    """Say why no synthetic response makes a training pair."""
    return f"every synthetic response equals the real one{' or is correct' if recipe.opponent.exclude_correct else ''}"


def choose_heldout_pairs(examples: Sequence[Example], generations: Iterable[Generation]) -> list[Pair]:
    """Pair the real response of each example with each synthetic one that differs from it.

    The log-probabilities of the pairs are NaN.
    """
    return [
        _pair(example, generation, contrast=True)
        for example, generation in _by_example(examples, generations)
        if generation.token_ids != example.response_ids
    ]


def choose_train_pairs(
    recipe: Recipe,
    examples: Sequence[Example],
    generations: Iterable[Generation],
    correct: Collection[ResponseKey] = (),
    initial: Iterable[Generation] = (),
) -> list[Pair]:
    """Pair the real response of each example with each synthetic one that gives the recipe's objective a gradient.

    A synthetic response that equals the real one has a gradient under some objectives only. A response in `correct` has
    none with `opponent.exclude_correct`. With `objective.nll_weight`, each response without a gradient makes a row
    without contrast, so that every example keeps its NLL term once per response, as often as in the control.

    Args:
        recipe: the recipe.
        examples: the examples of a shard.
        generations: the responses to them, in the order in which they shall be paired.
        correct: keys of the responses that the scorer rates 1.
        initial: θ_0's responses, for T-SPIN.

    Returns:
        The pairs, example by example. Their log-probabilities are NaN.
    """
    objective = recipe.objective
    assert not isinstance(objective, Control), "the control has no pairs"
    excluded: Collection[ResponseKey] = correct if recipe.opponent.exclude_correct else ()
    starts = {(generation.id, generation.sample): generation for generation in initial}
    pairs = []
    for example, generation in _by_example(examples, generations):
        is_equal = generation.token_ids == example.response_ids
        contrast = response_key(generation) not in excluded
        contrast &= objective.equal_pairs_carry_gradient or not is_equal
        initial_ids = None
        if isinstance(objective, TSpin):
            start = starts[generation.id, generation.sample]
            # The loss must not lower the likelihood of the real response or of a correct one: y' then replaces y₀.
            keep_start = start.token_ids != example.response_ids and response_key(start) not in excluded
            initial_ids = start.token_ids if keep_start else generation.token_ids
            contrast &= not (is_equal and initial_ids == example.response_ids)  # y = y' = y₀: no gradient
        if contrast or objective.nll_weight:
            pairs.append(_pair(example, generation, contrast=contrast, initial_ids=initial_ids if contrast else None))
    return pairs


def _by_example(examples: Sequence[Example], generations: Iterable[Generation]) -> Iterable[tuple[Example, Generation]]:
    responses: dict[str, list[Generation]] = defaultdict(list)
    for generation in generations:
        responses[generation.id].append(generation)
    return ((example, generation) for example in examples for generation in responses[example.id])


def _pair(example: Example, generation: Generation, *, contrast: bool, initial_ids: list[int] | None = None) -> Pair:
    return Pair(
        id=example.id,
        source_iteration=generation.iteration,
        sample=generation.sample,
        prompt_ids=example.prompt_ids,
        real_ids=example.response_ids,
        synthetic_ids=generation.token_ids,
        opponent_real=math.nan,
        opponent_synthetic=math.nan,
        initial_ids=initial_ids,
        contrast=contrast,
    )
