"""Predict the values of trials from the folds that they have finished so far.

The *value* of a trial is its mean score over all images, that is, the mean of its fold means z[c, k], weighted by the
numbers of images. Fold means are modelled as in `mixed_model`,

    z[c, k] = f[k] + mu[c] + e[c, k],      mu[c] ~ N(0, tau^2),      e[c, k] ~ N(0, g^2 / n[k] + s^2)

where g^2 is the variance of image scores that remains after the effects of trials, folds and images are removed, and
n[k] is the number of images of fold k. All trials are scored on the same images, so f[k] contains the difficulty of
the images of a fold, and comparing two trials on a fold is a paired comparison. s is the run-to-run standard
deviation of a fold's mean. Both s and tau are unknown, so results are averaged over their posterior on a grid. The
prior of s^2 is a scaled inverse chi-square distribution with the prior guess `S_GUESS` and `S_GUESS_DF` degrees of
freedom.

Only the *near trials*, whose mean is at most `NEAR` below the best, determine f, tau and s, because the scores of
collapsed configurations vary many times more between runs. For a given s and tau, all distributions are normal. For
finished folds of a trial, the scores are known. For the others, they are predicted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from hpsearch.stats.intervals import Floats
from hpsearch.stats.mixed_model import Mask, fit
from hpsearch.stats.run_variance import NEAR, S_FLOOR, S_GUESS, S_GUESS_DF, image_variance

MAX_NEAR = 100
"""Maximum number of near trials. More of them cost time and hardly change the estimates."""
S_GRID = np.geomspace(S_FLOOR, 6 * S_FLOOR, 7)
"""Grid of the run-to-run standard deviation."""
G_GUESS = 0.07
"""Standard deviation g that is assumed while no two near trials have finished the same fold."""
NEGLIGIBLE = 1e-4
"""Grid points with a smaller posterior probability are left out."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ValueModel:
    """Posterior distribution of f, s and tau. Folds that no near trial has finished are left out."""

    share: Floats
    """Posterior probability of each grid point of s and tau, (grid,)."""
    s: Floats
    """Run-to-run standard deviation at each grid point, (grid,)."""
    tau: Floats
    """Standard deviation of mu at each grid point, (grid,)."""
    level: Floats
    """Posterior mean of f, (grid, folds)."""
    level_covariance: Floats
    """Posterior covariance of f, (grid, folds, folds)."""
    folds: NDArray[np.int64]
    """Indices of the folds, (folds,)."""
    fold_share: Floats
    """Fraction of all images in each fold, (all folds,)."""
    image_variances: Floats
    """Variance of a fold's mean due to images, g^2 / n, (all folds,)."""
    lowest: float
    """Mean, relative to f, below which a trial is not near."""

    @property
    def run_sd(self) -> float:
        """Posterior mean of the run-to-run standard deviation of a fold's mean."""
        return float(self.share @ self.s)

    def predict(self, means: Floats, *, flat: Sequence[int] = ()) -> "Values":
        """Predict the values of trials from their fold means, (trials, all folds), NaN for unfinished folds.

        Given f, the mu of a trial that is not near has a nearly flat prior, and so have the rows in `flat`.
        """
        z = means[:, self.folds]
        is_known = np.isfinite(z)
        above = np.where(is_known, z - self.level[:, None], 0.0)
        noise = self.image_variances + self.s[:, None] ** 2
        precision = is_known / noise[:, None, self.folds]
        total = precision.sum(axis=2)
        is_near = above.sum(axis=2) >= self.lowest * is_known.sum(axis=1)
        is_near[:, list(flat)] = False
        prior = np.where(is_near, self.tau[:, None] ** 2, 1.0)
        effect_variance = prior / (1 + prior * total)
        weights = effect_variance[:, :, None] * precision
        effect = (weights * above).sum(axis=2)
        known = is_known * self.fold_share[self.folds]
        unknown = 1 - known.sum(axis=1)
        unseen_share = np.tile(self.fold_share, (len(means), 1))
        unseen_share[:, self.folds] -= known
        return Values(
            model=self,
            effect=effect,
            effect_variance=effect_variance,
            lead=(known * above).sum(axis=2) + unknown * effect,
            variance=unknown**2 * prior / (1 + prior * total) + noise @ (unseen_share**2).T,
            loading=-(known + unknown[:, None] * weights),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Values:
    """Predicted values of trials, which are identified by row."""

    model: ValueModel
    effect: Floats
    """Posterior mean of mu, (grid, trials)."""
    effect_variance: Floats
    """Posterior variance of mu for given f, (grid, trials)."""
    lead: Floats
    """Expected value minus the mean of f over the images, (grid, trials)."""
    variance: Floats
    """Variance of the value for given f, (grid, trials)."""
    loading: Floats
    """Derivative of `lead` with respect to f, (grid, trials, folds)."""

    @cached_property
    def expected(self) -> Floats:
        """Expected value of each trial, (trials,)."""
        return np.asarray(self.model.share @ (self.lead + self._base))

    @cached_property
    def true_means(self) -> Floats:
        """Posterior mean of each trial's true mean, (trials,): the expected mean score of another run of its fits."""
        return np.asarray(self.model.share @ (self.effect + self._base))

    def fold_mean(self, row: int, fold: int) -> float:
        """Return the expected mean score of another fit of a trial on a fold."""
        column = self.model.folds == fold
        level = self.model.level[:, column] if column.any() else self._base
        return float(self.model.share @ (level[:, 0] + self.effect[:, row]))

    def difference(self, row: int, other: int) -> tuple[float, float]:
        """Return the expected value of `other` minus that of `row`, and its standard deviation."""
        means, variances = (each[:, row] for each in self._differences(other))
        d = -float(self.model.share @ means)
        return d, math.sqrt(float(self.model.share @ (variances + (means + d) ** 2)))

    def probability_better(self, than: int, by: float) -> Floats:
        """Return the probability that the value of each trial exceeds that of trial `than` by more than `by`."""
        means, variances = self._differences(than)
        return np.asarray(self.model.share @ ndtr((means - by) / np.sqrt(np.maximum(variances, 1e-14))))

    def probability_of_gain(self, row: int, like: Mask, share: float, n_new: int, gain: float) -> float:
        """Return the probability that the best of `n_new` new trials is truly better than a row by at least `gain`.

        The fraction `share` of new trials is like the trials in the mask `like`: their mu is normal, with the mean of
        these trials and the standard deviation tau. The others cannot be better.
        """
        if not like.any():
            return 0.0
        mean = self.effect[:, like].mean(axis=1) - self.effect[:, row] - gain
        variance = self.model.tau**2 * (1 + 1 / like.sum()) + self.effect_variance[:, row]
        of_one = share * ndtr(mean / np.sqrt(np.maximum(variance, 1e-14)))
        return float(self.model.share @ (1 - (1 - of_one) ** n_new))

    @cached_property
    def _base(self) -> Floats:
        """Mean of f over the images, (grid, 1)."""
        share = self.model.fold_share[self.model.folds]
        return np.asarray((self.model.level @ share / share.sum())[:, None])

    def _differences(self, other: int) -> tuple[Floats, Floats]:
        """Return mean and variance of the value of each trial minus that of `other`, (grid, trials)."""
        loading = self.loading - self.loading[:, [other]]
        of_level = ((loading @ self.model.level_covariance) * loading).sum(axis=2)
        variances = self.variance + self.variance[:, [other]] + of_level
        variances[:, other] = 0.0
        return self.lead - self.lead[:, [other]], variances


def value_model(means: Floats, sizes: Sequence[int], g2: float) -> ValueModel:
    """Fit the model to the fold means of at least one trial.

    `means` is (trials, folds), NaN for folds that a trial has not finished. Every trial must have finished a fold.
    `sizes` contains the number of images of each fold, and `g2` is the variance g^2 (`residual_variance`).
    """
    is_near, height = near_rows(means)
    folds = np.flatnonzero(np.isfinite(means[is_near]).any(axis=0))
    z, n = means[is_near][:, folds], np.asarray(sizes, float)
    is_known, centre = np.isfinite(z), float(np.nanmean(z))
    z = np.where(is_known, z - centre, 0.0)
    spread = float(np.ptp(height[is_near]))
    parts = []
    for s in S_GRID:
        precision = is_known / (g2 / n[folds] + s**2)
        se = 1 / math.sqrt(precision.sum(axis=1).max())
        found = fit(z, precision, np.ones(len(z), bool), top=2 * spread + 4 * se, se=se)
        log_prior = -S_GUESS_DF * (math.log(s) + (S_GUESS / s) ** 2 / 2)
        log_share = np.log(np.maximum(found.share, NEGLIGIBLE**2)) + found.log_evidence + log_prior
        parts.append((log_share, np.full(len(log_share), s), found.tau, found.level + centre, found.information))
    log_share, s_grid, tau, level, information = (np.concatenate(each) for each in zip(*parts, strict=True))
    share = np.exp(log_share - log_share.max())
    kept = share > NEGLIGIBLE * share.sum()
    return ValueModel(
        share=share[kept] / share[kept].sum(),
        s=s_grid[kept],
        tau=tau[kept],
        level=level[kept],
        level_covariance=np.linalg.inv(information[kept]),
        folds=folds,
        fold_share=n / n.sum(),
        image_variances=g2 / n,
        lowest=float(height.max()) - NEAR,
    )


def near_rows(means: Floats) -> tuple[Mask, Floats]:
    """Return two arrays (trials,): whether each trial is near (see the module), and its height.

    `means` contains the fold means, (trials, folds), NaN if unfinished. The height of a trial is the mean by which
    its finished folds exceed the levels of these folds. The levels are estimated from the near trials, iteratively.
    At most the `MAX_NEAR` best trials are near.
    """
    known = np.isfinite(means).any(axis=0)
    level = np.full(means.shape[1], np.nan)
    # Most trials may have collapsed, so begin with the best of each fold.
    level[known] = np.nanmax(means[:, known], axis=0)
    for _ in range(3):
        height = np.nanmean(means - level, axis=1)
        is_near = height >= max(height.max() - NEAR, np.sort(height)[-MAX_NEAR:][0])
        height -= height[is_near].mean()
        rest = np.where(is_near[:, None], means - height[:, None], np.nan)
        known = np.isfinite(rest).any(axis=0)
        level[known] = np.nanmean(rest[:, known], axis=0)
    return is_near, height


def residual_variance(scores: Sequence[Floats]) -> float:
    """Return g^2, given the image scores of the near trials that have finished each fold, (trials, images) per fold.

    While no two near trials have finished the same fold, a guess is returned.
    """
    shared = [each for each in scores if len(each) > 1 and each.shape[1] > 1]
    return image_variance(shared) if shared else G_GUESS**2
