"""WorkerPool protocol: give jobs to workers and receive their reports."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from hpsearch.workers.jobs import Job, Report, WorkerSettings


@dataclass(eq=False, kw_only=True)
class Worker:
    """A worker of a pool and its current job."""

    index: int
    """Position of the worker in the pool, from 0."""
    job: Job | None = None
    last_report_at: float = field(default_factory=time.monotonic)
    """`time.monotonic()` of the last message from or to the worker."""


@dataclass(frozen=True)
class Event:
    """Report of a worker and the job that it concerns."""

    worker: Worker
    job: Job | None
    report: Report


class WorkerPool(Protocol):
    """Pool of workers that run jobs. `LocalPool` runs them as processes on this machine."""

    def __len__(self) -> int: ...

    def resize(self, settings: Sequence[WorkerSettings]) -> None:
        """Start and end workers so that there is one for each of `settings`, in this order.

        A worker that already has the settings of its position is kept.
        """

    def set_device(self, device: str) -> None:
        """Record the device that workers with the device setting `auto` have chosen."""

    def idle(self) -> list[Worker]:
        """Return the workers that are ready and have no job, ordered by index."""

    def busy(self) -> list[Worker]:
        """Return the workers that have a job, ordered by index."""

    def submit(self, worker: Worker, job: Job) -> None:
        """Give a job to an idle worker. `events` yields its reports."""

    def reply(self, worker: Worker, *, go: bool) -> None:
        """Reply to an `EpochEnded`: train the next epoch if `go` is true, otherwise stop the fit."""

    def kill(self, worker: Worker) -> None:
        """Kill a worker at once. `events` reports that it died and starts another one in its place."""

    def events(self, timeout_s: float) -> Iterator[Event]:
        """Yield the events that workers report within the timeout. Workers that died are replaced.

        Raises WorkerError if workers cannot be started.
        """

    def epoch_left_s(self) -> float | None:
        """Return the expected seconds until all running epochs end; NaN if unknown, None if no fit is running."""

    def close(self) -> None:
        """End all workers."""
