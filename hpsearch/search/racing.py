"""Racing: decide from the recorded scores which trials can still win, and which fold is fitted next.

Evaluating every trial on all folds would waste most of the time on trials that lose. Here every trial is fitted on
its first fold. Further folds go to the trials whose scores can still change which trial wins: the *leader*, which is
the trial with the highest expected value, and its *rivals*. The value of a trial is its mean score over all images,
and `stats.value_model` predicts it from the folds that the trial has finished. The comparison is paired: all trials
are scored on the same images.

**Pruning.** Let p be the probability that the value of a trial exceeds that of the leader by more than 0.003, that
is, the probability that it would win by a relevant margin if both were evaluated on all folds. The trial is pruned
once p is below 0.01. Trials that merely tie with the leader are therefore pruned too: near the optimum most trials
tie, and evaluating them on further folds would gain nothing. p is computed after each fold of the trial. Whenever
another trial finishes a fold, p is computed again, because the leader or its expected value may have changed.

**Further folds** go to the leader until it is complete, and then to the rival with the largest p. Each of them may
change which trial leads. During the search, one further fold is fitted for every 10 trials that have finished their
first fold, so that the estimate of the leader's value keeps improving. The remaining ones are fitted after the last
trial has been suggested, until all trials are pruned or complete. Trial 0 is never pruned, because the gain of the
winner over it is reported. It is completed first, so that a search that is stopped has a complete trial.

**Within the first fold**, the score after the last epoch is unknown, but its best case can be estimated as soon as
three other trials have finished a first fold. It is the highest of three predictions:

- *Fast gain.* The prediction starts at the candidate's best mean score so far. After the same epoch, each other trial
  closed some fraction of the gap between its own best score and a perfect score. The candidate closes the largest of
  these fractions, plus a quarter of their standard deviation.
- *Fast gain from the latest score.* The same with the latest mean scores instead of the best so far. Scores fluctuate
  while the learning rate is high. The gains of other trials from their best score are small if that score was high by
  chance, and would then underestimate what the candidate can gain.
- *Late start.* Some curves are flat at first and then jump. Let r be the learning rate, summed over the epochs, that
  the candidate has not used yet. The prediction is the highest score, relative to its final score, that a trial had
  reached when it had used r, times the expected score of the leader on this fold. Only trials whose final score is at
  most 0.05 below that of the leader count. The candidate's own scores do not matter.

p is then computed as if the fold had ended at this score. If the gains of the candidate and of the n other trials
have the same distribution, the candidate gains more than all others with a probability of 1 / (n + 1). The candidate
is pruned if p / (n + 1) is below 0.01, but only if p is below 0.2.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpsearch.data.folds import Folds
from hpsearch.stats.best import rank
from hpsearch.stats.run_variance import NEAR
from hpsearch.stats.value_model import Values, near_rows, residual_variance, value_model
from hpsearch.store.trials import PruneDecision

ALPHA = 0.01
"""Probability of winning by `MATTERS` below which a trial is pruned."""
MAX_INSIDE = 0.2
"""Largest p of a best case at which a trial is pruned within its first fold."""
MATTERS = 0.003
"""Smallest difference from the leader that justifies fitting further folds."""
MIN_CURVES = 3
"""Number of finished first folds that are needed to predict the end of another one."""
UNLIKELY = 0.2
"""Probability of a gain below which the search ends, if `study.until_gain` is set."""
MIN_LATEST = 10
"""Minimum number of the latest trials that predict what further trials are like."""
EXTRA = 0.25
"""Number of standard deviations that the best case adds to the largest gain of the other trials."""

Scores = NDArray[np.float64]
FoldOrder = Literal["all", "in order", "as needed"]
"""How a pruner wants the folds of a trial to be fitted. `all`: every fold, possibly in parallel. `in order`: one
after another. `as needed`: the first fold, then further folds in the order of `Race.order`."""


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
    is_pruned: bool = False

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

    folds: FoldOrder = "as needed"

    def __init__(self, alpha: float = ALPHA) -> None:
        self.alpha = alpha

    def should_prune(
        self, candidate: TrialScores, others: Sequence[TrialScores], folds: Folds
    ) -> PruneDecision | None:
        """Decide whether the candidate can still win.

        There is a decision after every epoch of the candidate's first fold, and after every later fold. Returns None
        if there is no decision to make: there is nothing to compare with yet, the candidate is complete, or it is in
        the middle of a later fold.
        """
        is_inside = len(candidate.scores[candidate.latest]) < candidate.n_epochs
        found = None if is_inside and candidate.finished else compare(candidate, others, folds)
        if found is None:
            return None
        assert found.p is not None
        assert found.d is not None
        where = f"{candidate.place}, best case" if is_inside else candidate.place
        side = "below" if found.d >= 0 else "above"
        reason = f"{where}: {abs(found.d):.4f} ± {found.se:.4f} {side} trial {found.against}, p = {found.p:.2g}"
        n_others = sum(bool(each.finished) for each in others)
        limit = min(MAX_INSIDE, self.alpha * (n_others + 1)) if is_inside else self.alpha
        drop = candidate.number > 0 and found.p < limit
        return dataclasses.replace(found, drop=drop, reason=reason)

    def order(self, trials: Sequence[TrialScores], folds: Folds) -> list[int]:
        """Return the numbers of the open trials that can still win, and of trial 0: the leader, then by p."""
        compared = _with_finished(trials)
        if all(trial.is_pruned for trial in compared):
            return []
        values = _reference(compared, folds).values
        leader = _best(compared, values.expected)
        p = values.probability_better(leader, MATTERS)
        rows = [row for row, trial in enumerate(compared) if not trial.is_pruned and not trial.is_full(folds.k)]
        can_win = [row for row in rows if row == leader or p[row] >= self.alpha or compared[row].number == 0]
        can_win.sort(key=lambda row: (row != leader, -p[row]))
        return [compared[row].number for row in can_win]


def decide(
    drop: bool, candidate: TrialScores, others: Sequence[TrialScores], folds: Folds, reason: str
) -> PruneDecision:
    """Return a decision that another pruner or the user made, completed by the comparison with the leader.

    `drop` says whether to prune the candidate, and `reason` explains the decision. If no comparison is possible, the
    decision contains the mean score so far as the estimate.
    """
    if (found := compare(candidate, others, folds)) is not None:
        return dataclasses.replace(found, drop=drop, reason=reason)
    so_far = np.concatenate([scores[-1] for scores in candidate.scores.values()]).mean(dtype=np.float64)
    fold = candidate.latest
    return PruneDecision(drop, float(so_far), fold, len(candidate.scores[fold]), reason)


def compare(candidate: TrialScores, others: Sequence[TrialScores], folds: Folds) -> PruneDecision | None:
    """Compare the candidate with the leader of the other trials, without deciding whether it is pruned.

    The comparison uses the candidate's finished folds. Before its first fold is finished, it uses the best case of
    that fold. Returns None if no comparison is possible: no other trial that can win has finished a fold, the
    candidate is complete or has no scores, or too few curves are known to predict the end of the fold.
    """
    compared = _with_finished(others)
    if all(trial.is_pruned for trial in compared) or not candidate.scores or candidate.is_full(folds.k):
        return None
    if candidate.finished:
        everyone = _with_finished((*compared, candidate))
        row, values = everyone.index(candidate), _reference(everyone, folds).values
        leader = _best(everyone, values.expected, other_than=row)
        number, estimate = everyone[leader].number, values.true_means[row]
    else:
        if len(compared) < MIN_CURVES:
            return None
        fold, reference = min(candidate.scores), _reference(compared, folds)
        leader = _best(compared, reference.values.expected)
        target = reference.values.fold_mean(leader, fold)
        best, typical = _ends(candidate, fold, compared, target)
        number, estimate = compared[leader].number, reference.values.true_means[leader] + typical - target
        of_candidate = np.full(folds.k, np.nan)
        of_candidate[fold] = best
        # A best case is not an observation, so it is not shrunk toward the other trials.
        values = reference.values.model.predict(np.stack([reference.means[leader], of_candidate]), flat=[1])
        leader, row = 0, 1
    d, se = values.difference(row, leader)
    return PruneDecision(
        drop=False,
        # Clip to valid scores, because a trial that collapsed on an easy fold would get an estimate below 0.
        estimate=min(max(float(estimate), 0.0), 1.0),
        fold=candidate.latest,
        epoch=len(candidate.scores[candidate.latest]),
        reason="",
        d=d,
        se=se,
        s=values.model.run_sd,
        p=float(values.probability_better(leader, MATTERS)[row]),
        against=number,
    )


def leader(trials: Sequence[TrialScores], folds: Folds) -> tuple[int, float] | None:
    """Return the number of the leader and its expected value; None if every trial with a finished fold is pruned."""
    compared = _with_finished(trials)
    if all(trial.is_pruned for trial in compared):
        return None
    expected = _reference(compared, folds).values.expected
    row = _best(compared, expected)
    return compared[row].number, float(expected[row])


def true_means(trials: Sequence[TrialScores], folds: Folds) -> dict[int, float]:
    """Return the posterior mean of the true mean score of each trial that has finished a fold, by trial number."""
    compared = _with_finished(trials)
    if not compared:
        return {}
    means = np.clip(_reference(compared, folds).values.true_means, 0, 1).tolist()
    return {trial.number: mean for trial, mean in zip(compared, means, strict=True)}


def probability_of_gain(trials: Sequence[TrialScores], folds: Folds, gain: float, n_new: int) -> float:
    """Return the probability that the true mean of the best of `n_new` further trials is `gain` above the leader's.

    The sampler learns, so further trials are assumed to be like the latest third of the trials, but at least the
    latest `MIN_LATEST`. Before there are so many, the probability is 1.
    """
    compared, n_latest = _with_finished(trials), max(MIN_LATEST, len(trials) // 3)
    if len(trials) < n_latest or all(trial.is_pruned for trial in compared):
        return 1.0
    best = compared[_best(compared, _reference(compared, folds).values.expected)]
    numbers = sorted(trial.number for trial in trials)[-n_latest:]
    latest = tuple(trial for trial in compared if trial.number in numbers or trial is best)
    means, values = _reference(latest, folds)
    is_like = near_rows(means)[0] & [trial.number in numbers for trial in latest]
    share = (is_like.sum() + 0.5) / (n_latest + 1)
    return values.probability_of_gain(latest.index(best), is_like, share, n_new, gain)


def _with_finished(trials: Sequence[TrialScores]) -> tuple[TrialScores, ...]:
    """Return the trials with a finished fold by number, so that the same trials share an entry of the cache."""
    return tuple(sorted((trial for trial in trials if trial.finished), key=lambda trial: trial.number))


class Reference(NamedTuple):
    """Fold means of the trials that a candidate is compared with, and their predicted values."""

    means: Scores
    """Mean score of each trial on each fold, (trials, folds); NaN if the trial has not finished the fold."""
    values: Values


@lru_cache(maxsize=8)
def _reference(trials: tuple[TrialScores, ...], folds: Folds) -> Reference:
    # Cached because it is needed after every epoch and changes only when a trial finishes a fold.
    means = np.full((len(trials), folds.k), np.nan)
    for row, trial in enumerate(trials):
        means[row, list(trial.finished)] = [trial.curves[fold][-1] for fold in trial.finished]
    near = [trials[row] for row in np.flatnonzero(near_rows(means)[0])]
    of_fold = [[trial.scores[fold][-1] for trial in near if fold in trial.finished] for fold in range(folds.k)]
    g2 = residual_variance([np.array(scores, float) for scores in of_fold if scores])
    sizes = tuple(len(folds.held_out(fold)) for fold in range(folds.k))
    return Reference(means, value_model(means, sizes, g2).predict(means))


def _best(trials: Sequence[TrialScores], values: Scores, other_than: int | None = None) -> int:
    """Return the row of the leader: the trial that is not pruned and has the highest expected value."""
    by_row = {
        row: float(values[row]) for row, trial in enumerate(trials) if not trial.is_pruned and row != other_than
    }
    return rank(by_row)[0]


def _ends(
    candidate: TrialScores, fold: int, others: tuple[TrialScores, ...], leader_mean: float
) -> tuple[float, float]:
    """Predict the mean score of an unfinished first fold after its last epoch: best case and typical case.

    `leader_mean` is the expected mean score of the leader on this fold.
    """
    curve, n_epochs = candidate.curves[fold], len(candidate.scores[fold])
    part, left = n_epochs / candidate.n_epochs, 1 - candidate.spent(n_epochs)
    gains = _gains(others, part, left, leader_mean)
    so_far, latest = float(curve.max()), float(curve[-1])
    best = max(so_far + (1 - so_far) * gains.largest, latest + (1 - latest) * gains.largest_from_latest)
    return max(best, leader_mean * gains.rise), so_far + (1 - so_far) * gains.median


class Gains(NamedTuple):
    """Gains of finished first folds after some epoch, as fractions of the gap between a score and a perfect score."""

    largest: float
    """Gain from the best score up to that epoch in the best case."""
    largest_from_latest: float
    """Gain from the score of that epoch in the best case."""
    median: float
    """Median gain from the best score up to that epoch."""
    rise: float
    """Highest score, relative to its final score, that a near trial had reached when it had used as much learning
    rate as is left."""


@lru_cache(maxsize=64)
def _gains(trials: tuple[TrialScores, ...], part: float, left: float, leader_mean: float) -> Gains:
    """Return the gains after the fraction `part` of the epochs.

    `left` is the fraction of the summed learning rate that is left then. The result is cached, because it is the same
    for all first folds at the same epoch.
    """
    from_best, from_latest, rises = [], [], []
    for trial in trials:
        curve = trial.curves[trial.finished[0]]
        end = float(curve[-1])
        # Trials may differ in their number of epochs. Rounding down makes gains larger, which helps the candidate.
        so_far = [0.0, *curve[: int(part * trial.n_epochs + 1e-9)].tolist()]
        from_best.append(_gain(max(so_far), end))
        from_latest.append(_gain(so_far[-1], end))
        if end >= leader_mean - NEAR:
            rises.append(float(curve[: _epochs_to_spend(trial, left)].max()) / end if end > 0 else 1.0)
    return Gains(_largest(from_best), _largest(from_latest), float(np.median(from_best)), max(rises, default=1.0))


def _gain(start: float, end: float) -> float:
    return max(0.0, end - start) / max(1 - start, 0.05)


def _largest(gains: Sequence[float]) -> float:
    return min(1.0, max(gains) + EXTRA * float(np.std(gains, ddof=1)))


def _epochs_to_spend(trial: TrialScores, spent: float) -> int:
    """Return the smallest number of epochs, at least 1, that use the fraction `spent` of the summed learning rate."""
    return next(epoch for epoch in range(1, trial.n_epochs + 1) if trial.spent(epoch) >= spent - 1e-9)
