"""Prune trials by racing: decide from the recorded scores whether a trial can still win.

The *candidate* is the trial to be judged. The *incumbent* is the best trial so far that has finished all folds. The
rule tests the hypothesis that the candidate is better than the incumbent by at least 0.003. If the one-sided p-value
p of this hypothesis is below 0.1, the candidate is pruned. A candidate that turns out to be merely as good as the
incumbent is therefore pruned too: near the optimum most trials tie, and evaluating them on further folds would gain
nothing. In simulated studies, 1.7 % of all trials were pruned although they were better than the incumbent by 0.003
or more.

**Terms.** The score of trial c on image i, y[c, i], is that of the network that did not train on the image, because
its fold held the image out. The value of a trial is its mean score over all images. The *near trials* are the
complete trials whose value is at most 0.05 below that of the incumbent. There are J of them, including the incumbent.

**Difference d.** Scores differ far more between images than between configurations. The candidate is therefore
compared on the same images. For each image i that it has been evaluated on, d[i] is the score u[i] that a trial as
good as the incumbent is expected to get, minus the candidate's score. Mean d is the estimate of how much worse the
candidate is:

    u[i] = value of the incumbent + mean over near trials j of (y[j, i] - value of j)
    d[i] = u[i] - y[c, i]

If the incumbent is the only near trial (J = 1), u contains its scores, and d is the paired difference of two trials.
Each further near trial adds information about how difficult image i and its fold are.

**Standard error SE of mean d.** If the candidate has been evaluated on k of K folds, with n of N images:

    SE^2 = g^2 (1/n + 1/N + (1/n - 1/N) / J) + s^2 (1/k + 1/K + (1/k - 1/K) / J),      g^2 = var(d) J / (J + 1)

The first term is the variance due to images. g is the standard deviation of a trial's image scores that remains after
the mean of the trial and the difficulty of the image are removed. The second term is the variance due to runs. s is
the standard deviation of a fold's mean score between runs of the same configuration with different seeds (initial
weights, order of batches). More images do not reduce it. Within the brackets of both terms, the first summand is the
error of the candidate, the second is the error of the incumbent's value over all folds, and the last is the error of
the near trials on the evaluated folds. With J = 1, SE^2 is the variance of a paired test, var(d) / n + 2 s^2 / k.

**p.** (mean d + 0.003) / SE is compared with Student's t distribution. Satterthwaite's formula gives the degrees of
freedom, so an uncertain s makes the rule more cautious.

**Estimate of s** (`stats.run_variance`). s^2 is the variance of the near trials' fold means that remains after the
means of trials and folds are removed, minus the part due to images. Only near trials are used, because the scores of
a collapsed configuration vary many times more between runs. The first trials are too few for an estimate. s therefore
starts from a prior guess of 0.006 that counts as 4 degrees of freedom (by this prior, s lies between 0.004 and 0.014
with a probability of 90 %).

**Within the first fold**, the score after the last epoch is unknown, but an upper limit can be estimated. Let w be
the fraction of the learning rate, summed over all epochs of the schedule, that has been used so far. Let y be the
candidate's score after its best epoch so far (scores fluctuate while the learning rate is high). The candidate is
credited with the better of two best-case curves:

- *Slow.* If each unit of learning rate raises the score by no more than the one before, the score ends at y / w at
  most. If a near trial had reached an even smaller fraction of its final score at this epoch, the smallest such
  fraction replaces w.
- *Late.* Some curves are flat at first and then jump. In the best case, the candidate uses the learning rate that is
  left to rise as the fastest near trial did from its start.

The same test is then applied as if the fold had ended at this score. The threshold for p is 3 % of 0.1, because the
test is repeated after every epoch and the limits are heuristics. The candidate is thus pruned only if neither curve
lets it win.
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
"""One-sided p-value below which a trial is pruned."""
MATTERS = 0.003
"""Smallest improvement over the incumbent that justifies fitting further folds."""
INSIDE = 0.03
"""Within the first fold, the threshold for p is this fraction of the usual threshold."""

Scores = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class TrialScores:
    """Scores of a trial so far. Instances are compared by identity, so that they can be used as cache keys."""

    number: int
    scores: Mapping[int, NDArray[np.float32]]
    """Maps each fold to its per-image scores after every epoch so far, (epochs >= 1, held-out images). The fold of
    the latest epoch comes last."""
    n_epochs: int
    """Number of epochs of a finished fit."""
    schedule: Literal["cosine", "constant"] = "cosine"

    @cached_property
    def curves(self) -> dict[int, Scores]:
        """Maps each fold to its mean score after every epoch so far, (epochs,)."""
        return {fold: scores.mean(axis=1, dtype=np.float64) for fold, scores in self.scores.items()}

    @property
    def latest(self) -> int:
        """Fold of the latest epoch."""
        return list(self.scores)[-1]

    @cached_property
    def finished(self) -> tuple[int, ...]:
        """Folds, in ascending order, whose fit has reached its last epoch."""
        return tuple(sorted(fold for fold, scores in self.scores.items() if len(scores) >= self.n_epochs))

    @cached_property
    def value(self) -> float:
        """Mean score after the last epoch, over all images of the finished folds."""
        return float(np.concatenate([self.scores[fold][-1] for fold in self.finished]).mean(dtype=np.float64))

    @property
    def place(self) -> str:
        """Description of the latest epoch: `in fold 1 at epoch 3`, or `after fold 1` if it was that fold's last."""
        fold, epoch = self.latest + 1, len(self.scores[self.latest])
        return f"in fold {fold} at epoch {epoch}" if epoch < self.n_epochs else f"after fold {fold}"

    def is_full(self, n_folds: int) -> bool:
        return len(self.finished) == n_folds

    def spent(self, epochs: int) -> float:
        """Return the fraction of the schedule's summed learning rate that the first `epochs` epochs use."""
        t = epochs / self.n_epochs
        return t + math.sin(math.pi * t) / math.pi if self.schedule == "cosine" else t


class Race:
    """Pruner that applies the racing rule. Its decisions depend only on its arguments."""

    is_sequential = True
    takes_any_fold = True

    def __init__(self, alpha: float = ALPHA) -> None:
        self.alpha = alpha

    def judge(self, candidate: TrialScores, others: Sequence[TrialScores], folds: Folds) -> PruneDecision | None:
        """Decide whether the candidate can still win.

        There is a decision after every epoch of the candidate's first fold, and after every later fold. Only the
        complete trials among `others` are used. Returns None if there is no decision to make: no trial is complete
        yet, the candidate itself is complete, or it is in the middle of a later fold.
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
    """Return a decision that another pruner or the user made, completed by the comparison with the incumbent.

    `drop` says whether to prune the candidate, and `reason` explains the decision. If no comparison is possible, the
    decision contains the mean score so far as the estimate.
    """
    if (found := compare(candidate, others, n_folds)) is not None:
        return dataclasses.replace(found, drop=drop, reason=reason)
    so_far = np.concatenate([scores[-1] for scores in candidate.scores.values()]).mean(dtype=np.float64)
    fold = candidate.latest
    return PruneDecision(drop, float(so_far), fold, len(candidate.scores[fold]), reason)


def compare(candidate: TrialScores, others: Sequence[TrialScores], n_folds: int) -> PruneDecision | None:
    """Test the candidate against the complete trials among `others`, without deciding whether it is pruned.

    The test uses the candidate's finished folds. Before its first fold is finished, the test uses the predicted end
    of that fold. Returns None if no test is possible: no trial is complete, the candidate is complete or has no
    scores, there are fewer than two images, or the best case has no upper limit.
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
        # Clip to valid scores, because a trial that collapsed on an easy fold would get an estimate below 0.
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
    """Return the bracketed factor of g^2 or s^2 in SE^2 if `seen` of `whole` images or folds are evaluated."""
    return 1 / seen + 1 / whole + (1 / seen - 1 / whole) / n_near


class ReferenceScores(NamedTuple):
    """Expected scores that a candidate is compared with, estimated from the near trials."""

    incumbent: TrialScores
    near: tuple[TrialScores, ...]
    scores: dict[int, Scores]
    """For each fold, the scores that a trial as good as the incumbent is expected to get on that fold's images."""
    runs: RunVariance


@lru_cache(maxsize=4)
def _reference_scores(complete: tuple[TrialScores, ...], n_folds: int) -> ReferenceScores:
    # Cached because it is needed after every epoch and changes only when another trial becomes complete.
    by_number = {trial.number: trial for trial in complete}
    incumbent = by_number[rank({number: trial.value for number, trial in by_number.items()})[0]]
    near = tuple(trial for trial in complete if trial.value >= incumbent.value - NEAR)
    finals = [np.stack([trial.scores[fold][-1] for trial in near]).astype(float) for fold in range(n_folds)]
    values = np.array([[trial.value] for trial in near])
    scores = {fold: incumbent.value + (final - values).mean(axis=0) for fold, final in enumerate(finals)}
    return ReferenceScores(incumbent, near, scores, run_variance(finals))


def _continuations(candidate: TrialScores, fold: int, reference: ReferenceScores) -> tuple[Scores, Scores]:
    """Predict the image scores of an unfinished fold after its last epoch: best case and typical case, (n,) each.

    The best case is infinite if a near trial still scored 0 at this epoch, because it is then too early to exclude
    any final score.
    """
    scores = candidate.scores[fold]
    now = scores[np.argmax(candidate.curves[fold])].astype(float)
    part = len(scores) / candidate.n_epochs
    spent = candidate.spent(len(scores))
    # Trials may differ in their number of epochs. Rounding down makes the shares smaller, in the candidate's favour.
    then = _shares_of_final(reference.near, lambda trial: int(part * trial.n_epochs + 1e-9))
    slowest = min([spent, *then])
    if slowest <= 0:
        return np.full_like(now, np.inf), now
    fastest = max(_shares_of_final(reference.near, lambda trial: _epochs_to_spend(trial, 1 - spent)))
    slow, late = now / slowest, reference.scores[fold] * fastest
    return max(slow, late, key=np.mean), now / (float(np.median(then)) if then else spent)


def _shares_of_final(near: Sequence[TrialScores], epochs: Callable[[TrialScores], int]) -> list[float]:
    """Return, for each near trial, the fraction of its final score that it reached in its first epochs.

    `epochs` returns how many first epochs of a trial to consider. Trials for which it returns 0 are left out. The
    score of a fold is the best score in these epochs, and scores are summed over the trial's folds.
    """
    shares = []
    for trial in near:
        if n_epochs := epochs(trial):
            finals = [curve[-1] for curve in trial.curves.values()]
            bests = [curve[:n_epochs].max() for curve in trial.curves.values()]
            shares.append(float(np.sum(bests) / np.sum(finals)) if np.sum(finals) > 0 else 1.0)
    return shares


def _epochs_to_spend(trial: TrialScores, spent: float) -> int:
    """Return the smallest number of epochs, at least 1, that use the fraction `spent` of the summed learning rate."""
    return next(epoch for epoch in range(1, trial.n_epochs + 1) if trial.spent(epoch) >= spent - 1e-9)
