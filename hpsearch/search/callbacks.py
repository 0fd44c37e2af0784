"""Callbacks of a running study: for a terminal, a log, a test."""

from collections.abc import Sequence

from hpsearch.data.prepare import Prepared
from hpsearch.store.record import StudyRecord
from hpsearch.store.trials import TrialRecord
from hpsearch.training.rows import EpochRow
from hpsearch.workers.plan import ExecutionPlan, Forecast


class StudyCallback:
    """Base class of callbacks, whose methods do nothing.

    They are called in the coordinator's thread, one for each event, in order. Every method must return quickly.
    """

    def preparing(self, done: int, total: int) -> None:
        """Images are being decoded: `done` of `total` are ready."""

    def prepared(self, prepared: Prepared) -> None:
        """All images are decoded."""

    def planned(self, record: StudyRecord, plan: ExecutionPlan, forecast: Forecast) -> None:
        """The study starts or continues; this process has not trained anything yet."""

    def trial_began(self, trial: TrialRecord) -> None:
        """A trial started or continues."""

    def epoch_ended(self, trial: int, fold: int, row: EpochRow) -> None:
        """An epoch of a fit ended."""

    def fold_ended(self, trial: int, fold: int, score: float) -> None:
        """A fit ended; `score` is the mean over its held-out images."""

    def trial_ended(self, trial: TrialRecord) -> None:
        """A trial ended with an outcome."""

    def replicating(self, trials: Sequence[int], done: int, total: int) -> None:
        """The search is over; `done` of `total` refits of these trials are finished."""

    def message(self, text: str) -> None:
        """Another event in one line, such as a worker that died or an MLflow server that does not answer."""


class NullCallback(StudyCallback):
    """Ignores all events."""
