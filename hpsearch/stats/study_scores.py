"""Store the per-image scores of a study's trials, and summarise each trial.

Let y[c, i] be the score of trial c on image i, from the network that did not train on this image. It is modelled as
    y[c, i] = mu[c] + a[i] + b[c, i] + r[c, fold of i]

- mu[c] is the true mean score of the configuration, which is the quantity of interest.
- a[i] is the difficulty of the image, which all trials share.
- b[c, i] is the effect of this configuration on this image. Its variance is called g^2.
- r is the run-to-run variation: refitting a fold with another seed shifts the scores of all its images together. Its
  variance is called s^2.

Averaging over more images reduces a and b, but r is reduced only by averaging over folds and fits.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hpsearch.errors import StudyError
from hpsearch.stats.intervals import Floats, Interval, bootstrap_mean, corrected_t
from hpsearch.stats.run_variance import NEAR, S_GUESS, S_GUESS_DF, RunVariance, fold_mean_squares, image_variance

LIMIT = 8.0
"""Upper limit of each trial's mean square, as a multiple of the median over trials. It keeps the effect of one
collapsed fold small."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StudyScores:
    """Final scores of a study's trials on the held-out images."""

    scores: Floats
    """Per-image scores of the first fits, (trials, images)."""
    fold_of: NDArray[np.int64]
    """Fold of every image, (images,)."""
    replicated: tuple[int, ...] = ()
    """Rows of `scores` that were refitted with new seeds."""
    replicates: Floats | None = None
    """Per-image scores of the refits of these trials, (replicated, images)."""
    winner: int | None = None
    """Row of the study's winner; if None, the winner is the best trial by these scores (`selection.best_row`)."""
    pruned: Floats | None = None
    """Per-image scores of the pruned trials' first fits, (pruned, images); NaN on unfinished folds."""

    def __post_init__(self) -> None:
        if self.n_images < 2:
            raise StudyError(f"statistics need at least 2 images, got {self.n_images}")
        if not np.isfinite(self.joint).all():
            raise ValueError("a complete trial needs a finite score for every image")

    @property
    def n_trials(self) -> int:
        return len(self.scores)

    @property
    def n_images(self) -> int:
        return len(self.fold_of)

    @cached_property
    def folds(self) -> tuple[NDArray[np.int64], ...]:
        """For each fold, the indices of its images."""
        return tuple(np.flatnonzero(self.fold_of == fold) for fold in np.unique(self.fold_of))

    @property
    def _replicates(self) -> Floats:
        return np.zeros((0, self.n_images)) if self.replicates is None else self.replicates

    @cached_property
    def n_fits(self) -> NDArray[np.int64]:
        """Number of fits per fold of each trial, (trials,): 1, or 2 if the trial was replicated."""
        n_fits = np.ones(self.n_trials, np.int64)
        n_fits[list(self.replicated)] = 2
        return n_fits

    @cached_property
    def joint(self) -> Floats:
        """Per-image scores of each trial, averaged over its fits, (trials, images)."""
        joint = self.scores.astype(np.float64)
        joint[list(self.replicated)] += self._replicates
        joint /= self.n_fits[:, None]
        return joint

    @cached_property
    def near(self) -> list[Floats]:
        """For each fold, the first-fit scores of the trials within `NEAR` of the best, or of the two best trials if
        there are fewer, (near, images)."""
        means = self.scores.mean(axis=1)
        n_near = max(2, int((means >= means.max() - NEAR).sum()))
        near = self.scores[np.argsort(-means, kind="stable")[:n_near]]
        return [near[:, fold] for fold in self.folds]

    @cached_property
    def runs(self) -> RunVariance:
        """Run-to-run variance s^2: mean of a prior guess and two estimates, weighted by their degrees of freedom.

        The first estimate uses the first fits of the near trials. It is the mean of their mean squares
        (`fold_mean_squares`), each limited to `LIMIT` times the median, minus the part due to images. The second
        estimate uses the shifts of fold means between the first fits and the refits. It is half the variance of a
        trial's shifts over folds, averaged over trials, minus the part due to images. The mean of a trial's shifts is
        not used, because trials were selected for high scores of their first fits.
        """
        k, n_near = len(self.folds), len(self.near[0])
        total, df = S_GUESS_DF * S_GUESS**2, S_GUESS_DF
        if k > 1 and n_near > 1:
            squares, images = fold_mean_squares(self.near)
            first_df = (n_near - 1) * (k - 1)
            total += first_df * (float(np.minimum(squares, LIMIT * np.median(squares)).mean()) - images)
            df += first_df
        # In a fold of one image, the shift of the fold cannot be separated from that of the image.
        if k > 1 and self.replicated and min(map(len, self.folds)) > 1:
            shifts = self._replicates - self.scores[list(self.replicated)]
            means = np.stack([shifts[:, fold].mean(axis=1) for fold in self.folds], axis=1)
            images_part = np.mean([shifts[:, fold].var(axis=1, ddof=1) / len(fold) for fold in self.folds], axis=0)
            replicate_df = (k - 1) * len(shifts)
            total += replicate_df * float((means.var(axis=1, ddof=1) - images_part).mean()) / 2
            df += replicate_df
        return RunVariance(max(0.0, total / df), df)

    @cached_property
    def image_variance(self) -> float:
        """Residual variance g^2 of the image scores of the near trials, without trial, fold and image effects.

        Pruned trials count on the folds that they finished, if their mean there is near that of the complete trials.
        """
        finals = self.near
        if self.pruned is not None:
            of_fold = [self.pruned[:, fold] for fold in self.folds]
            finals = [
                np.concatenate([near, rows[rows.mean(axis=1) >= near.mean(axis=1).max() - NEAR]])
                for near, rows in zip(self.near, of_fold, strict=True)
            ]
        return image_variance(finals)

    @property
    def run_variances(self) -> Floats:
        """Run-to-run variance of each trial's mean over its fits, (trials,): s^2 / (folds x fits)."""
        return self.runs.variance / (len(self.folds) * self.n_fits)


@dataclass(frozen=True)
class TrialStatistics:
    """Mean and spread of one complete trial."""

    mean: float
    """Mean score over images, and over both fits if the trial was replicated."""
    sd_folds: float
    """Standard deviation of the fold means; 0 for one fold."""
    total: Interval
    """Interval of the configuration's mean: bootstrap over images, plus the run-to-run variance."""
    folds: Interval | None
    """Corrected resampled t interval over folds; None for one fold."""


def trial_statistics(study: StudyScores) -> list[TrialStatistics]:
    """Return the statistics of each trial, in row order."""
    rows = []
    for scores, run_variance in zip(study.joint, study.run_variances, strict=True):
        fold_means = np.array([scores[images].mean() for images in study.folds])
        total = bootstrap_mean(scores, run_variance=float(run_variance), run_df=study.runs.df)
        sd_folds = float(fold_means.std(ddof=1)) if len(fold_means) > 1 else 0.0
        rows.append(TrialStatistics(float(scores.mean()), sd_folds, total, corrected_t(fold_means)))
    return rows
