"""Estimate from the record what a study's complete trials score: statistics, winner, ties, gains and predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hpsearch.stats.intervals import Interval, Paired
from hpsearch.stats.selection import (
    Corrected,
    cheapest,
    corrected_estimate,
    corrected_gain,
    predict_test_mean,
    tied_with_best,
)
from hpsearch.stats.study_scores import StudyScores, TrialStatistics, trial_statistics
from hpsearch.store.record import StudyRecord


def study_scores(record: StudyRecord, complete: Sequence[int]) -> StudyScores:
    """Return the final scores of the complete trials with these numbers, on the held-out images.

    Replicates are included once all of them have ended, pruned trials with the folds that they finished.
    """
    fold_of = np.asarray(record.folds.fold_of, np.int64)
    held_out = np.flatnonzero(fold_of >= 0)
    standing = record.standing()
    replicated = [number for number in standing.confirmed if number in complete]
    pruned = [record.out_of_fold(trial.number)[held_out] for trial in record.trials() if trial.outcome == "pruned"]
    pruned = [scores for scores in pruned if np.isfinite(scores).any()]
    return StudyScores(
        scores=np.stack([record.out_of_fold(number)[held_out] for number in complete]),
        fold_of=fold_of[held_out],
        replicated=tuple(complete.index(number) for number in replicated),
        replicates=np.stack([record.replicate_out_of_fold(n)[held_out] for n in replicated]) if replicated else None,
        winner=complete.index(standing.winner) if standing.winner in complete else None,
        pruned=np.stack(pruned) if pruned else None,
    )


@dataclass(frozen=True, eq=False)
class Estimates:
    """Estimates about the complete trials of a study, which are named by their numbers."""

    complete: tuple[int, ...]
    """Numbers of the complete trials, ascending: the rows of `scores`."""
    scores: StudyScores

    @classmethod
    def of(cls, record: StudyRecord) -> Estimates | None:
        """Return the estimates of a study; None while no trial is complete."""
        complete = tuple(trial.number for trial in record.complete_trials())
        return cls(complete, study_scores(record, complete)) if complete else None

    @cached_property
    def statistics(self) -> dict[int, TrialStatistics]:
        """Statistics of every complete trial by number."""
        return dict(zip(self.complete, trial_statistics(self.scores), strict=True))

    @cached_property
    def corrected(self) -> Corrected:
        """The winner's corrected mean. Its `trial` is a row of `scores`; the number is `winner`."""
        return corrected_estimate(self.scores)

    @property
    def winner(self) -> int:
        return self.complete[self.corrected.trial]

    @cached_property
    def tied(self) -> tuple[int, ...]:
        """The trials that cannot be distinguished from the best, best first, including the winner."""
        found = tuple(self.complete[index] for index in tied_with_best(self.scores))
        # A trial without replicates may lead by its single fit so far that the winner is not tied with it.
        return found if self.winner in found else (self.winner, *found)

    def cheapest_tied(self, record: StudyRecord) -> int:
        """Return the tied trial whose cross-validation took the least time."""
        return cheapest(self.tied, {number: cross_validation_s(record, number) for number in self.tied})

    def predicted(self, trial: int, *, n_test: int, n_runs: int = 1) -> Interval | None:
        """Predict the mean of the retrained winner on `n_test` new images; None for any other trial."""
        if trial != self.winner:
            return None
        return predict_test_mean(self.scores, self.corrected, n_test=n_test, n_runs=n_runs)

    def gain(self, trial: int) -> Paired | None:
        """Return the gain over trial 0, corrected for selection; None for trial 0, and if trial 0 is not complete."""
        if trial == 0 or 0 not in self.complete:
            return None
        return corrected_gain(self.scores, self.complete.index(trial), self.complete.index(0))


def cross_validation_s(record: StudyRecord, number: int) -> float:
    """Return the seconds of training and evaluation of a trial's first fits."""
    fits = (record.fit(number, fold) for fold in range(record.n_folds))
    return float(sum(row.seconds for fit in fits for row in fit.epochs()))
