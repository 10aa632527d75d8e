"""Measurements on held-out prompts, which are never trained on.

Shapes: P prompts, D features.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spinlm.distributed.processes import on_rank_zero
from spinlm.evals.probe import probe_auc
from spinlm.model.players import Players
from spinlm.model.prefix_trees import PrefixTree, micro_batches
from spinlm.model.run import Run
from spinlm.rundir.records import Example, HeldoutAtTemperature, HeldoutGreedy, HeldoutSampled, read_lines
from spinlm.utils.atomic import read_json, short_digest, write_json
from spinlm.utils.signals import check_interrupt
from spinlm.utils.statistics import standard_error

NGRAM = 4
RESAMPLES = 2000  # of the bootstrap

Metrics = dict[str, Any]
"""Metrics by name. `intervals` holds 95% bootstrap intervals of some metrics, as [low, high]."""


@dataclass(frozen=True)
class HeldoutScores:
    """A player's scores of the responses to held-out prompts."""

    nll: list[float]  # [P] of the real responses, nats per token
    margins: list[list[float]]  # for each prompt: r(y) − r(y') of its pairs, in nats
    sampled_logprobs: list[float] = field(default_factory=list)  # [P] log p of the sampled responses; empty without


def score_heldout(
    players: Players, examples: Sequence[Example], pairs: Any = None, sampled: Sequence[Sequence[int]] = ()
) -> HeldoutScores:
    """Compute log-probabilities of held-out responses under the loaded player: NLL, margins, and log p of samples.

    Args:
        players: the players, with the player to measure loaded.
        examples: the held-out examples.
        pairs: the pairs of these examples, a table as `read_pairs` returns. Without it there are no margins.
        sampled: one sampled response per example.
    """
    by_id: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in pairs.to_pylist() if pairs is not None else []:
        by_id[row["id"]].append(row)
    trees = []
    for number, example in enumerate(examples):
        synthetic = [row["synthetic_ids"] for row in by_id[example.id]]
        trees.append(PrefixTree(example.prompt_ids, (example.response_ids, *synthetic, *sampled[number : number + 1])))
    nll, sampled_logprobs = [math.nan] * len(trees), [math.nan] * len(sampled)
    margins: list[list[float]] = [[] for _ in trees]
    for chosen in micro_batches(trees, players.recipe.train.tokens_per_micro_batch, players.prefix_sharing):
        check_interrupt()
        values = iter(players.response_logprobs([trees[index] for index in chosen]))
        for index in chosen:
            example, real = examples[index], next(values)
            nll[index] = -real / len(example.response_ids)
            for row in by_id[example.id]:
                margins[index].append((real - row["opponent_real"]) - (next(values) - row["opponent_synthetic"]))
            if sampled:
                sampled_logprobs[index] = next(values)
    return HeldoutScores(nll, margins, sampled_logprobs)


class HeldoutNLL:
    """Held-out NLL of a player during training, in nats per token, by epoch. A resumed training reads the values."""

    def __init__(self, run: Run, t: int):
        self._players = run.players
        self._path = run.folder.heldout_nll(t)
        self._examples = list(read_lines(run.folder.examples("heldout"), Example))
        self.values: dict[str, float] = on_rank_zero(self._read)

    def _read(self) -> dict[str, float]:
        """Read the values of an interrupted training; drop them if the digest is wrong, since they can end training."""
        saved = read_json(self._path) if self._path.exists() else {}
        if not isinstance(saved, dict) or saved.get("sum") != short_digest(saved.get("values")):
            return {}
        return dict(saved["values"])

    def measure(self, epoch: int) -> float:
        """Measure the NLL after `epoch` epochs, or return the value that was measured before."""
        if str(epoch) not in self.values:
            scores = score_heldout(self._players, self._examples)
            # Every process measures. All use the mean of process 0, because rounding may differ between them.
            self.values[str(epoch)] = on_rank_zero(lambda: float(np.mean(scores.nll)))
            on_rank_zero(write_json, self._path, {"values": self.values, "sum": short_digest(self.values)})
        return self.values[str(epoch)]


@dataclass(frozen=True)
class ResponseFeatures:
    """θ_0's features of a real and a sampled response to each prompt, and its log p of the sampled ones."""

    sampled_logprobs: list[float]  # [P]
    real: np.ndarray  # [P, D] features of the real responses
    sampled: np.ndarray  # [P, D] features of the sampled responses


def response_features(
    players: Players, examples: Sequence[Example], responses: Sequence[Sequence[int]]
) -> ResponseFeatures:
    """Compute features of the real and of a sampled response to each held-out prompt.

    Args:
        players: the players, with θ_0 loaded.
        examples: the held-out examples.
        responses: one sampled response per example, as token ids.
    """
    trees = [
        PrefixTree(example.prompt_ids, (example.response_ids, response))
        for example, response in zip(examples, responses, strict=True)
    ]
    logprobs, features = [math.nan] * len(trees), [np.empty((2, 0))] * len(trees)
    for chosen in micro_batches(trees, players.recipe.train.tokens_per_micro_batch, players.prefix_sharing):
        check_interrupt()
        values, vectors = players.logprobs_and_features([trees[index] for index in chosen])
        for place, index in enumerate(chosen):
            logprobs[index], features[index] = values[2 * place + 1], vectors[2 * place : 2 * place + 2]
    both = np.stack(features)  # [P, 2, D]
    return ResponseFeatures(logprobs, both[:, 0], both[:, 1])


def repeated_4grams(token_ids: Sequence[int]) -> float:
    """Return the share of a response's 4-grams of tokens that occur earlier in the response; 0 without 4-grams."""
    grams = [tuple(token_ids[start : start + NGRAM]) for start in range(len(token_ids) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct_n(responses: Sequence[Sequence[int]], n: int = 2) -> float:
    """Return distinct-n (arXiv 1510.03055): the number of different n-grams divided by the number of all n-grams.

    0 without n-grams. Longer responses have a lower distinct-n, so compare only responses of similar length.
    """
    grams = [tuple(ids[start : start + n]) for ids in responses for start in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def summarize_greedy(responses: Sequence[HeldoutGreedy]) -> Metrics:
    """Return means over the held-out prompts; `…_se` is the standard error of a mean."""
    values: dict[str, list[float]] = {
        "heldout_nll": [response.nll for response in responses],
        "identical_rate": [float(response.identical) for response in responses],
        "truncated_rate": [float(not response.finished) for response in responses],
        "mean_tokens": [float(len(response.token_ids)) for response in responses],
        "repeated_4grams": [response.repeated_4grams for response in responses],
    }
    scores = [response.task_score for response in responses if response.task_score is not None]
    if scores:
        values = {"task_score": scores, **values}
    metrics = with_intervals(**{name: (numbers, None) for name, numbers in values.items()})
    for name in ("task_score", "heldout_nll"):
        if name in values:
            metrics[f"{name}_se"] = standard_error(values[name])
    return metrics


def summarize_pairs(margins: Sequence[Sequence[float]]) -> Metrics:
    """Return the share of positive margins and the mean margin, from the margins of each prompt; {} without pairs."""
    margins = [of_prompt for of_prompt in margins if of_prompt]
    if not margins:
        return {}
    pairs = [float(len(of_prompt)) for of_prompt in margins]
    return with_intervals(
        pair_accuracy=([float(sum(margin > 0 for margin in of_prompt)) for of_prompt in margins], pairs),
        margin=([sum(of_prompt) for of_prompt in margins], pairs),
    )


def summarize_sampled(responses: Sequence[HeldoutSampled]) -> Metrics:
    """Return metrics of a player's distribution, from one sampled response per held-out prompt.

    `kl_from_start` estimates the KL divergence from θ_0 per token, Σ [log p_θ(y) − log p_θ0(y)] / Σ |y| with y ~ p_θ.
    """
    tokens = [float(len(response.token_ids)) for response in responses]
    values: dict[str, tuple[list[float], list[float] | None]] = {
        "kl_from_start": ([response.logprob - response.start_logprob for response in responses], tokens),
        "sampled_truncated_rate": ([float(not response.finished) for response in responses], None),
    }
    scores = [response.task_score for response in responses if response.task_score is not None]
    if scores:
        values["sampled_task_score"] = scores, None
    return with_intervals(**values) | {"distinct_2": distinct_n([response.token_ids for response in responses])}


def summarize_temperatures(responses: Sequence[HeldoutAtTemperature]) -> Metrics:
    """Return the mean task score at each temperature, and its standard error; {} without responses."""
    scores: dict[str, list[float]] = defaultdict(list)
    for response in responses:
        scores[f"{response.temperature:g}"].append(response.task_score)
    if not scores:
        return {}
    return {
        "task_score_by_temperature": {temperature: float(np.mean(values)) for temperature, values in scores.items()},
        "task_score_by_temperature_se": {name: standard_error(values) for name, values in scores.items()},
    }


def summarize_probe(features: Sequence[ResponseFeatures]) -> Metrics:
    """Return the AUC of a probe that classifies responses as real or sampled; {} if there are too few prompts."""
    real, sampled = (np.concatenate([getattr(part, kind) for part in features]) for kind in ("real", "sampled"))
    auc, low, high = probe_auc(real, sampled)
    return {} if math.isnan(auc) else {"probe_auc": auc, "intervals": {"probe_auc": [low, high]}}


def with_intervals(**ratios: tuple[Sequence[float], Sequence[float] | None]) -> Metrics:
    """Compute Σ numerators / Σ denominators of each metric, and its interval. Without denominators: the mean."""
    intervals = {name: list(bootstrap(*parts)) for name, parts in ratios.items()}
    means = {
        name: float(np.sum(numerators) / (len(numerators) if denominators is None else np.sum(denominators)))
        for name, (numerators, denominators) in ratios.items()
    }
    return {**means, "intervals": intervals}


def bootstrap(numerators: Sequence[float], denominators: Sequence[float] | None = None) -> tuple[float, float]:
    """Return the 95% percentile bootstrap interval of Σ numerators / Σ denominators over prompts.

    Args:
        numerators: [P].
        denominators: [P]; None means ones, so that the ratio is the mean.
    """
    top = np.asarray(numerators, dtype=float)
    bottom = np.ones(len(top)) if denominators is None else np.asarray(denominators, dtype=float)
    chosen = np.random.default_rng(0).integers(0, len(top), (RESAMPLES, len(top)))
    ratios = top[chosen].sum(axis=1) / bottom[chosen].sum(axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def merge_metrics(*parts: Metrics) -> Metrics:
    """Merge several sets of metrics into one."""
    merged = {name: value for part in parts for name, value in part.items()}
    return merged | {"intervals": {name: ends for part in parts for name, ends in part.get("intervals", {}).items()}}
