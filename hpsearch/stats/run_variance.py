"""Estimate the run-to-run variance: how much a fold's mean changes if a fit is repeated with another seed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

NEAR = 0.05
"""Only complete trials whose mean score is at most this far below that of the best are used. The scores of collapsed
trials vary far more between runs."""
S_GUESS, S_GUESS_DF = 0.006, 4.0
"""Prior guess of the run-to-run standard deviation of a fold's mean, and its weight in degrees of freedom."""
S_FLOOR = 0.003
"""Smallest run-to-run standard deviation that racing uses."""
MEDIAN_EFFICIENCY = 0.55
"""Statistical efficiency of the median of mean squares with 4 degrees of freedom, relative to their mean."""


@dataclass(frozen=True)
class RunVariance:
    """Variance of a fold's mean between runs of the same fit with different seeds."""

    variance: float
    df: float
    """Degrees of freedom of the estimate."""

    @property
    def sd(self) -> float:
        return math.sqrt(self.variance)


def run_variance(finals: Sequence[Floats]) -> RunVariance:
    """Estimate the run-to-run variance of a fold's mean.

    `finals` contains, for each fold, the scores after the last epoch, (trials, images). The mean squares that
    `fold_mean_squares` returns for the trials are combined by their median, so that a trial that collapsed on one
    fold has little effect. The median is divided by (1 - 2 / (9 df))^3, where df is the number of folds minus 1. This
    is the approximate median of chi^2 / df (Wilson and Hilferty), so the quotient estimates the expected mean square.

    The estimate is averaged with the prior guess, weighted by degrees of freedom, and is at least `S_FLOOR` squared.
    With one trial or one fold, the prior guess is returned.
    """
    n_trials, n_folds = len(finals[0]), len(finals)
    if n_trials < 2 or n_folds < 2:
        return RunVariance(S_GUESS**2, S_GUESS_DF)
    per_trial, image_part = fold_mean_squares(finals)
    mean_square = float(np.median(per_trial)) / (1 - 2 / (9 * (n_folds - 1))) ** 3
    df = MEDIAN_EFFICIENCY * (n_trials - 1) * (n_folds - 1)
    variance = (S_GUESS_DF * S_GUESS**2 + df * (mean_square - image_part)) / (S_GUESS_DF + df)
    return RunVariance(max(S_FLOOR**2, variance), S_GUESS_DF + df)


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
