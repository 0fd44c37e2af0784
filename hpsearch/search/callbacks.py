"""What a running study tells whoever watches it: a terminal, a log, a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from hpsearch.data.prepare import Prepared
from hpsearch.store.record import StudyRecord, TrialRecord
from hpsearch.workers.plan import ExecutionPlan, Forecast


class Listener(Protocol):
    """Hears what happens, in order, from the coordinator's thread. Must return at once."""

    def preparing(self, done: int, total: int) -> None:
        """Images decoded so far."""

    def prepared(self, prepared: Prepared) -> None: ...

    def planned(self, record: StudyRecord, plan: ExecutionPlan, forecast: Forecast) -> None:
        """About to begin or go on; nothing has been trained yet in this start."""

    def trial_began(self, trial: TrialRecord) -> None: ...

    def epoch_ended(self, trial: int, fold: int, row: Mapping[str, Any]) -> None: ...

    def fold_ended(self, trial: int, fold: int, score: float) -> None: ...

    def trial_ended(self, trial: TrialRecord) -> None: ...

    def confirming(self, trials: Sequence[int], done: int, total: int) -> None:
        """The search is over; so many of the second fits of these trials are done."""

    def said(self, text: str) -> None:
        """One line about something else: a worker that died, tracking that is away."""


class Silent:
    """A Listener that hears nothing."""

    def preparing(self, done: int, total: int) -> None:
        pass

    def prepared(self, prepared: Prepared) -> None:
        pass

    def planned(self, record: StudyRecord, plan: ExecutionPlan, forecast: Forecast) -> None:
        pass

    def trial_began(self, trial: TrialRecord) -> None:
        pass

    def epoch_ended(self, trial: int, fold: int, row: Mapping[str, Any]) -> None:
        pass

    def fold_ended(self, trial: int, fold: int, score: float) -> None:
        pass

    def trial_ended(self, trial: TrialRecord) -> None:
        pass

    def confirming(self, trials: Sequence[int], done: int, total: int) -> None:
        pass

    def said(self, text: str) -> None:
        pass
