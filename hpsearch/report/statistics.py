"""Estimate how sure a study's numbers are: intervals, comparisons, ties, and the bias of picking the best of many.

**Model.** With y[c, i] the score of image i by the fold model of trial c that had not seen it,

    y[c, i] = mu[c] + a[i] + b[c, i] + r[c, fold of i]

mu[c] is the quantity of interest; a is the difficulty of the image, shared by all trials; b is the effect of this
configuration on this image (variance g^2); r is run-to-run variation (variance s^2): refitting the same fold with
another seed moves all of its images together. More images average a and b out, but r averages only over folds and
fits.

**Selection bias.** The best of many means is too high, and a trial that survived the race was lucky in its early
folds. Both follow from the same data, so a posterior mean corrects for both at once: what was selected, and why, does
not change a posterior (Rubin, Biometrika 63, 1976, on ignorable mechanisms; Efron, JASA 106, 2011, on selection
bias). The trials' mu are taken to be normal about a common mean with standard deviation tau, which the study itself
tells (empirical Bayes; Morris, JASA 78, 1983). Where tau is small against the noise, the winner is pulled to the mean
of all trials; where it is large, the winner keeps its own mean. Dropped trials enter with the folds they finished.
benchmarks/study_statistics.py checks bias and coverage on studies whose truth is known.

**Limits.** Scores lie in [0, 1], hence means too, and differences in [-1, 1]. Intervals that would extend beyond are
cut there. The truth never lies in the part cut off, so coverage does not change, and the estimate stays inside
(Newcombe, Statistics in Medicine 17, 1998; Mandelkern, Statistical Science 17, 2002).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

from hpsearch.errors import StudyError
from hpsearch.report.shrinkage import posterior_contrast
from hpsearch.search.racing import NEAR, S_GUESS, S_GUESS_DF, fold_mean_squares
from hpsearch.stats.best import rank

Floats = NDArray[np.float64]
Method = Literal["single", "first", "confirmed"]

LEVEL = 0.95
"""Nominal coverage of every interval, and of the set that is tied with the best."""
N_BAGS = 2000
"""Bootstrap samples of the images."""
N_DRAWS = 2000
"""Draws of the noise that decides how large a gap between tied trials may be."""
HOPELESS = 4.0
"""Standard errors behind the best from which on a trial is no contender: one-sided p below 0.0001."""
LIMIT = 8.0
"""A trial's run-to-run mean square counts at most this many medians, so that one collapsed fold does not decide."""
_BLOCK = 2**23
"""Entries of a block of bags: 32 MiB."""


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of_scores(cls, mean: float, low: float, high: float) -> Self:
        """Of a mean of scores: cut to [0, 1]."""
        return cls(mean, *_cut(mean, low, high, least=0.0))


@dataclass(frozen=True)
class Paired:
    """Mean difference of two on the same images, its 95 % interval, and the two-sided p of no difference."""

    difference: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class RunVariance:
    """Variance of a fold's mean between runs of the same fit with different seeds."""

    variance: float
    df: float
    """Degrees of freedom of the estimate."""

    @property
    def sd(self) -> float:
        return math.sqrt(self.variance)


@dataclass(frozen=True, kw_only=True, eq=False)
class StudyScores:
    """The final scores of a study's trials on the images that were held out."""

    scores: Floats
    """First fits, (trials, images)."""
    fold_of: NDArray[np.int64]
    """Fold of every image, (images,)."""
    confirmed: tuple[int, ...] = ()
    """Rows of `scores` that were fitted a second time, with new seeds."""
    second: Floats | None = None
    """Their second fits on the same folds, (confirmed, images)."""
    winner: int | None = None
    """Row of the trial that the study names as best; None: the best by these scores (`chosen`)."""
    dropped: Floats | None = None
    """First fits of the trials that the race ended, (dropped, images); NaN on folds they did not finish."""

    def __post_init__(self) -> None:
        shape = self.scores.shape
        if len(shape) != 2 or shape[0] < 1 or self.fold_of.shape != shape[1:]:
            raise ValueError(f"scores of shape {shape} do not go with folds of shape {self.fold_of.shape}")
        if shape[1] < 2:
            raise StudyError(f"statistics need at least 2 images, got {shape[1]}")
        if not np.isfinite(self.scores).all() or not np.isfinite(self.second_fits).all():
            raise ValueError("a full trial has a finite score for every image")
        if self.second_fits.shape != (len(self.confirmed), shape[1]) or len(set(self.confirmed)) < len(
            self.confirmed
        ):
            raise ValueError(f"second fits of shape {self.second_fits.shape} are not those of {self.confirmed}")
        if self.dropped is not None and self.dropped.shape[1:] != shape[1:]:
            raise ValueError(f"dropped trials of shape {self.dropped.shape} do not go with {shape[1]} images")

    @property
    def n_trials(self) -> int:
        return len(self.scores)

    @property
    def n_images(self) -> int:
        return len(self.fold_of)

    @cached_property
    def folds(self) -> tuple[NDArray[np.int64], ...]:
        """Images of each fold."""
        return tuple(np.flatnonzero(self.fold_of == fold) for fold in np.unique(self.fold_of))

    @property
    def second_fits(self) -> Floats:
        return np.zeros((0, self.n_images)) if self.second is None else self.second

    @cached_property
    def n_fits(self) -> NDArray[np.int64]:
        """Fits of every fold by trial, (trials,): 1, or 2 where confirmed."""
        n_fits = np.ones(self.n_trials, np.int64)
        n_fits[list(self.confirmed)] = 2
        return n_fits

    @cached_property
    def joint(self) -> Floats:
        """Mean over the fits of every trial, (trials, images)."""
        joint = self.scores.astype(np.float64)
        joint[list(self.confirmed)] += self.second_fits
        joint /= self.n_fits[:, None]
        return joint

    @cached_property
    def near(self) -> Floats:
        """First fits of the trials within 0.05 of the best, at least of two, (near, images).

        A collapsed configuration spreads many times as far from run to run and from image to image.
        """
        means = self.scores.mean(axis=1)
        n_near = max(2, int((means >= means.max() - NEAR).sum()))
        return self.scores[np.argsort(-means, kind="stable")[:n_near]]

    @cached_property
    def runs(self) -> RunVariance:
        """s^2, pooled by degrees of freedom from the prior guess of the race, first fits, and second fits.

        First fits: mean squares of the near trials' fold means after trial and fold effects, each limited to
        `LIMIT` medians, less the images' part. Second fits: half the variance over folds of how far a fold's mean
        moved from first to second fit, less the images' part; a trial's mean move is left out, because trials were
        confirmed for a high first fit.
        """
        k, n_near = len(self.folds), len(self.near)
        total, df = S_GUESS_DF * S_GUESS**2, S_GUESS_DF
        if k < 2:
            return RunVariance(total / df, df)
        if n_near > 1:
            squares, images = fold_mean_squares([self.near[:, fold] for fold in self.folds])
            first_df = (n_near - 1) * (k - 1)
            total += first_df * (float(np.minimum(squares, LIMIT * np.median(squares)).mean()) - images)
            df += first_df
        # A fold of one image cannot tell its own move from the image's.
        if self.confirmed and min(map(len, self.folds)) > 1:
            moves = self.second_fits - self.scores[list(self.confirmed)]
            means = np.stack([moves[:, fold].mean(axis=1) for fold in self.folds], axis=1)
            images_part = np.mean([moves[:, fold].var(axis=1, ddof=1) / len(fold) for fold in self.folds], axis=0)
            second_df = (k - 1) * len(moves)
            total += second_df * float((means.var(axis=1, ddof=1) - images_part).mean()) / 2
            df += second_df
        return RunVariance(max(0.0, total / df), df)

    @cached_property
    def image_spread(self) -> float:
        """g^2: variance of a trial's score of an image after trial, fold and image effects, from the near trials."""
        squares, df = 0.0, 0
        for fold in self.folds:
            residual = self.near[:, fold] - self.near[:, fold].mean(axis=1, keepdims=True)
            squares += float(((residual - residual.mean(axis=0)) ** 2).sum())
            df += (len(self.near) - 1) * (len(fold) - 1)
        return squares / df if df else 0.0

    @property
    def run_variances(self) -> Floats:
        """Run-to-run variance of each trial's joint mean, (trials,): s^2 / (folds x fits)."""
        return self.runs.variance / (len(self.folds) * self.n_fits)


# One mean, two means


def bootstrap_mean(scores: Floats, *, run_variance: float = 0.0, run_df: float = math.inf, seed: int = 0) -> Interval:
    """Mean of scores (n,) with its 95 % interval: bootstrap over images, and run luck if its variance is given."""
    low, high = np.quantile(_draws(scores, run_variance, run_df, seed), _TAILS)
    return Interval.of_scores(float(np.mean(scores)), float(low), float(high))


def paired_difference(
    first: Floats, second: Floats, *, run_variance: float = 0.0, run_df: float = math.inf, seed: int = 0
) -> Paired:
    """First minus second on the same images, (n,) each: bootstrap over images, and run luck if its variance is given.

    Without run luck this speaks of these two networks; with it, of the two configurations. p is twice the share of
    draws beyond 0, and never below what their number can tell.
    """
    difference = first - second
    draws = _draws(difference, run_variance, run_df, seed)
    low, high = np.quantile(draws, _TAILS)
    beyond = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    p = min(1.0, 2 * (beyond + 1) / (len(draws) + 1))
    mean = float(difference.mean())
    return Paired(mean, *_cut(mean, float(low), float(high), least=-1.0), p)


def corrected_t(fold_means: Floats) -> Interval | None:
    """Mean of k fold means with the corrected resampled t interval (Nadeau and Bengio, Machine Learning 52, 2003).

    The folds' training sets overlap, so their means are not independent: their variance counts 1/k + 1/(k - 1) times
    instead of 1/k. Wide for few folds, and wider than needed where the overlap does no harm. None for one fold.
    """
    k = len(fold_means)
    if k < 2:
        return None
    mean = float(fold_means.mean())
    half = _t(k - 1) * math.sqrt((1 / k + 1 / (k - 1)) * float(fold_means.var(ddof=1)))
    return Interval.of_scores(mean, mean - half, mean + half)


# Trials


@dataclass(frozen=True)
class TrialStatistics:
    """What is known of one full trial's mean."""

    mean: float
    """Over images, and over both fits where it was confirmed."""
    sd_images: float
    sd_folds: float
    """Standard deviation of the fold means; 0 for one fold."""
    images: Interval
    """Of these networks on other images: bootstrap over images."""
    total: Interval
    """Of the configuration: bootstrap over images, and run luck."""
    folds: Interval | None
    """Corrected resampled t over folds; None for one fold."""


def trial_statistics(study: StudyScores, *, seed: int = 0) -> list[TrialStatistics]:
    """One entry for each trial, in the study's order."""
    run_variance = study.run_variances
    rows = []
    for trial, scores in enumerate(study.joint):
        fold_means = np.array([scores[images].mean() for images in study.folds])
        rows.append(
            TrialStatistics(
                mean=float(scores.mean()),
                sd_images=float(scores.std(ddof=1)),
                sd_folds=float(fold_means.std(ddof=1)) if len(fold_means) > 1 else 0.0,
                images=bootstrap_mean(scores, seed=seed),
                total=bootstrap_mean(
                    scores, run_variance=float(run_variance[trial]), run_df=study.runs.df, seed=seed
                ),
                folds=corrected_t(fold_means),
            )
        )
    return rows


def tied_with_best(study: StudyScores, *, seed: int = 0) -> tuple[int, ...]:
    """The trials among which the truly best one is, 95 % of the time or more; best mean first.

    Subset selection (Gupta, Technometrics 7, 1965): a trial is out if it lies further behind the best mean than the
    luckiest of equal trials would lead it in 95 of 100 studies. The noise is drawn from what was seen: the images'
    covariance between trials, and run luck of a size that is itself uncertain. Trials hopelessly behind are left
    aside first: collapsed ones have so much noise that, taken for equals, they would tie everything.
    """
    rng = np.random.default_rng(seed)
    runs, means, run_variance = study.runs, study.joint.mean(axis=1), study.run_variances
    centred = study.joint - means[:, None]
    covariance = centred @ centred.T / (study.n_images - 1) / study.n_images
    best = int(means.argmax())
    own = np.diagonal(covariance) + run_variance
    contenders = np.flatnonzero(
        means[best] - means <= HOPELESS * np.sqrt(np.maximum(own + own[best] - 2 * covariance[best], 0))
    )
    contenders = np.union1d(contenders, [best])
    # Eigenvectors, because equal rows make the covariance singular.
    values, vectors = np.linalg.eigh(covariance[np.ix_(contenders, contenders)])
    noise = (rng.standard_normal((N_DRAWS, len(contenders))) * np.sqrt(np.maximum(values, 0))) @ vectors.T
    size = np.sqrt(runs.df / rng.chisquare(runs.df, (N_DRAWS, 1)))
    noise += size * np.sqrt(run_variance[contenders]) * rng.standard_normal(noise.shape)
    allowed = np.quantile(noise.max(axis=1, keepdims=True) - noise, LEVEL, axis=0)
    tied = contenders[means[best] - means[contenders] <= allowed]
    return tuple(rank({int(trial): float(means[trial]) for trial in tied}))


def cheapest(tied: Sequence[int], costs: Mapping[int, float]) -> int:
    """The tied trial that costs least; of equal ones the better, that is the earlier in `tied`."""
    return min(tied, key=lambda trial: costs[trial])


# The winner


def select_for_confirmation(
    scores: Floats, count: int = 5, *, n_bags: int = N_BAGS, seed: int = 0
) -> tuple[int, ...]:
    """The up to `count` trials that bootstrap selection picks most: best on the most bags of images.

    scores: (trials, images) of the full trials' first fits. Trials that are best on no bag are left out.
    """
    centred = _centred(scores)
    wins = np.zeros(len(scores), np.int64)
    for bags in _bags(scores.shape[1], seed, n_bags):
        wins += np.bincount((bags @ centred.T).argmax(axis=1), minlength=len(scores))
    means = scores.mean(axis=1)
    order = sorted(np.flatnonzero(wins), key=lambda trial: (-wins[trial], -means[trial], trial))
    return tuple(int(trial) for trial in order[:count])


def chosen(study: StudyScores) -> int:
    """Return the row of the winner: the best of the confirmed trials by both their fits; without those, of all."""
    if study.winner is not None:
        return study.winner
    means = study.joint.mean(axis=1)
    return rank({row: float(means[row]) for row in study.confirmed or range(study.n_trials)})[0]


@dataclass(frozen=True)
class Corrected:
    """The winner's mean, corrected for having been selected."""

    trial: int
    naive: float
    """Mean of its first fits: too high on average."""
    mean: float
    low: float
    high: float
    """Ends of the 95 % interval of its true mean over such images and over runs."""
    image_variance: float
    """Of the estimate, because the images are a sample."""
    run_variance: float
    """Of the estimate, because every fit would come out differently with another seed."""
    choice_variance: float
    """Of the estimate, because it is not known how much of the winner's lead over the other trials is real."""
    method: Method
    """`single`: nothing was selected; `first`: selected by first fits alone; `confirmed`: by both fits."""

    @property
    def interval(self) -> Interval:
        """The estimate with its interval alone."""
        return Interval(self.mean, self.low, self.high)


def corrected_estimate(study: StudyScores) -> Corrected:
    """Return the winner's mean, corrected for selection and the race, with a 95 % interval."""
    trial, n = chosen(study), study.n_images
    found = _posterior(study, trial)
    half = _half_width(found.image_variance + found.choice_variance, n - 1, found.run_variance, study.runs.df)
    interval = Interval.of_scores(found.mean, found.mean - half, found.mean + half)
    return Corrected(
        trial=trial,
        naive=float(study.scores[trial].mean()),
        mean=found.mean,
        low=interval.low,
        high=interval.high,
        image_variance=found.image_variance,
        run_variance=found.run_variance,
        choice_variance=found.choice_variance,
        method="single" if study.n_trials == 1 else "confirmed" if study.confirmed else "first",
    )


def corrected_gain(study: StudyScores, trial: int, reference: int = 0) -> Paired:
    """Return how much better `trial` is than `reference`, corrected for selection, with a 95 % interval and p.

    The reference was in the study whatever its score, so it is not pulled to the other trials and does not tell how
    they spread. p is two-sided, of no difference (Student's t with Satterthwaite's degrees of freedom).
    """
    found = _posterior(study, trial, reference)
    images = found.image_variance + found.choice_variance
    half = _half_width(images, study.n_images - 1, found.run_variance, study.runs.df)
    se = math.sqrt(images + found.run_variance)
    df = _satterthwaite(images, study.n_images - 1, found.run_variance, study.runs.df)
    p = 2 * float(stdtr(df, -abs(found.mean) / se)) if se > 0 else float(found.mean == 0)
    ends = _cut(found.mean, found.mean - half, found.mean + half, least=-1.0)
    return Paired(found.mean, *ends, max(p, float(np.finfo(float).tiny)))


def predict_test_mean(study: StudyScores, corrected: Corrected, *, n_test: int, n_runs: int = 1) -> Interval:
    """Return the retrained winner's expected mean on `n_test` new images, with a 95 % prediction interval.

    The variance is that of the estimate, plus that of a mean over `n_test` images, plus that of `n_runs` retrained
    networks whose scores are averaged. It assumes test images drawn like the pool, and a network trained on the whole
    pool to be as good as those that lacked a fold.
    """
    images = (
        corrected.image_variance
        + corrected.choice_variance
        + float(study.scores[corrected.trial].var(ddof=1)) / n_test
    )
    runs = corrected.run_variance + study.runs.variance / n_runs
    half = _half_width(images, study.n_images - 1, runs, study.runs.df)
    return Interval.of_scores(corrected.mean, corrected.mean - half, corrected.mean + half)


def explain_test_mean(predicted: Interval, result: float) -> str:
    """Compare a test result with its prediction, in one sentence."""
    predicted_range = f"the 95 % prediction interval [{predicted.low:.4f}, {predicted.high:.4f}]"
    if predicted.low <= result <= predicted.high:
        return f"the test mean {result:.4f} lies within {predicted_range}, as the search predicted"
    side, causes = (
        (
            "above",
            "the test images are easier than the pool's, near-copies of pool images are among them, or training on "
            "the whole pool helped more than expected",
        )
        if result > predicted.high
        else (
            "below",
            "the test images are harder than the pool's or of another origin, the pool's folds share near-copies or "
            "patients, or the retraining went wrong",
        )
    )
    return (
        f"the test mean {result:.4f} lies {side} {predicted_range}, which is expected by chance in 2.5 % of studies; "
        f"possible reasons: {causes}"
    )


class _Estimate(NamedTuple):
    mean: float
    image_variance: float
    run_variance: float
    choice_variance: float


def _posterior(study: StudyScores, trial: int, reference: int | None = None) -> _Estimate:
    """Posterior mean of a trial's mean, or of its lead over `reference`, and the parts of its variance.

    The weights of `posterior_contrast` apply to fold means, and so to the scores of single images. The variance of
    these weighted scores over images is used instead of the model's g^2, so that it also holds for images that differ
    in how far trials disagree, and for trials that resemble each other.
    """
    sizes = np.array([len(fold) for fold in study.folds])
    dropped = np.zeros((0, study.n_images)) if study.dropped is None else study.dropped
    scores = np.concatenate([study.joint, dropped])
    n_fits = np.concatenate([study.n_fits, np.ones(len(dropped))])[:, None]
    means = np.stack([scores[:, fold].mean(axis=1) for fold in study.folds], axis=1)
    # The floor keeps the arithmetic finite where all scores are equal.
    variance = np.maximum(study.image_spread / sizes + study.runs.variance / n_fits, 1e-14)
    known = np.isfinite(means)
    if study.n_trials == 1:
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


# Bootstrap and Student's t

_TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)


def _bags(n_images: int, seed: int, n_bags: int) -> Iterator[NDArray[np.float32]]:
    """Blocks of bootstrap samples: how often each image is in each bag, (bags, n_images)."""
    size = max(1, _BLOCK // n_images)
    for start in range(0, n_bags, size):
        yield _bag_block(n_images, seed, start, min(size, n_bags - start))


@lru_cache(maxsize=1)
def _bag_block(n_images: int, seed: int, start: int, size: int) -> NDArray[np.float32]:
    # Cached because everything that is asked of one study is asked with the same bags.
    drawn = np.random.default_rng([seed, start]).integers(0, n_images, (size, n_images))
    drawn += n_images * np.arange(size)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=size * n_images).reshape(size, n_images).astype(np.float32)
    counts.flags.writeable = False
    return counts


def _draws(scores: Floats, run_variance: float, run_df: float, seed: int) -> Floats:
    """Means of bootstrap samples of scores (n,), moved by run luck, (N_BAGS,)."""
    if len(scores) < 2:
        raise StudyError(f"an interval needs at least 2 images, got {len(scores)}")
    mean = float(np.mean(scores))
    centred = (scores - mean).astype(np.float32)
    draws = np.concatenate([bags @ centred for bags in _bags(len(scores), seed, N_BAGS)]).astype(np.float64) / len(
        scores
    )
    # The spread of a sample of n about its own mean is too small by (n - 1) / n.
    draws *= math.sqrt(len(scores) / (len(scores) - 1))
    if run_variance > 0:
        rng = np.random.default_rng([seed, 1])
        luck = rng.standard_normal(len(draws)) if math.isinf(run_df) else rng.standard_t(run_df, len(draws))
        draws += math.sqrt(run_variance) * luck
    return mean + draws


def _centred(scores: Floats) -> NDArray[np.float32]:
    """Scores without what all trials have in common, which decides no choice and would cost precision."""
    return np.asarray(scores - scores.mean(axis=0), np.float32)


def _satterthwaite(image_variance: float, image_df: float, run_variance: float, run_df: float) -> float:
    """Degrees of freedom of a sum of two estimated variances (Satterthwaite, Biometrics Bulletin 2, 1946)."""
    total = image_variance + run_variance
    return total**2 / (image_variance**2 / image_df + run_variance**2 / run_df) if total > 0 else math.inf


def _half_width(image_variance: float, image_df: float, run_variance: float, run_df: float) -> float:
    """Half of a 95 % interval from two variances."""
    total = image_variance + run_variance
    return _t(_satterthwaite(image_variance, image_df, run_variance, run_df)) * math.sqrt(total) if total > 0 else 0.0


def _cut(mean: float, low: float, high: float, *, least: float) -> tuple[float, float]:
    """The ends of an interval, cut to [least, 1]; the mean stays inside, also where it was rounded beyond."""
    return min(mean, max(low, least)), max(mean, min(high, 1.0))


def _t(df: float) -> float:
    return float(stdtrit(df, _TAILS[1]))
