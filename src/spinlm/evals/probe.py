"""How well a linear probe distinguishes real responses from a player's.

The probe sees one vector for each response, made by the starting player, and so the same measure for every iteration.
It finds what is linear in those features: length, style, format, frequent mistakes. It does not see whether a response
is right where a right and a wrong one read alike, and with few prompts it finds little: 0.5 is then the lack of
evidence, not its opposite.

Shapes: P prompts, D features.
"""

from collections.abc import Callable

import numpy as np

FOLDS = 5
RESAMPLES = 1000  # of the bootstrap


def probe_auc(real: np.ndarray, synthetic: np.ndarray, *, seed: int = 0) -> tuple[float, float, float]:
    """Cross-validated AUC of a linear probe, and a 95% bootstrap interval of it over prompts.

    Ridge regression on standardized features; both responses to a prompt are in the same fold, so that no prompt is
    seen before it is judged. AUC is the share of (real, synthetic) within a fold in which the real one scores higher,
    ties counting half: 0.5 is chance, 1 a probe that is always right. The interval takes the fitted probes as given.

    Args:
        real: [P, D] features of the real responses.
        synthetic: [P, D] of a player's, to the same prompts.
        seed: decides the folds and the resampling.

    Returns:
        The AUC, and the interval's lower and upper end; (nan, nan, nan) for fewer than two prompts in a fold.
    """
    prompts = len(real)
    if prompts < 2 * FOLDS:
        return (float("nan"),) * 3
    random = np.random.default_rng(seed)
    folds = np.array_split(random.permutation(prompts), FOLDS)
    wins = []  # of each fold: [p, p], whether the real response of one prompt beats the synthetic one of another
    for fold in folds:
        rest = np.setdiff1d(np.arange(prompts), fold)
        score = _fit(np.concatenate([real[rest], synthetic[rest]]), np.repeat([1.0, -1.0], len(rest)))
        ours, theirs = score(real[fold])[:, None], score(synthetic[fold])[None, :]
        wins.append((ours > theirs) + 0.5 * (ours == theirs))
    resampled = np.zeros(RESAMPLES)
    for won in wins:
        size = len(won)
        times = random.multinomial(size, np.full(size, 1 / size), RESAMPLES)  # [R, p] how often each prompt is drawn
        resampled += ((times @ won) * times).sum(axis=1) / size**2 / FOLDS
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(np.mean([won.mean() for won in wins])), float(low), float(high)


def _fit(features: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Ridge regression in its dual form, which costs what the rows cost and not the features."""
    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    rows = (features - mean) / scale  # [2P, D]
    size = rows.shape[1]  # about what the kernel's diagonal is: as much weight on being small as on one row
    weights = rows.T @ np.linalg.solve(rows @ rows.T + size * np.eye(len(rows)), labels)

    def score(given: np.ndarray) -> np.ndarray:
        scores: np.ndarray = ((given - mean) / scale) @ weights
        return scores

    return score
