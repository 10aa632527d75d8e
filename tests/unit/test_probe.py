"""The probe must find a difference where there is one, and none where there is none."""

import numpy as np
import pytest

from spinlm.evals.probe import probe_auc


def features(prompts: int, size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(prompts, size))


def test_auc_is_half_without_a_difference() -> None:
    """Sixteen draws of 60 prompts from one distribution, with as many features as SmolLM2 has."""
    found = [probe_auc(features(60, 576, 2 * n), features(60, 576, 2 * n + 1), seed=n) for n in range(16)]
    aucs = [auc for auc, _, _ in found]
    assert np.mean(aucs) == pytest.approx(0.5, abs=3 * np.std(aucs, ddof=1) / 4)
    assert np.std(aucs) < 0.1
    assert sum(low <= 0.5 <= high for _, low, high in found) >= 12


def test_auc_is_exactly_half_for_equal_responses() -> None:
    same = features(40, 8, 0)
    assert probe_auc(same, same) == pytest.approx((0.5, 0.5, 0.5))


@pytest.mark.parametrize("size", [4, 576])
def test_auc_grows_with_the_difference(size: int) -> None:
    real = features(60, size, 1)
    shift = np.zeros(size)
    shift[:4] = 1.0
    aucs = [probe_auc(real, features(60, size, 2) + amount * shift)[0] for amount in (0.0, 1.0, 3.0)]
    assert aucs == sorted(aucs)
    assert aucs[0] < 0.65 and aucs[2] > 0.9


def test_which_of_the_two_is_real_does_not_matter() -> None:
    real, synthetic = features(50, 12, 3), features(50, 12, 4) + 0.5
    assert probe_auc(real, synthetic)[0] == pytest.approx(probe_auc(synthetic, real)[0])


def test_the_scale_of_a_feature_does_not_matter() -> None:
    real, synthetic = features(50, 12, 3), features(50, 12, 4) + 0.5
    scale = 10.0 ** np.arange(-6, 6)
    assert probe_auc(real * scale, synthetic * scale) == pytest.approx(probe_auc(real, synthetic))


def test_a_prompt_does_not_give_its_responses_away() -> None:
    """Features that say only which prompt it is: responses of a prompt seen in training must not be judged."""
    prompt = features(60, 576, 5)
    auc, low, high = probe_auc(prompt + 1e-3 * features(60, 576, 6), prompt + 1e-3 * features(60, 576, 7))
    assert low <= 0.5 <= high and abs(auc - 0.5) < 0.15


def test_the_interval_narrows_with_the_prompts() -> None:
    wide, narrow = (probe_auc(features(count, 8, 1), features(count, 8, 2) + 0.5, seed=1) for count in (30, 300))
    assert narrow[2] - narrow[1] < 0.6 * (wide[2] - wide[1])
    for auc, low, high in (wide, narrow):
        assert low < auc < high


def test_too_few_prompts_give_no_auc() -> None:
    assert np.isnan(probe_auc(features(9, 4, 0), features(9, 4, 1))).all()
