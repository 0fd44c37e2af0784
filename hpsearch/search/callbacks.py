"""Callbacks of a running study: for a terminal, a log, a test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from hpsearch.data.prepare import Prepared
from hpsearch.store.record import StudyRecord
from hpsearch.store.trials import TrialRecord
from hpsearch.training.rows import EpochRow
from hpsearch.workers.plan import ExecutionPlan, Forecast


class StudyCallback(Protocol):
    """Called by the coordinator's thread for each thing that happens, in order. Must return at once."""

    def preparing(self, done: int, total: int) -> None:
        """Called with the images decoded so far."""

    def prepared(self, prepared: Prepared) -> None: ...

    def planned(self, record: StudyRecord, plan: ExecutionPlan, forecast: Forecast) -> None:
        """Called before this start trains anything."""

    def trial_began(self, trial: TrialRecord) -> None: ...

    def epoch_ended(self, trial: int, fold: int, row: EpochRow) -> None: ...

    def fold_ended(self, trial: int, fold: int, score: float) -> None: ...

    def trial_ended(self, trial: TrialRecord) -> None: ...

    def replicating(self, trials: Sequence[int], done: int, total: int) -> None:
        """Called when the search is over: `done` of `total` refits of these trials are finished."""

    def message(self, text: str) -> None:
        """Called with one line about anything else: a worker that died, a note on the data."""


class NullCallback:
    """A StudyCallback that does nothing."""

    def preparing(self, done: int, total: int) -> None:
        pass

    def prepared(self, prepared: Prepared) -> None:
        pass

    def planned(self, record: StudyRecord, plan: ExecutionPlan, forecast: Forecast) -> None:
        pass

    def trial_began(self, trial: TrialRecord) -> None:
        pass

    def epoch_ended(self, trial: int, fold: int, row: EpochRow) -> None:
        pass

    def fold_ended(self, trial: int, fold: int, score: float) -> None:
        pass

    def trial_ended(self, trial: TrialRecord) -> None:
        pass

    def replicating(self, trials: Sequence[int], done: int, total: int) -> None:
        pass

    def message(self, text: str) -> None:
        pass
