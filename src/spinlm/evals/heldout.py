"""What is measured on held-out prompts, none of which was ever trained on."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spinlm.evals.probe import probe_auc
from spinlm.model.players import Players
from spinlm.model.prefix_trees import PrefixTree, micro_batches
from spinlm.rundir.records import Example, HeldoutGreedy, HeldoutSampled
from spinlm.utils.signals import check_interrupt
from spinlm.utils.statistics import standard_error

NGRAM = 4
RESAMPLES = 2000  # of the bootstrap


@dataclass(frozen=True)
class RealScores:
    """What a player makes of the real held-out responses."""

    nll: list[float]  # of each example, nats per token
    margins: list[list[float]]  # r(y) − r(y') of each example's pairs with the opponent's responses, in nats
    sampled: list[float] = field(default_factory=list)  # log-probability of each example's sampled response, if any


def real_nll_and_margins(
    players: Players,
    examples: Sequence[Example],
    prefix_sharing: bool,
    budget: int,
    pairs: Any = None,
    sampled: Sequence[Sequence[int]] = (),
) -> RealScores:
    """How likely the current player finds the real responses, and how well it tells them from its opponent's.

    Args:
        players: in the weights of the player to judge.
        examples: the held-out ones.
        prefix_sharing: whether all responses to a prompt share one row.
        budget: tokens in one forward pass.
        pairs: table as `read_pairs` gives it, of these examples; absent means no margins.
        sampled: a sampled response to each example, to be judged in the same pass.
    """
    by_id: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in pairs.to_pylist() if pairs is not None else []:
        by_id[row["id"]].append(row)
    more: list[list[Sequence[int]]] = [[ids] for ids in sampled] or [[] for _ in examples]
    trees = [
        PrefixTree(
            example.prompt_ids, (example.response_ids, *(row["synthetic_ids"] for row in by_id[example.id]), *also)
        )
        for example, also in zip(examples, more, strict=True)
    ]
    nll, own = [math.nan] * len(trees), [math.nan] * len(sampled)
    margins: list[list[float]] = [[] for _ in trees]
    for chosen in micro_batches(trees, budget, prefix_sharing):
        check_interrupt()
        values = iter(players.response_logprobs([trees[index] for index in chosen], prefix_sharing))
        for index in chosen:
            example, real = examples[index], next(values)
            nll[index] = -real / len(example.response_ids)
            for row in by_id[example.id]:
                margins[index].append((real - row["opponent_real"]) - (next(values) - row["opponent_synthetic"]))
            if sampled:
                own[index] = next(values)
    return RealScores(nll, margins, own)


@dataclass(frozen=True)
class SampleFeatures:
    """What a player makes of the real responses to P prompts and of sampled ones."""

    logprobs: list[float]  # [P] of the sampled responses
    real: np.ndarray  # [P, D] features of the real responses
    sampled: np.ndarray  # [P, D] of the sampled ones


def sample_features(
    players: Players, examples: Sequence[Example], responses: Sequence[Sequence[int]], prefix_sharing: bool, budget: int
) -> SampleFeatures:
    """Let a player read the real response and a sampled one to each held-out prompt.

    Args:
        players: in the weights of the player that reads.
        examples: the held-out ones.
        responses: one to each example, as token ids.
        prefix_sharing: whether all responses to a prompt share one row.
        budget: tokens in one forward pass.
    """
    trees = [
        PrefixTree(example.prompt_ids, (example.response_ids, response))
        for example, response in zip(examples, responses, strict=True)
    ]
    logprobs, features = [math.nan] * len(trees), [np.empty((2, 0))] * len(trees)
    for chosen in micro_batches(trees, budget, prefix_sharing):
        check_interrupt()
        values, vectors = players.read([trees[index] for index in chosen], prefix_sharing)
        for place, index in enumerate(chosen):
            logprobs[index], features[index] = values[2 * place + 1], vectors[2 * place : 2 * place + 2]
    both = np.stack(features)  # [P, 2, D]
    return SampleFeatures(logprobs, both[:, 0], both[:, 1])


def repetition(token_ids: Sequence[int]) -> float:
    """Share of a response's 4-grams of tokens that occurred before in it; 0 where it has none."""
    grams = [tuple(token_ids[start : start + NGRAM]) for start in range(len(token_ids) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(responses: Sequence[Sequence[int]], n: int = 2) -> float:
    """distinct-n (arXiv 1510.03055): the share of different n-grams among all in these responses; 0 without any.

    It falls as responses get longer, so compare it where their lengths are alike.
    """
    grams = [tuple(ids[start : start + n]) for ids in responses for start in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


Metrics = dict[str, Any]
"""Measures by name; under `intervals` the bootstrap intervals of some, as [low, high]."""


def summarise(answers: Sequence[HeldoutGreedy]) -> Metrics:
    """Means over the held-out prompts; `…_se` is the standard error of a mean."""
    measures: dict[str, list[float]] = {
        "heldout_nll": [answer.nll for answer in answers],
        "identical_rate": [float(answer.identical) for answer in answers],
        "truncated_rate": [float(not answer.finished) for answer in answers],
        "mean_tokens": [float(len(answer.token_ids)) for answer in answers],
        "repeated_4grams": [answer.repeated_4grams for answer in answers],
    }
    scores = [answer.task_score for answer in answers if answer.task_score is not None]
    if scores:
        measures = {"task_score": scores, **measures}
    summary = with_intervals(**{name: (values, None) for name, values in measures.items()})
    for name in ("task_score", "heldout_nll"):
        if name in measures:
            summary[f"{name}_se"] = standard_error(measures[name])
    return summary


def summarise_pairs(margins: Sequence[Sequence[float]]) -> Metrics:
    """Share of pairs with a positive margin, and the mean margin, from those of each prompt; empty without pairs."""
    found = [ours for ours in margins if ours]
    if not found:
        return {}
    pairs = [float(len(ours)) for ours in found]
    return with_intervals(
        pair_accuracy=([float(sum(margin > 0 for margin in ours)) for ours in found], pairs),
        margin=([sum(ours) for ours in found], pairs),
    )


def summarise_samples(samples: Sequence[HeldoutSampled]) -> Metrics:
    """What a player's own distribution is like, from one response to each held-out prompt.

    `drift` estimates the KL divergence from θ_0 per token, Σ [log p_θ(y) − log p_θ0(y)] / Σ |y| with y ~ p_θ.
    """
    tokens = [float(len(sample.token_ids)) for sample in samples]
    measures: dict[str, tuple[list[float], list[float] | None]] = {
        "kl_from_start": ([sample.logprob - sample.start_logprob for sample in samples], tokens),
        "sampled_truncated_rate": ([float(not sample.finished) for sample in samples], None),
    }
    scores = [sample.task_score for sample in samples if sample.task_score is not None]
    if scores:
        measures["sampled_task_score"] = scores, None
    return with_intervals(**measures) | {"distinct_2": distinct([sample.token_ids for sample in samples])}


def summarise_probe(readings: Sequence[SampleFeatures]) -> Metrics:
    """How well θ_0's features tell the sampled responses from the real ones; empty for too few prompts."""
    real, sampled = (np.concatenate([getattr(one, kind) for one in readings]) for kind in ("real", "sampled"))
    auc, low, high = probe_auc(real, sampled)
    return {} if math.isnan(auc) else {"probe_auc": auc, "intervals": {"probe_auc": [low, high]}}


def with_intervals(**measures: tuple[Sequence[float], Sequence[float] | None]) -> Metrics:
    """Σ numerators / Σ denominators of each measure (ones, if there are none), and its interval."""
    intervals = {name: list(bootstrap(*parts)) for name, parts in measures.items()}
    means = {
        name: float(np.sum(over) / (len(over) if by is None else np.sum(by))) for name, (over, by) in measures.items()
    }
    return {**means, "intervals": intervals}


def bootstrap(values: Sequence[float], by: Sequence[float] | None = None) -> tuple[float, float]:
    """95% percentile bootstrap interval of Σ values / Σ by over prompts.

    Args:
        values: one for each prompt.
        by: likewise; absent means ones, so that the ratio is the mean.
    """
    over, under = np.asarray(values, dtype=float), np.ones(len(values)) if by is None else np.asarray(by, dtype=float)
    chosen = np.random.default_rng(0).integers(0, len(over), (RESAMPLES, len(over)))
    ratios = over[chosen].sum(axis=1) / under[chosen].sum(axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def merged(*parts: Metrics) -> Metrics:
    """Several sets of measures as one."""
    whole = {name: value for part in parts for name, value in part.items()}
    return whole | {"intervals": {name: ends for part in parts for name, ends in part.get("intervals", {}).items()}}
