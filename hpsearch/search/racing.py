"""Racing: decide from the recorded scores whether a trial can still win.

The rule asks one question: is it plausible that the candidate is better than the incumbent, the best *complete*
trial, by at least 0.003? If not, at a one-sided p-value below 0.1, the candidate is pruned. A tie is therefore pruned
too as soon as it is known to be one: near the optimum most suggestions tie, and spending folds on them gains nothing.
On generated studies, 1.6 in 100 trials are pruned although they are better by 0.003. y[c, i] is the score of image i
by the fold model of trial c that had not seen it.

**Comparison.** Images differ far more than configurations do, and folds vary from run to run. The candidate is
therefore compared, on the same images, with the expected score of a trial that is as good as the incumbent:

    u[i] = value of the incumbent + mean over near trials j of (y[j, i] - value of j)
    d[i] = u[i] - y[c, i]

The near trials are the J complete ones within 0.05 of the incumbent, including the incumbent. With J = 1, u is the
incumbent's scores and d the paired difference; each further trial adds information on how hard image i and its fold
are.

**Standard error of mean d.** With k of K folds evaluated, and in them n of N images:

    SE^2 = g^2 (1/n + 1/N + (1/n - 1/N) / J) + s^2 (1/k + 1/K + (1/k - 1/K) / J),      g^2 = var(d) J / (J + 1)

The first term is the images' part: g is the standard deviation of a trial's score of an image after trial and image
effects. In the second, s is the run-to-run standard deviation of a fold's mean (initialisation, order of batches),
which no number of images averages out. In both, the first summand is the error of the candidate, the second that of
the incumbent over all folds, the last that of the near trials in the evaluated folds. With J = 1 this is the paired
test's var(d) / n + 2 s^2 / k.

**Estimate of s** (`stats.run_variance`). It is the remainder of the near trials' fold means after trial and fold
effects, less the images' part. The first trials are too few for an estimate, so it starts from a guess of 0.006 with
the weight of 4 degrees of freedom (nine in ten such guesses lie between 0.004 and 0.014). Only near trials count: the
run-to-run spread of a collapsed configuration is many times larger. (mean d + 0.003) / SE is compared with Student's
t with Satterthwaite's degrees of freedom, so that an uncertain s makes the rule cautious.

**Inside the first fold** the score after the last epoch is unknown, but its possible rise is limited. With w the
share of the schedule's summed learning rate that is spent, the candidate gets the better of two best-case curves from
its best epoch so far (scores fluctuate while the learning rate is high):

- *Slow.* A curve that rises ever less per unit of learning rate ends at y / w at most. If near trials had reached an
  even smaller share of their final scores at this epoch, the smallest such share replaces w.
- *Late.* Some curves are flat first and then jump. At best the candidate rises from now on as the fastest near trial
  did from the start, with the learning rate that is left.

Then the same test is made as if the fold were finished, at 3 % of the p-value, because it is made after every epoch
and the limits are heuristics. A trial is thus never pruned for being slow, only for being too late.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr

from hpsearch.data.folds import Folds
from hpsearch.stats.best import rank
from hpsearch.stats.intervals import satterthwaite
from hpsearch.stats.run_variance import NEAR, RunVariance, run_variance
from hpsearch.store.trials import PruneDecision

ALPHA = 0.1
"""A trial is pruned at a one-sided p-value below this."""
MATTERS = 0.003
"""Smallest improvement over the incumbent that is worth the folds."""
INSIDE = 0.03
"""Share of `ALPHA` that applies inside the first fold."""

Scores = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class TrialScores:
    """Scores of a trial so far. Two are equal only if they are the same object."""

    number: int
    scores: Mapping[int, NDArray[np.float32]]
    """Fold to the per-image scores after every epoch so far, (epochs >= 1, held-out images); the latest fold last."""
    n_epochs: int
    """Epochs of a whole fit."""
    schedule: Literal["cosine", "constant"] = "cosine"

    @cached_property
    def curves(self) -> dict[int, Scores]:
        """Fold to the mean score after every epoch so far, (epochs,)."""
        return {fold: scores.mean(axis=1, dtype=np.float64) for fold, scores in self.scores.items()}

    @property
    def latest(self) -> int:
        """The fold of the latest epoch."""
        return list(self.scores)[-1]

    @cached_property
    def finished(self) -> tuple[int, ...]:
        """Folds that were trained to the end, ascending."""
        return tuple(sorted(fold for fold, scores in self.scores.items() if len(scores) >= self.n_epochs))

    @cached_property
    def value(self) -> float:
        """Mean over all images of the finished folds after the last epoch."""
        return float(np.concatenate([self.scores[fold][-1] for fold in self.finished]).mean(dtype=np.float64))

    @property
    def place(self) -> str:
        """The latest epoch in words: `in fold 1 at epoch 3`, or `after fold 1` if it was the last one."""
        fold, epoch = self.latest + 1, len(self.scores[self.latest])
        return f"in fold {fold} at epoch {epoch}" if epoch < self.n_epochs else f"after fold {fold}"

    def is_full(self, n_folds: int) -> bool:
        return len(self.finished) == n_folds

    def spent(self, epochs: int) -> float:
        """Return the share of the schedule's summed learning rate that is spent after `epochs` epochs."""
        t = epochs / self.n_epochs
        return t + math.sin(math.pi * t) / math.pi if self.schedule == "cosine" else t


class Race:
    """The racing rule as a pruner: a pure function of its arguments."""

    is_sequential = True
    takes_any_fold = True

    def __init__(self, alpha: float = ALPHA) -> None:
        self.alpha = alpha

    def judge(self, candidate: TrialScores, others: Sequence[TrialScores], folds: Folds) -> PruneDecision | None:
        """Decide whether the candidate can still win: after every epoch of its first fold, and after every fold.

        Only the complete ones of the other trials count. None if there is no decision to make: no trial is complete
        yet, the candidate is, or it is inside a later fold.
        """
        is_inside = len(candidate.scores[candidate.latest]) < candidate.n_epochs
        found = None if is_inside and candidate.finished else compare(candidate, others, folds.k)
        if found is None:
            return None
        where = f"{candidate.place}, best-case curve" if is_inside else candidate.place
        reason = f"{where}: {found.d:.4f} ± {found.se:.4f} below trial {found.against}, p = {found.p:.2g}"
        drop = found.p is not None and found.p < self.alpha * (INSIDE if is_inside else 1)
        return dataclasses.replace(found, drop=drop, reason=reason)


def decide(
    drop: bool, candidate: TrialScores, others: Sequence[TrialScores], n_folds: int, reason: str
) -> PruneDecision:
    """Record a decision that another pruner or the user made, with the comparison with the incumbent."""
    if (found := compare(candidate, others, n_folds)) is not None:
        return dataclasses.replace(found, drop=drop, reason=reason)
    so_far = np.concatenate([scores[-1] for scores in candidate.scores.values()]).mean(dtype=np.float64)
    fold = candidate.latest
    return PruneDecision(drop, float(so_far), fold, len(candidate.scores[fold]), reason)


def compare(candidate: TrialScores, others: Sequence[TrialScores], n_folds: int) -> PruneDecision | None:
    """Test the candidate against the complete trials among the others; whether it is pruned is left open.

    The test uses the candidate's finished folds, and in its first fold the possible continuations. None if there is
    nothing to test: no complete trial, a complete candidate, fewer than two images, or a continuation without limit.
    """
    complete = sorted((trial for trial in others if trial.is_full(n_folds)), key=lambda trial: trial.number)
    if not complete or not candidate.scores or candidate.is_full(n_folds):
        return None
    reference = _reference_scores(tuple(complete), n_folds)
    if candidate.finished:
        seen = candidate.finished
        at_best = typically = np.concatenate([candidate.scores[fold][-1] for fold in seen]).astype(float)
    else:
        seen = (min(candidate.scores),)
        at_best, typically = _continuations(candidate, seen[0], reference)
    expected = np.concatenate([reference.scores[fold] for fold in seen])
    d = expected - at_best
    if d.size < 2 or not np.isfinite(d).all():
        return None
    n_near, s = len(reference.near), reference.runs.sd
    g2 = float(d.var(ddof=1)) * n_near / (n_near + 1)
    images = g2 * _variance_factor(d.size, sum(scores.size for scores in reference.scores.values()), n_near)
    runs = s**2 * _variance_factor(len(seen), n_folds, n_near)
    se = math.sqrt(images + runs)
    df = satterthwaite(images, d.size - 1, runs, reference.runs.df)
    estimate = reference.incumbent.value - float((expected - typically).mean())
    return PruneDecision(
        drop=False,
        # A trial that collapsed on an easy fold would get an estimate below 0, which no score can be.
        estimate=min(max(estimate, 0.0), 1.0),
        fold=candidate.latest,
        epoch=len(candidate.scores[candidate.latest]),
        reason="",
        d=float(d.mean()),
        se=se,
        s=s,
        p=float(stdtr(df, -(d.mean() + MATTERS) / se)),
        against=reference.incumbent.number,
    )


def _variance_factor(seen: int, whole: int, n_near: int) -> float:
    """Return the variance of mean d, as a multiple of that of one fold or image, with `seen` of `whole` evaluated."""
    return 1 / seen + 1 / whole + (1 / seen - 1 / whole) / n_near


class ReferenceScores(NamedTuple):
    """Scores that a candidate is compared with, from the complete trials near the incumbent."""

    incumbent: TrialScores
    near: tuple[TrialScores, ...]
    scores: dict[int, Scores]
    """Fold to the expected score of each of its images by a trial as good as the incumbent."""
    runs: RunVariance


@lru_cache(maxsize=4)
def _reference_scores(complete: tuple[TrialScores, ...], n_folds: int) -> ReferenceScores:
    # Cached because it is needed after every epoch, and changes only with another complete trial.
    by_number = {trial.number: trial for trial in complete}
    incumbent = by_number[rank({number: trial.value for number, trial in by_number.items()})[0]]
    near = tuple(trial for trial in complete if trial.value >= incumbent.value - NEAR)
    finals = [np.stack([trial.scores[fold][-1] for trial in near]).astype(float) for fold in range(n_folds)]
    values = np.array([[trial.value] for trial in near])
    scores = {fold: incumbent.value + (final - values).mean(axis=0) for fold, final in enumerate(finals)}
    return ReferenceScores(incumbent, near, scores, run_variance(finals))


def _continuations(candidate: TrialScores, fold: int, reference: ReferenceScores) -> tuple[Scores, Scores]:
    """Return the fold's image scores after the last epoch: best case and typical case, (n,) each.

    The best case is infinite if some near trial still scored 0 at this epoch: no trial is too late yet.
    """
    scores = candidate.scores[fold]
    now = scores[np.argmax(candidate.curves[fold])].astype(float)
    part = len(scores) / candidate.n_epochs
    spent = candidate.spent(len(scores))
    # Trials may differ in their number of epochs; rounding down favours the candidate.
    then = _shares_of_final(reference.near, lambda trial: int(part * trial.n_epochs + 1e-9))
    slowest = min([spent, *then])
    if slowest <= 0:
        return np.full_like(now, np.inf), now
    fastest = max(_shares_of_final(reference.near, lambda trial: _epochs_to_spend(trial, 1 - spent)))
    slow, late = now / slowest, reference.scores[fold] * fastest
    return max(slow, late, key=np.mean), now / (float(np.median(then)) if then else spent)


def _shares_of_final(near: Sequence[TrialScores], epochs: Callable[[TrialScores], int]) -> list[float]:
    """Return the share of its final score that each near trial reached within `epochs(trial)` epochs, over its folds.

    Trials for which that is no epoch are left out.
    """
    shares = []
    for trial in near:
        if n_epochs := epochs(trial):
            finals = [curve[-1] for curve in trial.curves.values()]
            bests = [curve[:n_epochs].max() for curve in trial.curves.values()]
            shares.append(float(np.sum(bests) / np.sum(finals)) if np.sum(finals) > 0 else 1.0)
    return shares


def _epochs_to_spend(trial: TrialScores, spent: float) -> int:
    """Return the epochs until this share of the learning rate is spent, rounded up; at least 1."""
    return next(epoch for epoch in range(1, trial.n_epochs + 1) if trial.spent(epoch) >= spent - 1e-9)
