"""Joins the record with the statistics: what a study claims of its winner, and what that promises of a test set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hpsearch.report.statistics import (
    Corrected,
    Interval,
    Paired,
    StudyScores,
    cheapest,
    corrected_estimate,
    corrected_gain,
    predict_test_mean,
    tied_with_best,
)
from hpsearch.store.record import StudyRecord


def study_scores(record: StudyRecord, full: Sequence[int]) -> StudyScores:
    """Return the final scores of the full trials with these numbers, on the images that were held out.

    Second fits are included once the study is confirmed, dropped trials with the folds that they finished.
    """
    fold_of = np.asarray(record.folds.fold_of, np.int64)
    held_out = np.flatnonzero(fold_of >= 0)
    standing = record.standing()
    confirmed = [number for number in standing.confirmed if number in full]
    dropped = [record.out_of_fold(trial.number)[held_out] for trial in record.trials() if trial.outcome == "dropped"]
    dropped = [scores for scores in dropped if np.isfinite(scores).any()]
    return StudyScores(
        scores=np.stack([record.out_of_fold(number)[held_out] for number in full]),
        fold_of=fold_of[held_out],
        confirmed=tuple(full.index(number) for number in confirmed),
        second=np.stack([record.second_out_of_fold(number)[held_out] for number in confirmed]) if confirmed else None,
        winner=None if standing.winner not in full else full.index(standing.winner),
        dropped=np.stack(dropped) if dropped else None,
    )


@dataclass(frozen=True, eq=False)
class Claims:
    """What a study's full trials say together. Trials go by their numbers here."""

    full: tuple[int, ...]
    """Numbers of the full trials, ascending: the rows of `scores`."""
    scores: StudyScores

    @classmethod
    def of(cls, record: StudyRecord) -> Claims | None:
        """None while no trial is full."""
        full = tuple(trial.number for trial in record.full_trials())
        return cls(full, study_scores(record, full)) if full else None

    @cached_property
    def corrected(self) -> Corrected:
        """Its `trial` is a row of `scores`; the number is `winner`."""
        return corrected_estimate(self.scores)

    @property
    def winner(self) -> int:
        return self.full[self.corrected.trial]

    @cached_property
    def tied(self) -> tuple[int, ...]:
        """The trials that cannot be told from the best, best first. The winner is among them."""
        found = tuple(self.full[index] for index in tied_with_best(self.scores))
        # An unconfirmed trial may lead by its one fit so far that the winner does not look tied with it.
        return found if self.winner in found else (self.winner, *found)

    def cheapest_tied(self, record: StudyRecord) -> int:
        """Of the tied the one whose cross-validation took the least time."""
        return cheapest(self.tied, {number: cross_validation_s(record, number) for number in self.tied})

    def predicted(self, trial: int, *, n_test: int, n_runs: int = 1) -> Interval | None:
        """What the search promises of the mean of `n_test` new images; None for any trial but the winner."""
        if trial != self.winner:
            return None
        return predict_test_mean(self.scores, self.corrected, n_test=n_test, n_runs=n_runs)

    def gain(self, trial: int) -> Paired | None:
        """Return its gain over trial 0, corrected for selection; None for trial 0, and where that is not full."""
        if trial == 0 or 0 not in self.full:
            return None
        return corrected_gain(self.scores, self.full.index(trial), self.full.index(0))


def cross_validation_s(record: StudyRecord, number: int) -> float:
    """Seconds of training and evaluation of a trial's first fits."""
    return float(
        sum(
            row["train_s"] + row["eval_s"]
            for fold in range(record.n_folds)
            for row in record.fit(number, fold).epochs()
        )
    )
