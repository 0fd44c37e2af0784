"""Fit the mixed model of fold means by which `selection` corrects estimates and `value_model` predicts values.

The mean score of trial c on fold k, z[c, k], is modelled as

    z[c, k] = f[k] + mu[c] + e[c, k],      e[c, k] ~ N(0, 1 / precision[c, k]),      mu[c] ~ N(0, tau^2)

- f[k] is the level of the fold. Its prior is flat.
- mu[c] is the true mean of the trial relative to all trials. The standard deviation tau of these means is estimated
  from the study itself (empirical Bayes; Morris, JASA 78, 1983). If tau is small compared with the noise, a trial's
  estimate is shrunk toward the mean of all trials.
- e[c, k] is the noise due to images and runs. Its precision, the inverse of its variance, is given.

The posterior does not depend on which trial was selected, or on when racing pruned which trial, because both
decisions were based on the data in the model (Rubin, Biometrika 63, 1976; Efron, JASA 106, 2011).
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpsearch.stats.intervals import Floats

Mask = NDArray[np.bool_]

SCALE = 0.4
"""Scale of the half-Cauchy prior of tau, in standard errors of a trial's mean (Gelman, Bayesian Analysis 1, 2006)."""
N_GRID = 40
"""Number of grid points of tau. The points are denser toward 0."""
TAIL, NOISE = 0.7, 1.5
"""Limits that exclude bad trials from the estimate of tau, because a search produces a long tail of them. Let D be
the distance between the median and the best trial. A trial is excluded if it lies below the median by more than
`TAIL` times D plus `NOISE` times its standard error."""
MAX_ROUNDS = 5
"""Maximum number of rounds in which such trials are excluded."""


class Fits(NamedTuple):
    """Model fitted at each tau of a grid."""

    tau: Floats
    """Grid of tau, (grid,)."""
    share: Floats
    """Posterior probability of each tau, (grid,)."""
    conditional: Floats
    """Variance of each trial's mu given f, (grid, trials): 1 / (1 / tau^2 + sum of precisions), 0 for excluded
    trials."""
    information: Floats
    """Inverse covariance of f, (grid, folds, folds)."""
    level: Floats
    """Posterior mean of f, (grid, folds)."""
    log_evidence: float
    """Logarithm of the marginal likelihood of the fold means, averaged over the prior of tau, up to a constant."""


def posterior_contrast(
    means: Floats, precision: Floats, fold_share: Floats, trial: int, reference: int | None = None
) -> tuple[Floats, float]:
    """Return the posterior mean of a trial's mean over all images, or of its lead over `reference`.

    The posterior mean is returned as weights of the fold means, (trials, folds). The second value is the part of the
    posterior variance that is not noise of the fold means. It exists because the true differences between the trials
    are uncertain.

    `means` and `precision` are (trials, folds) arrays. The precision is 0 if a trial did not finish a fold.
    `fold_share` is (folds,), the fraction of the images in each fold. `trial` and `reference` must have finished all
    folds. The prior of mu is flat for the reference and for trials far below the others. (The reference is in the
    study regardless of its score.) These trials do not inform f or tau.

    For a given tau, all distributions are normal, and the posterior mean is linear in z (Henderson's mixed-model
    equations; Robinson, Statistical Science 6, 1991). Weights and variances are averaged over the posterior of tau.
    """
    total = precision.sum(axis=1)
    guides, fits = _fit_guides(means, precision, reference, 1 / math.sqrt(total[trial]))
    # Given f, a trial's mu is conditional * sum(precision * (z - f)).
    variance = fits.conditional[:, trial] if guides[trial] else np.full(len(fits.share), 1 / total[trial])
    own = precision[trial] * variance[:, None]
    other = fold_share if reference is None else precision[reference] / total[reference]
    by_fold = np.linalg.solve(fits.information, (other - own)[:, :, None])[:, :, 0]
    each = (precision * guides[:, None]) * by_fold[:, None]
    each -= precision * (fits.conditional * each.sum(axis=2))[:, :, None]
    each[:, trial] += own
    variance = variance + ((other - own) * by_fold).sum(axis=1)
    if reference is not None:
        each[:, reference] -= other
        variance += 1 / total[reference]
    noise = (each**2 / np.where(precision > 0, precision, np.inf)).sum(axis=(1, 2))
    values = (each * means).sum(axis=(1, 2))
    choice_variance = fits.share @ (np.maximum(0, variance - noise) + (values - fits.share @ values) ** 2)
    return np.tensordot(fits.share, each, axes=1), float(choice_variance)


def _fit_guides(means: Floats, precision: Floats, reference: int | None, se: float) -> tuple[Mask, Fits]:
    """Fit the model to the trials that inform tau: all trials except the reference and those far below the others.

    Returns a mask of these trials, (trials,), and the fitted model. `se` is the standard error of the selected
    trial's mean, to which the prior of tau is scaled.
    """
    total = precision.sum(axis=1)
    is_eligible = np.arange(len(means)) != (-1 if reference is None else reference)

    guides = is_eligible
    level = means[(precision > 0).all(axis=1)].mean(axis=0)
    for _ in range(MAX_ROUNDS):
        height = np.asarray((precision * (means - level)).sum(axis=1) / total)
        middle = np.median(height[guides])
        lowest = middle - TAIL * (height[guides].max() - middle) - NOISE / np.sqrt(total)
        found = is_eligible & (height >= lowest)
        fits = fit(means, precision, found, top=2 * float(np.ptp(height[found])) + 4 * se, se=se)
        if (found == guides).all():
            break
        guides, level = found, fits.share @ fits.level
    return guides, fits


def fit(means: Floats, precision: Floats, guides: Mask, *, top: float, se: float) -> Fits:
    """Fit the model to the trials in the mask `guides`, at each tau of a grid from 0 to `top`.

    `means` and `precision` are (trials, folds), and the precision is 0 if a trial did not finish a fold. At least one
    guide must have finished each fold. The prior of tau is scaled to the standard error `se` of a trial's mean.
    """
    z, w = means[guides], precision[guides]
    total = w.sum(axis=1)
    tau = top * np.linspace(0, 1, N_GRID) ** 1.5
    ratio = tau[:, None] ** 2 * total
    conditional = np.zeros((N_GRID, len(means)))
    conditional[:, guides] = pull = ratio / (1 + ratio) / total
    information = np.diag(w.sum(axis=0)) - (pull[:, None] * w.T) @ w
    right = (w * z).sum(axis=0) - (pull * (w * z).sum(axis=1)) @ w
    level = np.linalg.solve(information, right[:, :, None])[:, :, 0]
    residual = z - level[:, None]
    misfit = (w * residual**2).sum(axis=(1, 2)) - (pull * (w * residual).sum(axis=2) ** 2).sum(axis=1)
    log_det = np.log1p(ratio).sum(axis=1) + np.linalg.slogdet(information)[1]
    prior = np.gradient(tau) / (1 + (tau / (SCALE * se)) ** 2)
    log_prior = np.log(prior / prior.sum())
    log_posterior = log_prior - (misfit + log_det) / 2
    share = np.exp(log_posterior - log_posterior.max())
    evidence = float(log_posterior.max() + np.log(share.sum()) + np.log(w[w > 0]).sum() / 2)
    return Fits(tau, share / share.sum(), conditional, information, level, evidence)
