"""How sure the numbers of a study are: intervals, comparisons, ties, and the price of having picked the best of many.

**What a mean is made of.** With y[c, i] the score of image i by the fold model of trial c that had not seen it,

    y[c, i] = mu[c] + a[i] + b[c, i] + r[c, fold of i]

mu is what one wants to know; a says how hard the image is, the same for all trials; b is what this configuration
makes of this image; r is run luck: fitting the same fold again with another seed moves all of its images together.
More images average a and b away, but r only averages over folds and fits. Its standard deviation s is the race's
(`racing.run_spread`), so that race and report speak of one thing.

**What the winner is worth.** The best of many means is too good, by image luck and by run luck. Bootstrap
bias-corrected cross-validation (BBC-CV: Tsamardinos, Greasidou and Borboudakis, Machine Learning 107, 2018) repeats
the choice on bags of images and scores what it chose on the images out of the bag. Run luck, which images in and out
of the bag share, stays in. So the winners are fitted once more with new seeds, and each bag repeats the whole
choice (`corrected_estimate`): the first fits in the bag make a shortlist, the first fits and the second fits of the
other folds choose from it, and the second fit of the fold scores the images that are out of the bag. Without second
fits, whole folds are left out of the choice instead, since run luck is not shared between folds.

**Where intervals end.** Every score lies in [0, 1], so means do too, and differences of them in [-1, 1]. With few
images an interval that is as wide as its coverage needs would go beyond: it is cut there. The truth never lies in
what is cut off, so that the coverage stays what it was, and the estimate always lies inside, so that nothing becomes
empty (the truncation of Newcombe, Statistics in Medicine 17, 1998, for proportions; Mandelkern, Statistical Science
17, 2002, on bounded parameters at large).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from hpsearch.errors import StudyError
from hpsearch.stats.best import rank
from hpsearch.tuning.racing import NEAR, run_spread

Floats = NDArray[np.float64]
Method = Literal["single", "confirmed", "folds", "images"]

LEVEL = 0.95
"""Nominal coverage of every interval, and of the set that is tied with the best."""
N_BAGS = 2000
"""Bootstrap samples of the images."""
N_DRAWS = 2000
"""Draws of the noise that decides how large a gap between tied trials may be."""
HOPELESS = 4.0
"""Standard errors behind the best from which on a trial is no contender: one-sided p below 0.0001."""
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
class RunLuck:
    """How far a fold's mean moves when the same fit is run again with another seed."""

    sd: float
    df: float
    """Degrees of freedom that the estimate is worth."""

    @property
    def variance(self) -> float:
        return self.sd**2


@dataclass(frozen=True, kw_only=True, eq=False)
class StudyScores:
    """The final scores of a study's full trials on the images that were held out."""

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
    def run_luck(self) -> RunLuck:
        """From the trials near the best: a collapsed configuration has a spread of its own, many times larger."""
        return RunLuck(*run_spread(self._near_by_fold()))

    @cached_property
    def run_luck_ahead(self) -> RunLuck:
        """What to expect of the next network: without the race's floor, and joined with what second fits moved.

        The race must not take luck for merit, so it believes in no less than its floor. A prediction that did the
        same would be too wide. Half the mean square of the moves of a fold's mean from first to second fit, images'
        own part off, estimates s^2 with a degree of freedom for every move.
        """
        sd, df = run_spread(self._near_by_fold(), floor=0.0)
        total, weight = df * sd**2, df
        moves = self.second_fits - self.scores[list(self.confirmed)]
        for images in self.folds:
            # A fold of one image cannot tell its own luck from the fold's.
            if len(images) > 1:
                of_fold = moves[:, images]
                total += float((of_fold.mean(axis=1) ** 2 - of_fold.var(axis=1, ddof=1) / len(images)).sum()) / 2
                weight += len(moves)
        return RunLuck(math.sqrt(max(0.0, total / weight)), weight)

    def _near_by_fold(self) -> list[Floats]:
        means = self.scores.mean(axis=1)
        near = self.scores[means >= means.max() - NEAR]
        return [near[:, images] for images in self.folds]

    def run_variance(self) -> Floats:
        """Variance of each trial's joint mean by run luck, (trials,)."""
        return self.run_luck.variance / (len(self.folds) * self.n_fits)


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
    run_variance = study.run_variance()
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
                    scores, run_variance=float(run_variance[trial]), run_df=study.run_luck.df, seed=seed
                ),
                folds=corrected_t(fold_means),
            )
        )
    return rows


def compare_trials(study: StudyScores, first: int, second: int, *, seed: int = 0) -> Paired:
    """Configuration `first` minus configuration `second` on the same images, run luck included."""
    run_variance = study.run_variance()
    return paired_difference(
        study.joint[first],
        study.joint[second],
        run_variance=float(run_variance[first] + run_variance[second]),
        run_df=study.run_luck.df,
        seed=seed,
    )


def tied_with_best(study: StudyScores, *, seed: int = 0) -> tuple[int, ...]:
    """The trials among which the truly best one is, 95 % of the time or more; best mean first.

    Subset selection (Gupta, Technometrics 7, 1965): a trial is out if it lies further behind the best mean than the
    luckiest of equal trials would lead it in 95 of 100 studies. The noise is drawn from what was seen: the images'
    covariance between trials, and run luck of a size that is itself uncertain. Trials hopelessly behind are left
    aside first: collapsed ones have so much noise that, taken for equals, they would tie everything.
    """
    rng = np.random.default_rng(seed)
    luck, means, run_variance = study.run_luck, study.joint.mean(axis=1), study.run_variance()
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
    size = np.sqrt(luck.df / rng.chisquare(luck.df, (N_DRAWS, 1)))
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
    """What the chosen configuration is worth, with the price of the choice taken off."""

    trial: int
    naive: float
    """Its first fits' mean: too good."""
    mean: float
    low: float
    high: float
    """Ends of the 95 % interval of its true mean over such images and over runs."""
    image_variance: float
    """Of the estimate, because the images are a sample."""
    run_variance: float
    """Of the estimate, because every fit was luckier or less lucky than another seed would be."""
    choice_variance: float
    """Of the estimate, because the choices came to several configurations, and the winner is one of them."""
    method: Method
    """`confirmed` and `folds` take image luck and run luck off; `images`, with one fold and no second fits, only the
    first: plain BBC-CV; `single`: there was no choice."""

    @property
    def interval(self) -> Interval:
        """The estimate with its interval alone."""
        return Interval(self.mean, self.low, self.high)


def corrected_estimate(study: StudyScores, *, n_bags: int = N_BAGS, seed: int = 0) -> Corrected:
    """The winner's mean, corrected for having been chosen, with a 95 % interval.

    Every image gets the mean score by those networks that choices which did not know it came to; the estimate is the
    mean over images. Half of the choices with second fits go by the first fits alone, which underrates a choice by
    both, and half by both, which the image luck of having been confirmed overrates. benchmarks/study_statistics.py
    shows what it is good for; without second fits the interval is too narrow where run luck is large.
    """
    method, weights = _weights(study, n_bags, seed)
    rows = np.concatenate([study.scores, study.second_fits])
    total = weights.sum(axis=0)
    seen = total > 0  # With few images and few bags, one may never be out of a bag.
    shares = weights[:, seen] / total[seen]
    scores = (shares * rows[:, seen]).sum(axis=0)
    n, luck = len(scores), study.run_luck
    # Run luck is one number for each row and fold; it enters with the row's share of the fold's images.
    by_fold = np.array([shares[:, study.fold_of[seen] == fold].sum(axis=1) / n for fold in np.unique(study.fold_of)])
    run_variance = luck.variance * float((by_fold**2).sum())
    trial = chosen(study)
    choice_variance = _choice_variance(study, by_fold.sum(axis=0), trial)
    image_variance = float(scores.var(ddof=1)) / n if n > 1 else 0.0
    mean = float(scores.mean())
    half = _half_width(image_variance + choice_variance, n - 1, run_variance, luck.df)
    interval = Interval.of_scores(mean, mean - half, mean + half)
    return Corrected(
        trial=trial,
        naive=float(study.scores[trial].mean()),
        mean=mean,
        low=interval.low,
        high=interval.high,
        image_variance=image_variance,
        run_variance=run_variance,
        choice_variance=choice_variance,
        method=method,
    )


def predict_test_mean(study: StudyScores, corrected: Corrected, *, n_test: int, n_runs: int = 1) -> Interval:
    """What the retrained winner will score on `n_test` new images, with a 95 % prediction interval.

    It holds the uncertainty of the estimate, the luck of the draw of the test images, and the run luck of `n_runs`
    retrained networks whose scores are averaged. It takes the test images to be drawn like the pool, and a network
    trained on the whole pool to be as good as those that lacked a fold.
    """
    images = (
        corrected.image_variance
        + corrected.choice_variance
        + float(study.scores[corrected.trial].var(ddof=1)) / n_test
    )
    ahead = study.run_luck_ahead
    runs = corrected.run_variance / study.run_luck.variance * ahead.variance + ahead.variance / n_runs
    half = _half_width(images, study.n_images - 1, runs, ahead.df)
    return Interval.of_scores(corrected.mean, corrected.mean - half, corrected.mean + half)


def explain_test_mean(predicted: Interval, result: float) -> str:
    """One sentence on a test result beside what was predicted."""
    predicted_range = f"the predicted [{predicted.low:.4f}, {predicted.high:.4f}]"
    if predicted.low <= result <= predicted.high:
        return f"the test mean {result:.4f} lies within {predicted_range}: the search kept its promise"
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
        f"the test mean {result:.4f} lies {side} {predicted_range}, as chance does in 1 of 40 studies; else {causes}"
    )


def _weights(study: StudyScores, n_bags: int, seed: int) -> tuple[Method, Floats]:
    """How often each row (first fits, then second fits) scores each image, (rows, images)."""
    weights = np.zeros((study.n_trials + len(study.confirmed), study.n_images))
    if study.n_trials == 1:
        return "single", weights + 1
    if study.confirmed:
        _repeat_choice_with_second_fits(study, weights, n_bags, seed)
        return "confirmed", weights
    if len(study.folds) > 1:
        _repeat_choice_without_a_fold(study, weights, n_bags, seed)
        return "folds", weights
    centred = _centred(study.scores)
    for bags in _bags(study.n_images, seed, n_bags):
        picks = (bags @ centred.T).argmax(axis=1)
        weights += _one_hot(picks, study.n_trials).T @ (bags == 0)
    return "images", weights


def _repeat_choice_with_second_fits(study: StudyScores, weights: Floats, n_bags: int, seed: int) -> None:
    n_trials, confirmed = study.n_trials, list(study.confirmed)
    row_of = np.full(n_trials, -1)
    row_of[confirmed] = np.arange(len(confirmed))
    centred = _centred(study.scores)
    second = np.asarray(study.second_fits - study.scores.mean(axis=0), np.float32)
    for bags in _bags(study.n_images, seed, n_bags):
        out = (bags == 0).astype(np.float32)
        first_in = bags @ centred.T / study.n_images
        picks = first_in.argmax(axis=1)
        # A bag whose best trial was not confirmed is scored by that trial's first fit: leaving such bags out would
        # favour the confirmed, which the out-of-bag images helped to become so.
        outside = row_of[picks] < 0
        weights[:n_trials] += _one_hot(picks[outside], n_trials).T @ out[outside]
        bags, out, first_in, picks = bags[~outside], out[~outside], first_in[~outside], picks[~outside]
        sums = [bags[:, images] @ second[:, images].T for images in study.folds]
        sizes = [bags[:, images].sum(axis=1, keepdims=True) for images in study.folds]
        by_first = _one_hot(row_of[picks], len(confirmed))
        for fold, images in enumerate(study.folds):
            votes = first_in[:, confirmed] + (sum(sums) - sums[fold]) / np.maximum(sum(sizes) - sizes[fold], 1)
            by_both = _one_hot(votes.argmax(axis=1), len(confirmed))
            weights[n_trials:, images] += (by_first + by_both).T @ out[:, images] / 2


def _repeat_choice_without_a_fold(study: StudyScores, weights: Floats, n_bags: int, seed: int) -> None:
    centred = _centred(study.scores)
    for bags in _bags(study.n_images, seed, n_bags):
        sums = [bags[:, images] @ centred[:, images].T for images in study.folds]
        for fold, images in enumerate(study.folds):
            picks = (sum(sums) - sums[fold]).argmax(axis=1)
            weights[:, images] += np.bincount(picks, minlength=study.n_trials)[:, None]


def _choice_variance(study: StudyScores, shares: Floats, winner: int) -> float:
    """Mean squared distance from the winner of the trials that choices came to, given each row's share of them.

    At most what run luck makes of the winner's mean: the rest of the distance is image luck, which bags take off.
    """
    by_trial = shares[: study.n_trials].copy()
    by_trial[list(study.confirmed)] += shares[study.n_trials :]
    means = study.joint.mean(axis=1)
    return min(float(by_trial @ (means - means[winner]) ** 2), float(study.run_variance()[winner]))


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


def _one_hot(picks: NDArray[np.int64], n: int) -> NDArray[np.float32]:
    return np.eye(n, dtype=np.float32)[picks]


def _half_width(image_variance: float, image_df: float, run_variance: float, run_df: float) -> float:
    """Half of a 95 % interval from two variances, with Satterthwaite's degrees of freedom."""
    total = image_variance + run_variance
    if total == 0:
        return 0.0
    return _t(total**2 / (image_variance**2 / image_df + run_variance**2 / run_df)) * math.sqrt(total)


def _cut(mean: float, low: float, high: float, *, least: float) -> tuple[float, float]:
    """The ends of an interval, cut to [least, 1]; the mean stays inside, also where it was rounded beyond."""
    return min(mean, max(low, least)), max(mean, min(high, 1.0))


def _t(df: float) -> float:
    return float(stdtrit(df, _TAILS[1]))
