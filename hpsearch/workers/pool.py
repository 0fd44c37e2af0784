"""Base classes of the worker pools: give jobs to workers and receive their reports."""

import dataclasses
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from hpsearch.workers import jobs
from hpsearch.workers.jobs import ClusterWorker, EpochEnded, Failed, FitJob, Job, Ready, Report, WorkerSettings

PAUSE_S = 30.0
"""If more than this many seconds pass between two polls, the coordinator was probably suspended in between."""

Check = Callable[[], None]
"""Function that is called repeatedly during a wait. It raises an exception to end the wait."""


@dataclass(eq=False, kw_only=True)
class Worker(ABC):
    """A worker of a pool and its current job."""

    index: int
    """Position of the worker in the pool, from 0."""
    settings: WorkerSettings
    machine: ClusterWorker | None = None
    """The Dask worker; None on this machine."""
    is_ready: bool = False
    job: Job | None = None
    last_report_at: float = field(default_factory=time.monotonic)
    """`time.monotonic()` of the last message from or to the worker."""

    @property
    def name(self) -> str:
        """Name of the worker in the record of the study."""
        return f"worker {self.index + 1}" if self.machine is None else self.machine.name

    @property
    def capacity(self) -> jobs.Capacity | None:
        """Capacity of a Dask worker; None if the worker can train all configurations that the plan allows."""
        return None if self.machine is None else self.machine.capacity

    @abstractmethod
    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message to the worker. A worker that has died is ignored, because `WorkerPool.events` reports it."""

    @abstractmethod
    def kill(self) -> None:
        """Kill the worker at once. `WorkerPool.events` reports that it died and starts another one in its place."""


@dataclass(frozen=True)
class Event:
    """Report of a worker and the job that it concerns."""

    worker: Worker
    job: Job | None
    report: Report


class WorkerPool(ABC):
    """Pool of workers that run jobs. It keeps track of the workers, their jobs and the duration of their epochs.

    `LocalPool` runs them as processes on this machine, and `DaskPool` on the machines of a cluster. A pool is
    initially empty. Use it as a context manager, which ends all workers on exit.
    """

    machines: Mapping[str, ClusterWorker]
    """Dask workers by address, including those that were lost a short time ago; empty if the workers run on this
    machine."""
    _workers: Sequence[Worker]

    def __init__(self) -> None:
        self.machines = {}
        self._polled_at = time.monotonic()
        self._epoch_s: dict[int, float] = {}
        """Maps each trial to the duration in seconds of its latest epoch, in any fold."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._workers)

    @abstractmethod
    def resize(self, settings: Sequence[WorkerSettings]) -> None:
        """Start and end workers so that there is one for each of `settings`, in this order.

        A worker that already has the settings of its position is kept.
        """

    @abstractmethod
    def events(self, timeout_s: float) -> Iterator[Event]:
        """Yield the events that workers report within the timeout. Workers that died are replaced.

        Raises WorkerError if workers cannot be started.
        """

    @abstractmethod
    def close(self) -> None:
        """End all workers."""

    def set_device(self, device: str) -> None:
        """Record the device that workers with the device setting `auto` have chosen."""
        for worker in self._workers:
            worker.settings = dataclasses.replace(worker.settings, device=device)

    def idle(self) -> list[Worker]:
        """Return the workers that are ready and have no job, ordered by index."""
        return [worker for worker in self._workers if worker.is_ready and worker.job is None]

    def busy(self) -> list[Worker]:
        """Return the workers that have a job, ordered by index."""
        return [worker for worker in self._workers if worker.job is not None]

    def submit(self, worker: Worker, job: Job) -> None:
        """Give a job to an idle worker. `events` yields its reports."""
        worker.job = job
        self._send(worker, jobs.to_message(job))

    def reply(self, worker: Worker, *, go: bool) -> None:
        """Reply to an `EpochEnded`: train the next epoch if `go` is true, otherwise stop the fit."""
        self._send(worker, {"go": go})

    def epoch_left_s(self) -> float | None:
        """Return the expected seconds until all running epochs end; NaN if unknown, None if no fit is running."""
        now = time.monotonic()
        left = [
            # For a trial without an earlier epoch the result is NaN: `max` returns its first argument if it is NaN.
            max(self._epoch_s.get(worker.job.trial, math.nan) - (now - worker.last_report_at), 0.0)
            for worker in self._workers
            if isinstance(worker.job, FitJob)
        ]
        return math.nan if any(map(math.isnan, left)) else max(left, default=None)

    def _send(self, worker: Worker, message: Mapping[str, Any]) -> None:
        worker.last_report_at = time.monotonic()
        worker.send(message)

    def _forgive_pause(self) -> None:
        """Do not count time during which the coordinator itself was suspended (SIGSTOP) as silence of the workers."""
        if (pause_s := time.monotonic() - self._polled_at) > PAUSE_S:
            for worker in self._workers:
                worker.last_report_at += pause_s

    def _note(self, worker: Worker, report: Report) -> Event:
        """Update the state of a worker from its report, and return the report as an event."""
        job = worker.job
        worker.last_report_at = time.monotonic()
        # A worker whose process has died is ready again when another process has started.
        worker.is_ready = not (isinstance(report, Failed) and report.error == "died")
        if isinstance(report, EpochEnded) and isinstance(job, FitJob):
            self._epoch_s[job.trial] = report.row.seconds
        if not isinstance(report, EpochEnded | Ready):
            worker.job = None
        return Event(worker, job, report)
