"""Define the callbacks to which a running study reports its events, for example to show them in a terminal."""

from collections.abc import Sequence

from hpsearch.data.prepare import Prepared
from hpsearch.store.record import StudyRecord
from hpsearch.store.trials import TrialRecord
from hpsearch.training.rows import EpochRow
from hpsearch.workers.plan import ExecutionPlan, Forecast


class StudyCallback:
    """Base class of callbacks. Its methods do nothing.

    The methods are called in the coordinator's thread, once per event and in order. They must return quickly.
    """

    def preparing(self, done: int, total: int) -> None:
        """Called while images are decoded: `done` of `total` are ready."""

    def prepared(self, prepared: Prepared) -> None:
        """Called when all images are decoded."""

    def planned(self, record: StudyRecord, plan: ExecutionPlan, forecast: Forecast) -> None:
        """Called when the study starts or continues, before any training. `forecast` is the expected cost."""

    def replanned(self, plan: ExecutionPlan) -> None:
        """Called when Dask workers have joined or left a running study. `plan` lists the present ones."""

    def trial_began(self, trial: TrialRecord) -> None:
        """Called when a trial starts or continues."""

    def epoch_ended(self, trial: int, fold: int, row: EpochRow) -> None:
        """Called when an epoch of a fit has ended. `row` contains its losses, scores and times."""

    def fold_ended(self, trial: int, fold: int, score: float) -> None:
        """Called when a fit has finished its last epoch. `score` is the mean over its held-out images."""

    def trial_ended(self, trial: TrialRecord) -> None:
        """Called when a trial has ended. `trial.outcome` says how."""

    def leader_changed(self, trial: int, value: float) -> None:
        """Called when another trial has the highest expected value, or when that value has changed.

        It is called only if folds are fitted as needed. The trial need not be complete.
        """

    def replicating(self, trials: Sequence[int], done: int, total: int) -> None:
        """Called during the refits after the search: `done` of `total` refits of these trials are finished."""

    def message(self, text: str) -> None:
        """Called with one line about any other event, such as a dead worker or an unreachable MLflow server."""


class NullCallback(StudyCallback):
    """Callback that ignores all events."""
