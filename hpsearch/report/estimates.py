"""Estimate the scores of the complete trials of a study: statistics, winner, ties, gains and predictions."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np

from hpsearch.search.status import seconds_of
from hpsearch.stats.intervals import Interval, Paired
from hpsearch.stats.selection import Corrected, corrected_estimate, corrected_gain, predict_test_mean, tied_with_best
from hpsearch.stats.study_scores import StudyScores, TrialStatistics, trial_statistics
from hpsearch.store.record import StudyRecord


@dataclass(frozen=True, eq=False)
class Estimates:
    """Statistical estimates of the complete trials of a study. Trials are identified by number."""

    record: StudyRecord
    complete: tuple[int, ...]
    """Numbers of the complete trials in ascending order. They correspond to the rows of `scores`."""
    scores: StudyScores
    """Out-of-fold scores of these trials."""

    @classmethod
    def of(cls, record: StudyRecord) -> Self | None:
        """Return the estimates of a study; None if no trial is complete.

        Replicates (second sets of fits of the top trials) are included once all of them have ended. Pruned trials are
        included with their finished folds.
        """
        trials = record.trials()
        standing = record.standing(trials)
        complete = tuple(sorted(standing.ranking))
        if not complete:
            return None
        fold_of = np.asarray(record.folds.fold_of, np.int64)
        held_out = np.flatnonzero(fold_of >= 0)
        replicates = [record.out_of_fold(number, replicate=1)[held_out] for number in standing.confirmed]
        pruned = [record.out_of_fold(trial.number)[held_out] for trial in trials if trial.outcome == "pruned"]
        pruned = [scores for scores in pruned if np.isfinite(scores).any()]
        scores = StudyScores(
            scores=np.stack([record.out_of_fold(number)[held_out] for number in complete]),
            fold_of=fold_of[held_out],
            replicated=tuple(complete.index(number) for number in standing.confirmed),
            replicates=np.stack(replicates) if replicates else None,
            winner=complete.index(standing.ranking[0]),
            pruned=np.stack(pruned) if pruned else None,
        )
        return cls(record, complete, scores)

    @cached_property
    def statistics(self) -> dict[int, TrialStatistics]:
        """Statistics of each complete trial, by trial number."""
        return dict(zip(self.complete, trial_statistics(self.scores), strict=True))

    @cached_property
    def corrected(self) -> Corrected:
        """Mean score of the winner, corrected for selection bias. Its field `trial` is a row of `scores`."""
        return corrected_estimate(self.scores)

    @property
    def winner(self) -> int:
        return self.complete[self.corrected.trial]

    @cached_property
    def is_default(self) -> bool:
        """Whether the winner has the default configuration. It is then trial 0 or a copy of trial 0."""
        return self.record.is_default(self.record.trial(self.winner))

    @cached_property
    def tied(self) -> tuple[int, ...]:
        """Numbers of the trials that are statistically tied with the best, best first. Includes the winner."""
        found = tuple(self.complete[index] for index in tied_with_best(self.scores))
        # A trial without a replicate may score so high in its only fit that the winner is not tied with it.
        return found if self.winner in found else (self.winner, *found)

    @cached_property
    def cheapest_tied(self) -> int:
        """Number of the tied trial with the fastest cross-validation. Of equally fast trials, the best is
        returned."""
        return min(self.tied, key=lambda number: seconds_of(self.record.fits(number)))

    def predicted(self, *, n_test: int, n_runs: int = 1) -> Interval:
        """Predict the mean score of the winner on `n_test` new images after retraining.

        `n_runs` is the number of retrained networks whose scores are averaged.
        """
        return predict_test_mean(self.scores, self.corrected, n_test=n_test, n_runs=n_runs)

    def gain(self, trial: int) -> Paired | None:
        """Return the gain of a trial over trial 0, corrected for selection bias.

        Return None for trial 0 itself, and if trial 0 is not complete.
        """
        if trial == 0 or 0 not in self.complete:
            return None
        return corrected_gain(self.scores, self.complete.index(trial), self.complete.index(0))

    def of_final(self, trial: int, *, n_test: int, n_runs: int) -> dict[str, Any]:
        """Return the estimates of a retrained trial as fields of `FinalScores`. See `predicted` for `n_runs`.

        The corrected mean and the prediction exist only for the winner.
        """
        is_winner = trial == self.winner
        return {
            "cv": self.statistics[trial].total,
            "cv_fold_std": self.statistics[trial].sd_folds,
            "is_confirmed": self.complete.index(trial) in self.scores.replicated,
            "corrected": self.corrected if is_winner else None,
            "predicted": self.predicted(n_test=n_test, n_runs=n_runs) if is_winner else None,
            "against_default": self.gain(trial),
            "winner": self.winner,
        }
