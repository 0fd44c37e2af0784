"""The trials of a running study: kept in memory, written to the record, shown to callback and views."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Literal

import numpy as np

from hpsearch.search.callbacks import StudyCallback
from hpsearch.search.evaluation import Evaluation
from hpsearch.stats.best import rank
from hpsearch.store.fits import remove_networks
from hpsearch.store.record import StudyRecord
from hpsearch.store.trials import Outcome, ReplicateRecord, TrialRecord, count_trials
from hpsearch.store.versions import now

logger = logging.getLogger(__name__)


class Ledger:
    """All trials of a study. Every change is written first, then shown."""

    def __init__(self, record: StudyRecord, callback: StudyCallback, wake_views: Callable[[], None]) -> None:
        self.trials = {trial.number: trial for trial in record.trials()}
        """All trials by number."""
        self._record = record
        self._callback = callback
        self._wake_views = wake_views

    @property
    def n_counted(self) -> int:
        """Ended trials that count toward `study.trials`."""
        return count_trials(self.trials.values())

    def write(self, trial: TrialRecord) -> None:
        """Write a new trial, or a changed one."""
        self._record.write_trial(trial)
        self.trials[trial.number] = trial
        self._wake_views()

    def write_replicate(self, second: ReplicateRecord) -> None:
        """Write a new replicate, or a changed one."""
        self._record.write_replicate(second)
        self._wake_views()

    def write_evaluation(self, evaluation: Evaluation) -> None:
        """Write what has changed in an open trial or replicate."""
        if evaluation.replicate is None:
            self.write(evaluation.trial)
        else:
            self.write_replicate(evaluation.replicate)

    def end_trial(
        self, trial: TrialRecord, outcome: Outcome, *, value: float | None, reason: str, constraint: float
    ) -> None:
        """Record how a trial ended, and remove the files that it no longer needs."""
        ended = dataclasses.replace(
            trial, outcome=outcome, value=value, reason=reason, constraint=constraint, ended_at=now()
        )
        self.write(ended)
        result = f"{value:.4f}" if value is not None else reason
        logger.info("trial %d ended: %s, %s", ended.number, outcome, result)
        self.remove_networks(ended.number)
        self._callback.trial_ended(ended)

    def end_replicate(
        self, second: ReplicateRecord, outcome: Literal["complete", "diverged", "infeasible", "failed"], reason: str
    ) -> None:
        """Record how a replicate ended."""
        number = second.trial
        self.write_replicate(dataclasses.replace(second, outcome=outcome, reason=reason, ended_at=now()))
        if outcome == "complete":
            score = float(np.nanmean(self._record.replicate_out_of_fold(number)))
            text = f"trial {number} refitted: {score:.4f}, first fit {self.trials[number].value:.4f}"
        else:
            text = f"trial {number} refitted: {outcome} ({reason}), so it cannot win"
        logger.info("%s", text)
        self._callback.message(text)

    def remove_networks(self, number: int) -> None:
        """Remove the networks of an ended trial; weights stay for the two best complete trials only."""
        values = {trial.number: trial.value or 0.0 for trial in self._record.contenders(self.trials.values())}
        ranking = rank(values)
        for each in {number, *ranking[2:4]} - set(ranking[:2]):
            for fold in range(self._record.n_folds):
                remove_networks(self._record.paths.trial(each).fold(fold))
