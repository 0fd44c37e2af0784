"""Compare the trials of a study: ties, shortlist, and the winner's mean and gain corrected for selection bias.

The best of many means is too high on average, and the trials that survive racing tend to have scored too high in
their first folds. One posterior mean corrects both effects, because a posterior does not depend on which trial was
selected or why (Rubin, Biometrika 63, 1976, on ignorable mechanisms; Efron, JASA 106, 2011, on selection bias). The
model is defined in `mixed_model`. The standard deviation tau of the trials' true means is estimated from the study
itself (empirical Bayes; Morris, JASA 78, 1983). If tau is small compared with the noise, the winner's estimate is
shrunk toward the mean of all trials. If tau is large, the winner keeps its own mean. Pruned trials contribute the
folds that they finished. benchmarks/study_statistics.py checks bias and coverage on studies whose true means are
known.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy.special import stdtr

from hpsearch.stats.best import rank
from hpsearch.stats.intervals import LEVEL, Floats, Interval, Paired, bootstrap_counts, cut, half_width, satterthwaite
from hpsearch.stats.mixed_model import posterior_contrast
from hpsearch.stats.study_scores import StudyScores

Method = Literal["single", "first", "confirmed"]

N_DRAWS = 2000
"""Number of Monte Carlo samples for the largest difference from the best trial that still counts as a tie."""
HOPELESS = 4.0
"""A trial that lies more than this number of standard errors below the best mean cannot tie with it (one-sided p
below 0.0001)."""


def tied_with_best(study: StudyScores) -> tuple[int, ...]:
    """Return the rows of a set of trials that contains the truly best one with 95 % confidence, best mean first.

    Subset selection (Gupta, Technometrics 7, 1965): a trial is excluded if its distance to the best mean is larger
    than the 95 % quantile of this distance for equally good trials. The noise is drawn from the covariance of the
    trials' image scores, and from a run-to-run variance that is itself uncertain. Trials far below the best are
    excluded first, because the noise of collapsed trials is so large that all trials would tie.
    """
    rng = np.random.default_rng(0)
    runs, means, run_variance = study.runs, study.joint.mean(axis=1), study.run_variances
    centred = study.joint - means[:, None]
    covariance = centred @ centred.T / (study.n_images - 1) / study.n_images
    best = int(means.argmax())
    own = np.diagonal(covariance) + run_variance
    reach = HOPELESS * np.sqrt(np.maximum(own + own[best] - 2 * covariance[best], 0))
    contenders = np.union1d(np.flatnonzero(means[best] - means <= reach), [best])
    # Use eigenvectors, because a Cholesky factorisation fails if equal trials make the covariance singular.
    values, vectors = np.linalg.eigh(covariance[np.ix_(contenders, contenders)])
    noise = (rng.standard_normal((N_DRAWS, len(contenders))) * np.sqrt(np.maximum(values, 0))) @ vectors.T
    size = np.sqrt(runs.df / rng.chisquare(runs.df, (N_DRAWS, 1)))
    noise += size * np.sqrt(run_variance[contenders]) * rng.standard_normal(noise.shape)
    allowed = np.quantile(noise.max(axis=1, keepdims=True) - noise, LEVEL, axis=0)
    tied = contenders[means[best] - means[contenders] <= allowed]
    return tuple(rank({int(trial): float(means[trial]) for trial in tied}))


def select_for_replication(scores: Floats, count: int = 5) -> tuple[int, ...]:
    """Return the rows of up to `count` trials, ordered by how often each is best on a bootstrap sample of the images.

    `scores` contains the first fits of the complete trials, (trials, images). Trials that are never the best are left
    out.
    """
    # Subtract each image's mean over trials. This does not affect the selection, and makes float32 precise enough.
    centred = np.asarray(scores - scores.mean(axis=0), np.float32)
    wins = np.zeros(len(scores), np.int64)
    for counts in bootstrap_counts(scores.shape[1]):
        wins += np.bincount((counts @ centred.T).argmax(axis=1), minlength=len(scores))
    means = scores.mean(axis=1)
    order = sorted(np.flatnonzero(wins), key=lambda trial: (-wins[trial], -means[trial], trial))
    return tuple(int(trial) for trial in order[:count])


def best_row(study: StudyScores) -> int:
    """Return the row of the winner in `study.scores`.

    If the study names no winner, it is the replicated trial with the best mean over both fits, or the best of all
    trials if none was replicated.
    """
    if study.winner is not None:
        return study.winner
    means = study.joint.mean(axis=1)
    return rank({row: float(means[row]) for row in study.replicated or range(study.n_trials)})[0]


@dataclass(frozen=True)
class Corrected:
    """Winner's mean score, corrected for selection bias."""

    trial: int
    naive: float
    """Mean score of the first fits, which is too high on average."""
    mean: float
    low: float
    high: float
    """Ends of the 95 % interval of the true mean over similar images and over runs."""
    image_variance: float
    """Variance of the estimate due to the sample of images."""
    run_variance: float
    """Variance of the estimate due to the seeds of the fits."""
    choice_variance: float
    """Variance of the estimate due to the uncertainty about how much of the winner's lead is real."""
    method: Method
    """How the winner was selected. `single`: it is the only trial. `first`: by the first fits. `confirmed`: by the
    mean over both fits."""

    @property
    def interval(self) -> Interval:
        return Interval(self.mean, self.low, self.high)


def corrected_estimate(study: StudyScores) -> Corrected:
    """Return the winner's mean, corrected for selection and racing, with a 95 % interval."""
    trial, n = best_row(study), study.n_images
    found = _posterior(study, trial)
    half = half_width(found.image_variance + found.choice_variance, n - 1, found.run_variance, study.runs.df)
    low, high = cut(found.mean, found.mean - half, found.mean + half)
    is_single = study.n_trials == 1 and study.pruned is None
    method: Method = "single" if is_single else "confirmed" if study.replicated else "first"
    naive = float(study.scores[trial].mean())
    return Corrected(trial=trial, naive=naive, low=low, high=high, method=method, **found._asdict())


def corrected_gain(study: StudyScores, trial: int, reference: int = 0) -> Paired:
    """Return how much better `trial` is than `reference`, corrected for selection, with a 95 % interval and p-value.

    The reference is in the study regardless of its score. Its mean is therefore not shrunk toward the other trials
    and does not inform their spread. The two-sided p-value tests for no difference (Student's t with Satterthwaite's
    degrees of freedom).
    """
    found = _posterior(study, trial, reference)
    images = found.image_variance + found.choice_variance
    half = half_width(images, study.n_images - 1, found.run_variance, study.runs.df)
    se = math.sqrt(images + found.run_variance)
    df = satterthwaite(images, study.n_images - 1, found.run_variance, study.runs.df)
    p = 2 * float(stdtr(df, -abs(found.mean) / se)) if se > 0 else float(found.mean == 0)
    p = max(p, float(np.finfo(float).tiny))
    return Paired(found.mean, *cut(found.mean, found.mean - half, found.mean + half, least=-1.0), p)


def predict_test_mean(study: StudyScores, corrected: Corrected, *, n_test: int, n_runs: int = 1) -> Interval:
    """Return the retrained winner's expected mean on `n_test` new images, with a 95 % prediction interval.

    The variance is the sum of three parts: the variance of the estimate, the variance of a mean over `n_test` images,
    and the run-to-run variance of `n_runs` retrained networks whose scores are averaged. The prediction assumes that
    the test images come from the same distribution as the pool, and that a network trained on the whole pool is as
    good as the fold networks.
    """
    test_images = float(study.scores[corrected.trial].var(ddof=1)) / n_test
    images = corrected.image_variance + corrected.choice_variance + test_images
    runs = corrected.run_variance + study.runs.variance / n_runs
    half = half_width(images, study.n_images - 1, runs, study.runs.df)
    return Interval(corrected.mean, *cut(corrected.mean, corrected.mean - half, corrected.mean + half))


class _Estimate(NamedTuple):
    mean: float
    image_variance: float
    run_variance: float
    choice_variance: float


def _posterior(study: StudyScores, trial: int, reference: int | None = None) -> _Estimate:
    """Return the posterior mean of a trial's mean, or of its lead over `reference`, and the parts of its variance.

    The weights of `posterior_contrast` apply to fold means, and therefore also to the scores of single images. The
    image variance is then computed from the weighted image scores, not from the g^2 of `study_scores`. It is
    therefore valid even if trials disagree more on some images than on others, or if some trials resemble each other.
    """
    sizes = np.array([len(fold) for fold in study.folds])
    pruned = np.zeros((0, study.n_images)) if study.pruned is None else study.pruned
    scores = np.concatenate([study.joint, pruned])
    n_fits = np.concatenate([study.n_fits, np.ones(len(pruned))])[:, None]
    means = np.stack([scores[:, fold].mean(axis=1) for fold in study.folds], axis=1)
    # The lower limit avoids a division by zero if all scores are equal.
    variance = np.maximum(study.image_variance / sizes + study.runs.variance / n_fits, 1e-14)
    known = np.isfinite(means)
    if len(scores) == 1:
        weights, choice_variance = np.zeros_like(means), 0.0
        weights[trial] = sizes / study.n_images
    else:
        weights, choice_variance = posterior_contrast(
            np.where(known, means, 0), np.where(known, 1 / variance, 0), sizes / study.n_images, trial, reference
        )
    weighted = np.zeros(study.n_images)
    for index, fold in enumerate(study.folds):
        weighted[fold] = weights[:, index] * (study.n_images / sizes[index]) @ np.nan_to_num(scores[:, fold])
    return _Estimate(
        mean=float(weighted.mean()),
        image_variance=float(weighted.var(ddof=1)) / study.n_images,
        run_variance=study.runs.variance * float((weights**2 / n_fits).sum()),
        choice_variance=choice_variance,
    )
