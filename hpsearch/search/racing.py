"""Decides from the scores on record whether a trial can still win: the racing rule.

One question is asked: is it plausible that the candidate is better than the incumbent, the best *full* trial, by as
much as matters, 0.003? If not, at a one-sided p below 0.1, the candidate is dropped. So a tie ends too, as soon as it
is known to be one: where the search draws near its optimum, most suggestions tie, and folds spent on them teach
nothing. Few are better than the incumbent, most of them by little: on generated studies 1.6 in 100 trials are dropped
although they are better by 0.003. y[c, i] is the score of image i from the fold model of trial c that had not seen
it.

**What is compared.** Images differ far more than configurations do, and folds have luck of their own. So the
candidate is compared, on the very images it was scored on, with what a trial as good as the incumbent would score:

    u[i] = value of the incumbent + mean over near trials j of (y[j, i] - value of j)
    d[i] = u[i] - y[c, i]

where the near trials are the J full ones within 0.05 of the incumbent, itself included. With J = 1, u is just the
incumbent's scores and d the paired difference; each further trial tells more about how hard image i and its fold are.

**How uncertain mean d is.** With k of K folds and in them n of N images seen:

    SE^2 = g^2 (1/n + 1/N + (1/n - 1/N) / J) + s^2 (1/k + 1/K + (1/k - 1/K) / J),      g^2 = var(d) J / (J + 1)

The first term is the images' part: g is how far a trial's score of an image strays from what trial and image explain.
In the second, s is the standard deviation of a fold's mean when the same fit is run again (initialisation, order of
batches), which no number of images averages away. In both, the first summand is the candidate's own luck, the second
the incumbent's over all folds, the last that of the near trials in the folds seen. With J = 1 this is the paired
test's var(d) / n + 2 s^2 / k.

**How s is known.** It is what remains of the near trials' fold means after trial and fold effects, less the images'
part. At first there are too few trials to tell, so the estimate starts from a guess of 0.006 that weighs as much as 4
degrees of freedom (nine in ten such guesses lie between 0.004 and 0.014). Only near trials count: a collapsed
configuration has a run-to-run spread of its own, many times larger. mean d / SE is referred to Student's t with
Satterthwaite's degrees of freedom, so that knowing s badly makes the rule cautious, not bold; with 0.003 added to
mean d, since that much better is what the candidate is supposed to be.

**Inside the first fold** the score after the last epoch is not known, but how far it may still rise is limited. With
w the share of the schedule's summed learning rate that is spent, the candidate is given the better of two
continuations from its best epoch so far (scores jump about while the learning rate is high):

- *It is slow.* A curve that rises ever less per unit of learning rate ends at y / w at most. If near trials had
  reached a share of their final scores at this epoch that is smaller yet, the smallest such share replaces w.
- *It is late.* Some curves lie flat, then jump. At best it rises from now on as the fastest near trial did from the
  start, with the learning rate that is left.

Then the same test is made as if the fold were finished, at 3 % of the p, because it is made after every epoch
and the limits are not laws. A trial is thus never dropped for being slow, only for being too late.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr

from hpsearch.data.folds import Folds
from hpsearch.stats.best import rank

ALPHA = 0.1
"""A trial is dropped at a one-sided p below this."""
MATTERS = 0.003
"""Being better than the incumbent by less is not worth the folds."""
INSIDE = 0.03
"""Part of it that counts inside the first fold."""
NEAR = 0.05
"""Full trials whose value is within this of the incumbent's tell what its kind scores."""
S_GUESS, S_GUESS_DF = 0.006, 4.0
"""Standard deviation of a fold's mean from run to run, as guessed before any evidence, and the guess's weight."""
S_FLOOR = 0.003
"""No estimate of it is believed below this."""
MEDIAN_EFFICIENCY = 0.55
"""Share of the information that is left when mean squares of 4 degrees of freedom are joined by their median."""

Scores = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class TrialScores:
    """What a trial scored so far. Two are equal only if they are the same object."""

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
        """The fold that the latest epoch is of."""
        return list(self.scores)[-1]

    @cached_property
    def finished(self) -> tuple[int, ...]:
        """Folds that were trained to the end, ascending."""
        return tuple(sorted(fold for fold, scores in self.scores.items() if len(scores) >= self.n_epochs))

    @cached_property
    def value(self) -> float:
        """Mean over all images of the finished folds after the last epoch."""
        return float(np.concatenate([self.scores[fold][-1] for fold in self.finished]).mean(dtype=np.float64))

    def is_full(self, n_folds: int) -> bool:
        return len(self.finished) == n_folds

    def spent(self, epochs: int) -> float:
        """Share of the schedule's summed learning rate that is spent after so many epochs."""
        t = epochs / self.n_epochs
        return t + math.sin(math.pi * t) / math.pi if self.schedule == "cosine" else t


@dataclass(frozen=True)
class Verdict:
    """What a pruner decided after an epoch, and on what grounds."""

    drop: bool
    estimate: float
    """What the candidate would probably be worth: the value to tell if it is dropped."""
    fold: int
    epoch: int
    """Epochs done in that fold."""
    reason: str
    d: float | None = None
    """Mean advantage of the incumbent's kind over the candidate's continuation; None: there is no full trial yet."""
    se: float | None = None
    s: float | None = None
    """Standard deviation of a fold's mean from run to run."""
    p: float | None = None
    """One-sided: how probable so large a mean d is if the candidate is better by `MATTERS`."""
    against: int | None = None
    """Number of the incumbent."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Race:
    """The racing rule as a pruner. A pure function of its arguments: what is on record decides."""

    is_sequential = True
    takes_any_fold = True

    def __init__(self, alpha: float = ALPHA) -> None:
        self.alpha = alpha

    def judge(self, candidate: TrialScores, others: Sequence[TrialScores], folds: Folds) -> Verdict | None:
        """Whether the candidate can still win: asked after every epoch of its first fold, and after every fold.

        Of the other trials only the full ones count. None where there is nothing to say: no trial is full yet, the
        candidate itself is, or it is inside a later fold.
        """
        fold = candidate.latest
        epoch = len(candidate.scores[fold])
        is_inside = epoch < candidate.n_epochs
        found = None if is_inside and candidate.finished else compare(candidate, others, folds.k)
        if found is None:
            return None
        where = f"at epoch {epoch} of fold {fold}, if it went on at its best" if is_inside else f"after fold {fold}"
        reason = f"{where}: {found.d:.4f} ± {found.se:.4f} behind trial {found.against}, p = {found.p:.2g}"
        drop = found.p < self.alpha * (INSIDE if is_inside else 1)
        return Verdict(drop=drop, fold=fold, epoch=epoch, reason=reason, **found._asdict())


def verdict_on_request(candidate: TrialScores, others: Sequence[TrialScores], n_folds: int, reason: str) -> Verdict:
    """The verdict on a candidate with scores that somebody wants to end: dropped, with what is known of it so far."""
    fold = candidate.latest
    epoch = len(candidate.scores[fold])
    if (found := compare(candidate, others, n_folds)) is not None:
        return Verdict(drop=True, fold=fold, epoch=epoch, reason=reason, **found._asdict())
    so_far = float(np.concatenate([scores[-1] for scores in candidate.scores.values()]).mean(dtype=np.float64))
    return Verdict(drop=True, estimate=so_far, fold=fold, epoch=epoch, reason=reason)


class Comparison(NamedTuple):
    """A candidate beside the incumbent."""

    estimate: float
    d: float
    se: float
    s: float
    p: float
    against: int


def compare(candidate: TrialScores, others: Sequence[TrialScores], n_folds: int) -> Comparison | None:
    """The test of the candidate against the full trials among the others.

    It goes by the candidate's finished folds, and in its first fold by how that may go on. None where there is
    nothing to test: no full trial, a full candidate, fewer than two images, or a continuation without limit.
    """
    full = sorted((trial for trial in others if trial.is_full(n_folds)), key=lambda trial: trial.number)
    if not full or not candidate.scores or candidate.is_full(n_folds):
        return None
    yardstick = _yardstick(tuple(full), n_folds)
    if candidate.finished:
        seen = candidate.finished
        at_best = typically = np.concatenate([candidate.scores[fold][-1] for fold in seen]).astype(float)
    else:
        seen = (min(candidate.scores),)
        at_best, typically = _continuations(candidate, seen[0], yardstick)
    expected = np.concatenate([yardstick.scores[fold] for fold in seen])
    d = expected - at_best
    if d.size < 2 or not np.isfinite(d).all():
        return None
    n_near = len(yardstick.near)
    stray = float(d.var(ddof=1)) * n_near / (n_near + 1)
    images = stray * _luck(d.size, sum(scores.size for scores in yardstick.scores.values()), n_near)
    runs = yardstick.s**2 * _luck(len(seen), n_folds, n_near)
    se = math.sqrt(images + runs)
    df = (images + runs) ** 2 / (images**2 / (d.size - 1) + runs**2 / yardstick.s_df)
    estimate = yardstick.incumbent.value - float((expected - typically).mean())
    return Comparison(
        # One that collapsed on an easy fold would come out below 0, which no score can be.
        estimate=min(max(estimate, 0.0), 1.0),
        d=float(d.mean()),
        se=se,
        s=yardstick.s,
        p=float(stdtr(df, -(d.mean() + MATTERS) / se)),
        against=yardstick.incumbent.number,
    )


def _luck(seen: int, whole: int, n_near: int) -> float:
    """Variance of mean d in units of one fold's, or image's, when this many are seen of the whole."""
    return 1 / seen + 1 / whole + (1 / seen - 1 / whole) / n_near


class Yardstick(NamedTuple):
    """What the full trials tell about the incumbent's kind."""

    incumbent: TrialScores
    near: tuple[TrialScores, ...]
    scores: dict[int, Scores]
    """Fold to what a trial as good as the incumbent would score on each of its images."""
    s: float
    s_df: float


@lru_cache(maxsize=4)
def _yardstick(full: tuple[TrialScores, ...], n_folds: int) -> Yardstick:
    # Cached because it changes only when a trial becomes full, and is asked for after every epoch.
    by_number = {trial.number: trial for trial in full}
    incumbent = by_number[rank({number: trial.value for number, trial in by_number.items()})[0]]
    near = tuple(trial for trial in full if trial.value >= incumbent.value - NEAR)
    finals = [np.stack([trial.scores[fold][-1] for trial in near]).astype(float) for fold in range(n_folds)]
    values = np.array([[trial.value] for trial in near])
    scores = {fold: incumbent.value + (final - values).mean(axis=0) for fold, final in enumerate(finals)}
    return Yardstick(incumbent, near, scores, *run_spread(finals))


def run_spread(finals: Sequence[Scores]) -> tuple[float, float]:
    """s and its degrees of freedom, from the final scores (trials, images) of every fold.

    The trials' mean squares are joined by their median, so that one that collapsed on one fold does not decide;
    dividing by (1 - 2 / 9 df)^3, the median of chi^2 / df (Wilson and Hilferty), makes that unbiased.
    """
    n_trials, n_folds = len(finals[0]), len(finals)
    if n_trials < 2 or n_folds < 2:
        return S_GUESS, S_GUESS_DF
    per_trial, image_part = fold_mean_squares(finals)
    mean_square = float(np.median(per_trial)) / (1 - 2 / (9 * (n_folds - 1))) ** 3
    df = MEDIAN_EFFICIENCY * (n_trials - 1) * (n_folds - 1)
    variance = (S_GUESS_DF * S_GUESS**2 + df * (mean_square - image_part)) / (S_GUESS_DF + df)
    return math.sqrt(max(S_FLOOR**2, variance)), S_GUESS_DF + df


def fold_mean_squares(finals: Sequence[Scores]) -> tuple[Scores, float]:
    """Each trial's mean square of fold means, (trials,), and the part of it that comes from the images.

    finals: the final scores (trials, images) of every fold, at least two trials and two folds. Two-way analysis of
    variance of the fold means without interaction; a mean square estimates s^2 plus the images' part.
    """
    n_trials, n_folds = len(finals[0]), len(finals)
    means = np.stack([final.mean(axis=1) for final in finals], axis=1)
    residual = means - means.mean(axis=1, keepdims=True) - means.mean(axis=0) + means.mean()
    return (residual**2).sum(axis=1) * n_trials / (n_trials - 1) / (n_folds - 1), _image_part(finals)


def _image_part(finals: Sequence[Scores]) -> float:
    """Variance of a fold's mean that comes from its images, after trial, fold and image effects."""
    squares, df = 0.0, 0
    for final in finals:
        residual = final - final.mean(axis=1, keepdims=True)
        residual -= residual.mean(axis=0)
        squares += float((residual**2).sum())
        df += (final.shape[0] - 1) * (final.shape[1] - 1)
    return squares / max(df, 1) * float(np.mean([1 / final.shape[1] for final in finals]))


def _continuations(candidate: TrialScores, fold: int, yardstick: Yardstick) -> tuple[Scores, Scores]:
    """Scores of the fold's images after the last epoch: at best, and as trials typically go on, (n,) each.

    At best is infinite where some near trial still scored 0 at this epoch: nothing is too late yet.
    """
    scores = candidate.scores[fold]
    now = scores[np.argmax(candidate.curves[fold])].astype(float)
    part = len(scores) / candidate.n_epochs
    spent = candidate.spent(len(scores))
    # Where trials differ in their number of epochs: rounded so that less is asked of the candidate.
    then = _shares_of_final(yardstick.near, lambda trial: int(part * trial.n_epochs + 1e-9))
    slowest = min([spent, *then])
    if slowest <= 0:
        return np.full_like(now, np.inf), now
    fastest = max(_shares_of_final(yardstick.near, lambda trial: _epochs_to_spend(trial, 1 - spent)))
    slow, late = now / slowest, yardstick.scores[fold] * fastest
    return max(slow, late, key=np.mean), now / (float(np.median(then)) if then else spent)


def _shares_of_final(near: Sequence[TrialScores], epochs: Callable[[TrialScores], int]) -> list[float]:
    """What share of its final score each near trial had reached at the best of so many epochs, its folds' mean.

    Without the trials for which that is no epoch at all.
    """
    shares = []
    for trial in near:
        if n_epochs := epochs(trial):
            finals = [curve[-1] for curve in trial.curves.values()]
            bests = [curve[:n_epochs].max() for curve in trial.curves.values()]
            shares.append(float(np.sum(bests) / np.sum(finals)) if np.sum(finals) > 0 else 1.0)
    return shares


def _epochs_to_spend(trial: TrialScores, spent: float) -> int:
    """Epochs until this share of the learning rate is spent, the last one in full; at least 1."""
    return next(epoch for epoch in range(1, trial.n_epochs + 1) if trial.spent(epoch) >= spent - 1e-9)
