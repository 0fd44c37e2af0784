"""The WorkerPool protocol: give jobs to workers and receive their reports."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from hpsearch.workers.jobs import Job, Report, WorkerSettings


class Worker(Protocol):
    """A worker as its pool shows it."""

    @property
    def index(self) -> int:
        """Its place in the pool, from 0."""

    @property
    def job(self) -> Job | None:
        """The job that it runs; None if it is idle."""

    @property
    def last_report_at(self) -> float:
        """`time.monotonic()` of its last report or of the last job or answer given to it."""


@dataclass(frozen=True)
class Event:
    """A worker's report and the job that it concerns."""

    worker: Worker
    job: Job | None
    report: Report


class WorkerPool(Protocol):
    """Workers that run jobs. `LocalPool` runs them as processes of this machine."""

    def __len__(self) -> int: ...

    def resize(self, settings: Sequence[WorkerSettings]) -> None:
        """Have one worker for each of `settings`, in this order; a worker that has these settings already stays."""

    def set_device(self, device: str) -> None:
        """Note which device workers with the setting `auto` have chosen."""

    def idle(self) -> list[Worker]:
        """Return the workers that are ready and have no job, by index."""

    def busy(self) -> list[Worker]:
        """Return the workers that have a job, by index."""

    def submit(self, worker: Worker, job: Job) -> None:
        """Give a job to an idle worker. Its reports come as events."""

    def reply(self, worker: Worker, *, go: bool) -> None:
        """Answer an `EpochEnded`: train the next epoch, or stop with a checkpoint."""

    def kill(self, worker: Worker) -> None:
        """End a worker at once. `events` reports it as died, and another one takes its place."""

    def events(self, timeout_s: float) -> Iterator[Event]:
        """Yield what workers reported within the timeout; workers that died are replaced.

        Raises WorkerError if workers cannot be started.
        """

    def epoch_left_s(self) -> float | None:
        """Return the seconds until the epochs being trained end; NaN if not known, None if none is trained."""

    def close(self) -> None:
        """End all workers."""
