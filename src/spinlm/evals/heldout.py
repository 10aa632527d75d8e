"""What is measured on held-out prompts, none of which was ever trained on."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from spinlm.interrupt import stop_if_asked
from spinlm.model.players import Players
from spinlm.model.trees import Tree, micro_batches
from spinlm.records import Example, HeldOutAnswer

NGRAM = 4


def nll_by_example(players: Players, examples: Sequence[Example], packing: str, budget: int) -> list[float]:
    """Negative log-likelihood of each real response under the current player, in nats per token."""
    trees = [Tree(example.prompt_ids, (example.response_ids,)) for example in examples]
    nll = [math.nan] * len(trees)
    for chosen in micro_batches(trees, budget, packing):
        stop_if_asked()
        values = players.response_logprobs([trees[index] for index in chosen], packing)
        for index, value in zip(chosen, values, strict=True):
            nll[index] = -value / len(examples[index].response_ids)
    return nll


def mean_heldout_nll(players: Players, examples: Sequence[Example], packing: str, budget: int) -> float:
    """Mean over examples of `nll_by_example`."""
    return float(np.mean(nll_by_example(players, examples, packing, budget)))


def pair_metrics(players: Players, table: Any, packing: str, budget: int) -> dict[str, float]:
    """How well the current player tells real from synthetic responses, against the opponent that wrote them.

    Args:
        players: in the weights of the main player.
        table: pairs as `read_pairs` gives them, with the opponent's log-probabilities.
        packing: `tree` or `pair`.
        budget: tokens in one forward pass.

    Returns:
        pair_accuracy: share of pairs with a positive margin.
        margin: mean of r(y) − r(y'), in nats. Both are missing where there are no pairs.
    """
    rows = table.to_pylist()
    if not rows:
        return {}
    trees = [Tree(row["prompt_ids"], (row["real_ids"], row["synthetic_ids"])) for row in rows]
    margins = np.empty(len(rows))
    for chosen in micro_batches(trees, budget, packing):
        stop_if_asked()
        values = iter(players.response_logprobs([trees[index] for index in chosen], packing))
        for index in chosen:
            real, synthetic = next(values), next(values)
            row = rows[index]
            margins[index] = (real - row["opponent_real"]) - (synthetic - row["opponent_synthetic"])
    return {"pair_accuracy": float((margins > 0).mean()), "margin": float(margins.mean())}


def repetition(token_ids: Sequence[int]) -> float:
    """Share of a response's 4-grams of tokens that occurred before in it; 0 where it has none."""
    grams = [tuple(token_ids[start : start + NGRAM]) for start in range(len(token_ids) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def summarise(answers: Sequence[HeldOutAnswer]) -> dict[str, float]:
    """Means over the held-out prompts; `…_se` is the standard error of a mean."""
    measures: dict[str, list[float]] = {
        "heldout_nll": [answer.nll for answer in answers],
        "identical_share": [float(answer.identical) for answer in answers],
        "unfinished_share": [float(not answer.finished) for answer in answers],
        "mean_tokens": [float(len(answer.token_ids)) for answer in answers],
        "repetition": [answer.repetition for answer in answers],
    }
    scores = [answer.task_score for answer in answers if answer.task_score is not None]
    if scores:
        measures = {"task_score": scores, **measures}
    summary = {name: float(np.mean(values)) for name, values in measures.items()}
    for name in ("task_score", "heldout_nll"):
        if name in measures:
            summary[f"{name}_se"] = standard_error(measures[name])
    return summary


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean; 0 for fewer than two values."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
