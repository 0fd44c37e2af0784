"""Estimate a selected trial's mean, or its lead over another trial, by the posterior mean of a mixed model.

The mean scores of trial c on fold k are modelled as

    z[c, k] = f[k] + mu[c] + e[c, k],      e[c, k] ~ N(0, 1 / precision[c, k]),      mu[c] ~ N(0, tau^2)

with f[k], the level of the fold, flat. A posterior does not depend on which trial was selected, nor on which trials
the race ended after which fold, because both were decided by the data in the model (Rubin, Biometrika 63, 1976;
Efron, JASA 106, 2011). The trials' standard deviation tau comes from the study itself (empirical Bayes; Morris, JASA
78, 1983): where it is small against the noise, a trial's mean is pulled to that of all trials.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SCALE = 0.3
"""Scale of the half-Cauchy prior of tau (Gelman, Bayesian Analysis 1, 2006), in standard errors of a trial's mean."""
N_GRID = 40
"""Grid points of tau, denser towards 0."""
TAIL, NOISE = 1.0, 2.0
"""A trial does not tell how the others spread if it lies more than `NOISE` standard errors further below their median
than `TAIL` times the distance that the best lies above: searches leave a long tail of bad trials."""
MAX_ROUNDS = 5
"""Rounds of leaving such trials out."""


class Contrast(NamedTuple):
    """A posterior mean as a weighted sum of the trials' fold means."""

    weights: Floats
    """(trials, folds)"""
    choice_variance: float
    """Posterior variance beyond the noise of the weighted sum: it is not known how far the trials truly differ."""


class _Fit(NamedTuple):
    """The model at one tau."""

    tau: float
    share: float
    """Posterior probability."""
    conditional: Floats
    """Variance of each mu given f: 1 / (1 / tau^2 + sum of precisions), (trials,); 0 where a trial is left out."""
    information: Floats
    """Inverse covariance of f, (folds, folds)."""
    level: Floats
    """Posterior mean of f, (folds,)."""


def posterior_contrast(
    means: Floats, precision: Floats, fold_share: Floats, trial: int, reference: int | None = None
) -> Contrast:
    """Return the posterior mean of a trial's mean over all images, or of its lead over `reference`.

    means, precision: (trials, folds); precision 0 where a trial did not finish a fold. fold_share: (folds,), share of
    the images. `trial` and `reference` have finished all folds. The reference's mu is flat, since it was in the study
    whatever its score, and so is that of a trial far below the others; neither informs f or tau.

    For a given tau everything is normal, and the posterior mean is linear in z (Henderson's mixed-model equations;
    Robinson, Statistical Science 6, 1991); weights and variances are averaged over the posterior of tau.
    """
    total = precision.sum(axis=1)
    guides, fits = _fit_guides(means, precision, reference, 1 / math.sqrt(total[trial]))
    weights, values, choice_variance = np.zeros_like(means), [], 0.0
    for fit in fits:
        # Given f, a trial's mu is conditional * sum(precision * (z - f)).
        variance = fit.conditional[trial] if guides[trial] else 1 / total[trial]
        own = precision[trial] * variance
        other = fold_share if reference is None else precision[reference] / total[reference]
        by_fold = np.linalg.solve(fit.information, other - own)
        spread_over = precision * guides[:, None] * by_fold
        each = spread_over - precision * (fit.conditional * spread_over.sum(axis=1))[:, None]
        each[trial] += own
        if reference is not None:
            each[reference] -= other
            variance += 1 / total[reference]
        variance += float((other - own) @ by_fold)
        noise = float((each**2 / np.where(precision > 0, precision, np.inf)).sum())
        choice_variance += fit.share * max(0.0, variance - noise)
        weights += fit.share * each
        values.append(float((each * means).sum()))
    shares = np.array([fit.share for fit in fits])
    choice_variance += float(shares @ (np.array(values) - shares @ values) ** 2)
    return Contrast(weights, float(choice_variance))


def _fit_guides(
    means: Floats, precision: Floats, reference: int | None, se: float
) -> tuple[NDArray[np.bool_], list[_Fit]]:
    """Fit the model to the trials that tell how trials spread: all but the reference and those far below.

    Returns which trials those are, (trials,), and the fitted model at each tau of the grid.
    """
    total = precision.sum(axis=1)
    is_eligible = np.arange(len(means)) != (-1 if reference is None else reference)

    def heights(level: Floats) -> Floats:
        return np.asarray((precision * (means - level)).sum(axis=1) / total)

    guides = is_eligible
    level = means[(precision > 0).all(axis=1)].mean(axis=0)
    for _ in range(MAX_ROUNDS):
        height = heights(level)
        middle = np.median(height[guides])
        lowest = middle - TAIL * (height[guides].max() - middle) - NOISE / np.sqrt(total)
        found = is_eligible & (height >= lowest)
        fits = _fit(means, precision, found, top=2 * float(np.ptp(height[found])) + 4 * se, se=se)
        if (found == guides).all():
            break
        guides, level = found, sum((fit.share * fit.level for fit in fits), np.zeros(means.shape[1]))
    return guides, fits


def _fit(means: Floats, precision: Floats, guides: NDArray[np.bool_], *, top: float, se: float) -> list[_Fit]:
    """The model at each tau from 0 to `top` with its posterior probability."""
    z, w = means[guides], precision[guides]
    total = w.sum(axis=1)
    grid = top * np.linspace(0, 1, N_GRID) ** 1.5
    log_posterior = np.log(np.gradient(grid)) - np.log1p((grid / (SCALE * se)) ** 2)
    found = []
    for index, tau in enumerate(grid):
        conditional = tau**2 / (1 + tau**2 * total)
        information = np.diag(w.sum(axis=0)) - (w * conditional[:, None]).T @ w
        level = np.linalg.solve(information, (w * z).sum(axis=0) - ((w * z).sum(axis=1) * conditional) @ w)
        residual = w * (z - level)
        misfit = float((residual * (z - level)).sum() - conditional @ residual.sum(axis=1) ** 2)
        log_det = float(np.log1p(tau**2 * total).sum() + np.linalg.slogdet(information)[1])
        log_posterior[index] -= (misfit + log_det) / 2
        everyone = np.zeros(len(means))
        everyone[guides] = conditional
        found.append(_Fit(float(tau), 0.0, everyone, information, level))
    shares = np.exp(log_posterior - log_posterior.max())
    shares /= shares.sum()
    return [fit._replace(share=float(share)) for fit, share in zip(found, shares, strict=True)]
