"""How well a linear probe distinguishes real responses from a player's.

The probe sees one feature vector per response. The starting player computes the features, so that all iterations are
measured alike. A linear probe finds differences in length, style, format and frequent mistakes. It does not find a
wrong response that reads like a right one. With few prompts an AUC of 0.5 may only mean that the probe learned nothing.

Shapes: P prompts, D features.
"""

from collections.abc import Callable

import numpy as np

FOLDS = 5
RESAMPLES = 1000  # of the bootstrap


def probe_auc(real: np.ndarray, synthetic: np.ndarray, *, seed: int = 0) -> tuple[float, float, float]:
    """Compute the cross-validated AUC of a linear probe, and its 95% bootstrap interval over prompts.

    The probe is a ridge regression on standardized features. Both responses to a prompt are in the same fold, so the
    probe never scores a prompt that it was fitted on. The AUC is the share of (real, synthetic) combinations within a
    fold in which the real response has the higher score; ties count half. 0.5 is chance, 1 is a perfect probe. The
    bootstrap does not fit the probes again.

    Args:
        real: [P, D] features of the real responses.
        synthetic: [P, D] features of a player's responses to the same prompts.
        seed: decides the folds and the resampling.

    Returns:
        The AUC, and the lower and upper end of the interval; (nan, nan, nan) with fewer than two prompts per fold.
    """
    prompts = len(real)
    if prompts < 2 * FOLDS:
        return (float("nan"),) * 3
    random = np.random.default_rng(seed)
    folds = np.array_split(random.permutation(prompts), FOLDS)
    fold_wins = []  # for each fold: [p, p], 1 where the real response to a prompt beats the synthetic one to another
    for fold in folds:
        others = np.setdiff1d(np.arange(prompts), fold)
        score = _fit(np.concatenate([real[others], synthetic[others]]), np.repeat([1.0, -1.0], len(others)))
        real_scores, synthetic_scores = score(real[fold])[:, None], score(synthetic[fold])[None, :]
        fold_wins.append((real_scores > synthetic_scores) + 0.5 * (real_scores == synthetic_scores))
    resampled = np.zeros(RESAMPLES)
    for wins in fold_wins:
        size = len(wins)
        counts = random.multinomial(size, np.full(size, 1 / size), RESAMPLES)  # [R, p] how often each prompt is drawn
        resampled += ((counts @ wins) * counts).sum(axis=1) / size**2 / FOLDS
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(np.mean([wins.mean() for wins in fold_wins])), float(low), float(high)


def _fit(features: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Fit a ridge regression in its dual form, whose cost depends on the number of rows, not of features."""
    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    rows = (features - mean) / scale  # [2P, D]
    penalty = rows.shape[1]  # about the mean diagonal of the kernel rows · rowsᵀ, because the features are standardized
    weights = rows.T @ np.linalg.solve(rows @ rows.T + penalty * np.eye(len(rows)), labels)

    def score(new: np.ndarray) -> np.ndarray:
        scores: np.ndarray = ((new - mean) / scale) @ weights
        return scores

    return score
