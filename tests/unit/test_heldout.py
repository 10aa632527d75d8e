"""Metrics on held-out prompts: literal values, worked out by hand."""

from typing import Any

import numpy as np
import pytest

from spinlm.evals.heldout import (
    bootstrap,
    distinct_n,
    merge_metrics,
    repeated_4grams,
    summarize_greedy,
    summarize_pairs,
    summarize_sampled,
    summarize_temperatures,
)
from spinlm.report.summary import numeric_metrics
from spinlm.rundir.records import HeldoutAtTemperature, HeldoutGreedy, HeldoutSampled
from spinlm.utils.statistics import standard_error


def response(key: str = "a", **changes: Any) -> HeldoutGreedy:
    values: dict[str, Any] = {
        "id": key,
        "token_ids": [1, 2],
        "text": "",
        "finished": True,
        "identical": False,
        "repeated_4grams": 0.0,
        "nll": 1.0,
        "task_score": None,
    }
    return HeldoutGreedy(**values | changes)


@pytest.mark.parametrize(
    ("ids", "share"),
    [
        ([], 0.0),
        ([1, 2, 3], 0.0),  # no 4-gram
        ([1, 2, 3, 4], 0.0),
        ([1, 2, 3, 4, 5, 6, 7, 8], 0.0),
        ([1, 1, 1, 1, 1], 1 / 2),  # two, of which one was there before
        ([1, 1, 1, 1, 1, 1, 1], 3 / 4),
        ([1, 2, 1, 2, 1, 2, 1, 2], 3 / 5),  # 1212 2121 1212 2121 1212
        ([1, 2, 3, 4, 9, 1, 2, 3, 4], 1 / 6),
    ],
)
def test_repeated_4grams(ids, share):
    assert repeated_4grams(ids) == pytest.approx(share)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ([], 0.0),
        ([3.0], 0.0),
        ([2.0, 2.0, 2.0], 0.0),
        ([0.0, 1.0], 0.5),  # deviation √½, over √2
        ([1.0, 2.0, 3.0, 4.0], (5 / 3 / 4) ** 0.5),  # squares 5 over n − 1, over n
    ],
)
def test_standard_error(values, error):
    assert standard_error(values) == pytest.approx(error)


def test_summarize_greedy():
    responses = [
        response("a", token_ids=[1], finished=True, identical=True, repeated_4grams=0.0, nll=1.0, task_score=1.0),
        response(
            "b", token_ids=[1, 2, 3], finished=False, identical=False, repeated_4grams=0.5, nll=3.0, task_score=0.0
        ),
    ]
    summary = summarize_greedy(responses)
    intervals = summary.pop("intervals")
    assert intervals["heldout_nll"] == [1.0, 3.0] and intervals["repeated_4grams"] == [0.0, 0.5]
    assert summary == {
        "task_score": 0.5,
        "task_score_se": 0.5,
        "heldout_nll": 2.0,
        "heldout_nll_se": 1.0,
        "identical_rate": 0.5,
        "truncated_rate": 0.5,
        "mean_tokens": 2.0,
        "repeated_4grams": 0.25,
    }


def test_summarize_greedy_without_a_scorer():
    summary = summarize_greedy([response(nll=2.5)])
    assert not [name for name in summary if name.startswith("task_score")]
    assert (summary["heldout_nll"], summary["heldout_nll_se"]) == (2.5, 0.0)


def sample(key: str = "a", **changes: Any) -> HeldoutSampled:
    values: dict[str, Any] = {
        "id": key,
        "token_ids": [1, 2],
        "text": "",
        "finished": True,
        "logprob": -1.0,
        "start_logprob": -1.0,
        "task_score": None,
    }
    return HeldoutSampled(**values | changes)


def test_summarize_sampled():
    """Drift weighs by tokens: (1 + 2) nats over 2 + 4 tokens."""
    samples = [
        sample("a", token_ids=[5, 6], logprob=-1.0, start_logprob=-2.0, task_score=1.0),
        sample("b", token_ids=[5, 6, 5, 6], logprob=-3.0, start_logprob=-5.0, finished=False, task_score=0.0),
    ]
    summary = summarize_sampled(samples)
    assert summary["kl_from_start"] == pytest.approx(0.5) and summary["intervals"]["kl_from_start"] == [0.5, 0.5]
    assert (summary["sampled_task_score"], summary["sampled_truncated_rate"]) == (0.5, 0.5)
    assert summary["distinct_2"] == pytest.approx(2 / 4)  # 56; 56, 65, 56


def test_task_scores_by_temperature():
    """Scores 1, 0 at 0.3 have mean ½ and standard error √½ / √2 = ½."""
    rows = [
        HeldoutAtTemperature(key, temperature, [1], "", True, score)
        for temperature, scores in ((0.3, (1.0, 0.0)), (1.0, (0.25, 0.25)))
        for key, score in zip("ab", scores, strict=True)
    ]
    metrics = summarize_temperatures(rows)
    assert metrics["task_score_by_temperature"] == {"0.3": 0.5, "1": 0.25}
    assert metrics["task_score_by_temperature_se"] == {"0.3": pytest.approx(0.5), "1": 0.0}
    assert numeric_metrics(metrics | {"margin": 2.0, "intervals": {}}) == {
        "margin": 2.0,
        "task_score_at_0.3": 0.5,
        "task_score_at_1": 0.25,
    }
    assert summarize_temperatures([]) == {}


def test_kl_from_start_is_zero_without_change_and_grows_with_the_distance():
    assert summarize_sampled([sample(), sample("b")])["kl_from_start"] == 0.0
    near, far = (
        summarize_sampled([sample(start_logprob=-1.0 - gap), sample("b")])["kl_from_start"] for gap in (1.0, 3.0)
    )
    assert 0 < near < far


@pytest.mark.parametrize(
    ("responses", "share"),
    [
        ([], 0.0),
        ([[1]], 0.0),
        ([[1, 2, 3], [4, 5]], 1.0),
        ([[1, 2], [1, 2]], 0.5),  # the same again in another response
        ([[1, 1, 1, 1, 1]], 0.25),
    ],
)
def test_distinct(responses, share):
    assert distinct_n(responses) == share


def test_bootstrap_covers_the_mean_as_often_as_it_says():
    """Of 200 samples of 40 from a skewed distribution of mean 1, about 95 in 100; it is somewhat less for so few."""
    random = np.random.default_rng(0)
    ends = [bootstrap(random.exponential(size=40)) for _ in range(200)]
    assert 0.86 < np.mean([low < 1 < high for low, high in ends]) < 0.98


def test_bootstrap_narrows_with_the_prompts_and_resamples_whole_prompts():
    values = np.random.default_rng(1).normal(size=400)
    wide, narrow = bootstrap(values[:25]), bootstrap(values)
    assert narrow[1] - narrow[0] == pytest.approx((wide[1] - wide[0]) / 4, rel=0.35)
    assert bootstrap([3.0, 3.0]) == (3.0, 3.0)
    # The second prompt has nine of the ten pairs: with it alone the ratio is 1, with the other alone 0.
    low, high = bootstrap([0.0, 9.0], [1.0, 9.0])
    assert (low, high) == (0.0, 1.0)


def test_pair_metrics_count_pairs_and_resample_prompts():
    metrics = summarize_pairs([[1.0, -3.0], [2.0], []])
    assert metrics["pair_accuracy"] == pytest.approx(2 / 3) and metrics["margin"] == 0.0
    assert metrics["intervals"]["pair_accuracy"] == [0.5, 1.0] and metrics["intervals"]["margin"] == [-1.0, 2.0]
    assert summarize_pairs([[]]) == {}


def test_measures_are_merged_with_their_intervals():
    one, two = ({name: 1.0, "intervals": {name: [0, 2]}} for name in "ab")
    assert merge_metrics(one, {}, two) == {"a": 1.0, "b": 1.0, "intervals": {"a": [0, 2], "b": [0, 2]}}
