"""The one event loop: give jobs to idle workers and handle their reports until the work is over."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol

from hpsearch.errors import DeviceError, StorageError, StudyError, WorkerError
from hpsearch.training.rows import EpochRow
from hpsearch.workers.jobs import EpochEnded, Failed, Finished, Job, Result, Stopped
from hpsearch.workers.pool import Event, WorkerPool

logger = logging.getLogger(__name__)

POLL_S = 0.25
DEATHS_PER_JOB = 3
"""A job that has ended its worker so often without an epoch in between is given up."""


class Work(Protocol):
    """What the loop is run for: a study, or a single job."""

    @property
    def is_over(self) -> bool:
        """Whether no further job will come."""

    def poll(self) -> bool:
        """Look at requests and limits, once per turn; return False to leave the loop at once."""

    def next_job(self) -> Job | None:
        """Return the job for the next idle worker; None if there is none at the moment."""

    def on_event(self, event: Event) -> None:
        """Handle a report. An `EpochEnded` has to be answered by `WorkerPool.reply`."""


def run(pool: WorkerPool, work: Work) -> None:
    """Run the work's jobs on the pool until the work is over and no worker is busy."""
    while work.poll():
        for worker in pool.idle():
            if (job := work.next_job()) is None:
                break
            pool.submit(worker, job)
        if work.is_over and not pool.busy():
            return
        for event in pool.events(POLL_S):
            work.on_event(event)


def run_job(
    pool: WorkerPool,
    job: Job,
    *,
    on_epoch: Callable[[EpochRow], bool] = lambda row: True,
    check: Callable[[], None] = lambda: None,
) -> Finished | None:
    """Run one job and return its last report, or None if `on_epoch` stopped it.

    `on_epoch` is called with the row of each epoch and returns whether to go on; `check` is called again and again,
    and ends the waiting by raising. When a worker dies, another one continues from the job's checkpoint. Raises what
    the job raised, or WorkerError when it has ended three workers without an epoch in between.
    """
    work = _SingleJob(pool, job, on_epoch, check)
    run(pool, work)
    return work.finished


def run_jobs_together(
    pool: WorkerPool, jobs: Sequence[Job], check: Callable[[], None] = lambda: None
) -> list[Result] | None:
    """Run one job on each of as many workers at the same time, and return their results in the order of the jobs.

    Starts when all workers are ready. Returns None if any job failed. `check` is as in `run_job`.
    """
    work = _JobsTogether(pool, jobs, check)
    run(pool, work)
    results = [work.results[index] for index in sorted(work.results)]
    return results if len(results) == len(jobs) else None


class _SingleJob:
    """Work that consists of one job."""

    def __init__(
        self, pool: WorkerPool, job: Job, on_epoch: Callable[[EpochRow], bool], check: Callable[[], None]
    ) -> None:
        self.finished: Finished | None = None
        self.is_over = False
        self._pool = pool
        self._job: Job | None = job
        self._kind = job.kind
        self._on_epoch = on_epoch
        self._check = check
        self._n_deaths = self._n_epochs = 0

    def poll(self) -> bool:
        self._check()
        return True

    def next_job(self) -> Job | None:
        job, self._job = self._job, None
        return job

    def on_event(self, event: Event) -> None:
        match event.report:
            case Finished() | Stopped():
                self.finished = event.report if isinstance(event.report, Finished) else None
                self.is_over = True
            case EpochEnded(row):
                if row.epoch > self._n_epochs:
                    self._n_deaths, self._n_epochs = 0, row.epoch
                self._pool.reply(event.worker, go=self._on_epoch(row))
            case Failed(reason="died") if event.job is not None:
                self._n_deaths += 1
                logger.warning("%s: worker %s", self._kind, event.report.text)
                if self._n_deaths >= DEATHS_PER_JOB:
                    text = f"{self._kind} ended its worker {self._n_deaths} times: {event.report.text}"
                    raise WorkerError(text)
                self._job = event.job
            case Failed(reason=reason) if reason != "died":
                _raise(event.report)


class _JobsTogether:
    """Work that consists of one job per worker, begun at the same time."""

    def __init__(self, pool: WorkerPool, jobs: Sequence[Job], check: Callable[[], None]) -> None:
        self.results: dict[int, Result] = {}
        """Maps the index of each worker to the result of its job."""
        self._pool = pool
        self._jobs = list(jobs)
        self._has_begun = False
        self._check = check

    @property
    def is_over(self) -> bool:
        return self._has_begun and not self._jobs

    def poll(self) -> bool:
        self._check()
        self._has_begun = self._has_begun or len(self._pool.idle()) == len(self._pool)
        return True

    def next_job(self) -> Job | None:
        return self._jobs.pop(0) if self._has_begun and self._jobs else None

    def on_event(self, event: Event) -> None:
        match event.report:
            case Finished(result):
                self.results[event.worker.index] = result
            case Failed(text=text):
                logger.warning("worker %d could not be measured: %s", event.worker.index, text)


def _raise(failure: Failed) -> NoReturn:
    if failure.reason == "diverged":
        raise StudyError(failure.text)
    if failure.reason == "out_of_memory":
        raise DeviceError(failure.text)
    if failure.is_storage:
        raise StorageError(failure.text)
    if failure.is_known:
        raise WorkerError(failure.text)
    raise WorkerError(f"{failure.text}; this is a fault in hpsearch:\n{failure.traceback}")
