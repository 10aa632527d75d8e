"""What is measured on held-out prompts, none of which was ever trained on."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spinlm.interrupt import stop_if_asked
from spinlm.model.players import Players
from spinlm.model.trees import Tree, micro_batches
from spinlm.records import Example, HeldOutAnswer

NGRAM = 4


@dataclass(frozen=True)
class RealAnswers:
    """What a player makes of the real held-out responses."""

    nll: list[float]  # of each example, nats per token
    margins: list[float]  # r(y) − r(y') of each pair with the opponent's responses, in nats

    def pair_metrics(self) -> dict[str, float]:
        """Share of pairs with a positive margin, and the mean margin; empty where there are no pairs."""
        if not self.margins:
            return {}
        margins = np.array(self.margins)
        return {"pair_accuracy": float((margins > 0).mean()), "margin": float(margins.mean())}


def judge_real(
    players: Players, examples: Sequence[Example], packing: str, budget: int, pairs: Any = None
) -> RealAnswers:
    """How likely the current player finds the real responses, and how well it tells them from its opponent's.

    Args:
        players: in the weights of the player to judge.
        examples: the held-out ones.
        packing: `tree` or `pair`.
        budget: tokens in one forward pass.
        pairs: table as `read_pairs` gives it, of these examples; absent means no margins.
    """
    by_id: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in pairs.to_pylist() if pairs is not None else []:
        by_id[row["id"]].append(row)
    trees = [
        Tree(example.prompt_ids, (example.response_ids, *(row["synthetic_ids"] for row in by_id[example.id])))
        for example in examples
    ]
    nll = [math.nan] * len(trees)
    margins = []
    for chosen in micro_batches(trees, budget, packing):
        stop_if_asked()
        values = iter(players.response_logprobs([trees[index] for index in chosen], packing))
        for index in chosen:
            example, real = examples[index], next(values)
            nll[index] = -real / len(example.response_ids)
            for row in by_id[example.id]:
                margins.append((real - row["opponent_real"]) - (next(values) - row["opponent_synthetic"]))
    return RealAnswers(nll, margins)


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
