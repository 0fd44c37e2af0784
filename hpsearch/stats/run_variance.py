"""Estimate the run-to-run variance: how much a fold's mean changes if a fit is repeated with another seed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hpsearch.stats.intervals import Floats

NEAR = 0.05
"""Only complete trials whose mean score is at most this far below that of the best are used. The scores of collapsed
trials vary far more between runs."""
S_GUESS, S_GUESS_DF = 0.006, 4.0
"""Prior guess of the run-to-run standard deviation of a fold's mean, and its weight in degrees of freedom."""
S_FLOOR = 0.003
"""Smallest run-to-run standard deviation that racing uses."""


@dataclass(frozen=True)
class RunVariance:
    """Variance of a fold's mean between runs of the same fit with different seeds."""

    variance: float
    df: float
    """Degrees of freedom of the estimate."""


def fold_mean_squares(finals: Sequence[Floats]) -> tuple[Floats, float]:
    """Return the residual mean square of each trial's fold means, (trials,), and the part that is due to images.

    `finals` contains, for each fold, the scores after the last epoch, (trials, images), for at least two trials and
    two folds. The residuals are those of the fold means after trial and fold effects are removed (two-way analysis of
    variance without interaction). Each mean square estimates the run-to-run variance plus the part due to images.
    """
    n_trials, n_folds = len(finals[0]), len(finals)
    means = np.stack([final.mean(axis=1) for final in finals], axis=1)
    residual = means - means.mean(axis=1, keepdims=True) - means.mean(axis=0) + means.mean()
    squares = (residual**2).sum(axis=1) * n_trials / (n_trials - 1) / (n_folds - 1)
    return squares, image_variance(finals) * float(np.mean([1 / final.shape[1] for final in finals]))


def image_variance(finals: Sequence[Floats]) -> float:
    """Return the variance of image scores that remains after trial, fold and image effects are removed; 0 if unknown.

    `finals` contains, for each fold, the scores after the last epoch, (trials, images).
    """
    squares, df = 0.0, 0
    for final in finals:
        residual = final - final.mean(axis=1, keepdims=True)
        residual -= residual.mean(axis=0)
        squares += float((residual**2).sum())
        df += (final.shape[0] - 1) * (final.shape[1] - 1)
    return squares / max(df, 1)
