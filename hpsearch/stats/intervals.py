"""Compute intervals of means and paired differences, by bootstrap over images or Student's t over folds.

Scores and their means lie in [0, 1], and differences lie in [-1, 1]. Intervals are clipped to these ranges. The true
value never lies in the clipped part, so the coverage does not change (Newcombe, Statistics in Medicine 17, 1998;
Mandelkern, Statistical Science 17, 2002).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from hpsearch.errors import StudyError

Floats = NDArray[np.float64]

LEVEL = 0.95
"""Nominal coverage of every interval."""
N_BAGS = 2000
"""Number of bootstrap samples of the images."""
_TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
_BLOCK = 2**23
"""Number of entries in one block of bootstrap counts (32 MiB)."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """Mean difference on the same images, its 95 % interval, and the two-sided p-value of no difference."""

    difference: float
    low: float
    high: float
    p: float


def bootstrap_mean(scores: Floats, *, run_variance: float = 0.0, run_df: float = math.inf) -> Interval:
    """Return the mean of scores (n,) with its 95 % interval: bootstrap over images, plus the run-to-run variance.

    `run_variance` is the run-to-run variance of this mean, and `run_df` are the degrees of freedom of its estimate.
    """
    low, high = np.quantile(_draws(scores, run_variance, run_df), _TAILS).tolist()
    mean = float(np.mean(scores))
    return Interval(mean, *cut(mean, low, high))


def paired_difference(
    first: Floats, second: Floats, *, run_variance: float = 0.0, run_df: float = math.inf
) -> Paired:
    """Return the mean of `first - second` with its bootstrap interval.

    `first` and `second` contain scores of the same images, (n,). Without a run-to-run variance, the result applies to
    these two networks. With one, it applies to the two configurations. p is twice the fraction of bootstrap means
    that are 0 or have the opposite sign. One such mean is added to them, so that p is never 0.
    """
    difference = first - second
    draws = _draws(difference, run_variance, run_df)
    low, high = np.quantile(draws, _TAILS).tolist()
    beyond = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    p = min(1.0, 2 * (beyond + 1) / (len(draws) + 1))
    mean = float(difference.mean())
    return Paired(mean, *cut(mean, low, high, least=-1.0), p)


def corrected_t(fold_means: Floats) -> Interval | None:
    """Return the mean of k fold means with the corrected resampled t interval; None for one fold.

    The training sets of the folds overlap, so the fold means are not independent. The variance of the fold means is
    therefore multiplied by 1/k + 1/(k - 1) instead of 1/k (Nadeau and Bengio, Machine Learning 52, 2003). The
    interval is wide if there are few folds.
    """
    k = len(fold_means)
    if k < 2:
        return None
    mean = float(fold_means.mean())
    half = _t(k - 1) * math.sqrt((1 / k + 1 / (k - 1)) * float(fold_means.var(ddof=1)))
    return Interval(mean, *cut(mean, mean - half, mean + half))


def bootstrap_counts(n_images: int) -> Iterator[NDArray[np.float32]]:
    """Yield blocks of bootstrap counts: how often each image occurs in each sample, (samples, n_images)."""
    size = max(1, _BLOCK // n_images)
    for start in range(0, N_BAGS, size):
        yield _count_block(n_images, start, min(size, N_BAGS - start))


def satterthwaite(image_variance: float, image_df: float, run_variance: float, run_df: float) -> float:
    """Return the degrees of freedom of the sum of two estimated variances.

    The formula is that of Satterthwaite, Biometrics Bulletin 2, 1946.
    """
    total = image_variance + run_variance
    return total**2 / (image_variance**2 / image_df + run_variance**2 / run_df) if total > 0 else math.inf


def half_width(image_variance: float, image_df: float, run_variance: float, run_df: float) -> float:
    """Return half the width of the 95 % interval of an estimate whose variance is the sum of the two variances."""
    df = satterthwaite(image_variance, image_df, run_variance, run_df)
    return _t(df) * math.sqrt(image_variance + run_variance)


def cut(mean: float, low: float, high: float, *, least: float = 0.0) -> tuple[float, float]:
    """Return the ends of an interval, clipped to [least, 1]: 0 for a mean of scores, -1 for a mean difference.

    The interval always contains the mean, regardless of rounding errors.
    """
    return min(mean, max(low, least)), max(mean, min(high, 1.0))


@lru_cache(maxsize=1)
def _count_block(n_images: int, start: int, size: int) -> NDArray[np.float32]:
    # Cached because all statistics of a study use the same bootstrap samples.
    drawn = np.random.default_rng([0, start]).integers(0, n_images, (size, n_images))
    drawn += n_images * np.arange(size)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=size * n_images).reshape(size, n_images).astype(np.float32)
    counts.flags.writeable = False
    return counts


def _draws(scores: Floats, run_variance: float, run_df: float) -> Floats:
    """Return the means of bootstrap samples of scores (n,), each shifted by a random run-to-run error."""
    n = len(scores)
    if n < 2:
        raise StudyError(f"an interval needs at least 2 images, got {n}")
    mean = float(np.mean(scores))
    centred = (scores - mean).astype(np.float32)
    draws = np.concatenate([counts @ centred for counts in bootstrap_counts(n)]).astype(np.float64) / n
    # The variance about the sample's own mean is too small by the factor (n - 1) / n.
    draws *= math.sqrt(n / (n - 1))
    if run_variance > 0:
        rng = np.random.default_rng([0, 1])
        shift = rng.standard_normal(len(draws)) if math.isinf(run_df) else rng.standard_t(run_df, len(draws))
        draws += math.sqrt(run_variance) * shift
    return mean + draws


def _t(df: float) -> float:
    return float(stdtrit(df, _TAILS[1]))
