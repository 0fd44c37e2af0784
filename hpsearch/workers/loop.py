"""Event loop that gives jobs to idle workers and handles their reports until the work is over."""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from hpsearch.errors import DeviceError, HpsearchError, StorageError, StudyError, WorkerError
from hpsearch.training.rows import EpochRow
from hpsearch.workers.jobs import EpochEnded, Failed, Finished, FitJob, Job, Report, Stopped
from hpsearch.workers.pool import Check, Event, Worker, WorkerPool

logger = logging.getLogger(__name__)

POLL_S = 0.25
DEATHS_PER_JOB = 3
"""Number of workers that may die while running a job, without a new epoch in between, before the job fails."""

GoesOn = Callable[[EpochRow], bool]
"""Function that is called with the row of each epoch, and returns whether to continue the fit."""


class Work(Protocol):
    """Source of jobs for the event loop: a study, or a list of jobs."""

    @property
    def is_over(self) -> bool:
        """Whether all jobs have been given out."""

    def poll(self) -> bool:
        """Check for stop requests and limits, once per iteration. Return False to leave the loop at once."""

    def next_job(self, worker: Worker) -> Job | None:
        """Return the job for an idle worker, or None if there is none at the moment for workers of its capacity."""

    def on_event(self, event: Event) -> None:
        """Handle a report. An `EpochEnded` must be answered with `WorkerPool.reply`."""


def run(pool: WorkerPool, work: Work) -> None:
    """Run the jobs of `work` on the pool until the work is over and no worker is busy."""
    while work.poll():
        # One job at a time: suggestions for many idle workers may take long, and the other workers wait meanwhile.
        job, without_job = None, set()
        for worker in pool.idle():
            if worker.capacity in without_job:
                continue
            if (job := work.next_job(worker)) is not None:
                if isinstance(job, FitJob):
                    logger.info("%s starts on %s", job.name, worker.name)
                pool.submit(worker, job)
                break
            without_job.add(worker.capacity)
        if work.is_over and not pool.busy():
            return
        for event in pool.events(POLL_S if job is None else 0.0):
            work.on_event(event)


def run_job(
    pool: WorkerPool, job: Job, *, on_epoch: GoesOn = lambda row: True, check: Check = lambda: None
) -> Finished | None:
    """Run one job and return its last report, or None if `on_epoch` stopped it.

    `on_epoch` is called with the row of each epoch and returns whether to continue. `check` is called repeatedly and
    may raise an exception to stop waiting. When a worker dies, another one continues from the job's checkpoint.
    Raises the error of a failed job as an HpsearchError, or WorkerError if three workers died without a new epoch in
    between.
    """
    work = _Jobs(pool, [job], check, on_epoch)
    run(pool, work)
    (report,) = work.reports
    if isinstance(report, Failed):
        raise _error(report)
    return report if isinstance(report, Finished) else None


def run_jobs_together(pool: WorkerPool, jobs: Sequence[Job], check: Check = lambda: None) -> list[Report]:
    """Run several jobs other than fits at the same time, each on its own worker, and return their last reports.

    No job starts until there is an idle worker for each of them. `check` and the death of a worker are handled as in
    `run_job`.
    """
    work = _Jobs(pool, list(jobs), check)
    run(pool, work)
    return work.reports


@dataclass
class _Jobs:
    """Work that consists of a list of jobs, all started at the same time."""

    pool: WorkerPool
    jobs: list[Job]
    """Jobs that wait for a worker."""
    check: Check
    on_epoch: GoesOn = lambda row: True
    reports: list[Report] = field(default_factory=list)
    n_deaths: int = 0
    n_epochs: int = 0

    @property
    def is_over(self) -> bool:
        return not self.jobs

    def poll(self) -> bool:
        self.check()
        return True

    def next_job(self, worker: Worker) -> Job | None:
        return self.jobs.pop() if self.jobs and len(self.pool.idle()) >= len(self.jobs) else None

    def on_event(self, event: Event) -> None:
        match event.report:
            case EpochEnded(row):
                if row.epoch > self.n_epochs:
                    self.n_deaths, self.n_epochs = 0, row.epoch
                self.pool.reply(event.worker, go=self.on_epoch(row))
            case Failed(error="died", text=text) if event.job is not None:
                self.n_deaths += 1
                # `SelectPostprocessingJob` becomes "select postprocessing".
                kind = re.sub(r"\B([A-Z])", r" \1", type(event.job).__name__.removesuffix("Job")).lower()
                logger.warning("%s: worker %s", kind, text)
                if self.n_deaths < DEATHS_PER_JOB:
                    self.jobs.append(event.job)
                else:
                    text = f"{self.n_deaths} workers died during {kind}: {text}"
                    self.reports.append(Failed(error="died", text=text))
            case Finished() | Stopped() | Failed() if event.job is not None:
                self.reports.append(event.report)


def _error(failure: Failed) -> HpsearchError:
    if not failure.error:
        return WorkerError(f"{failure.text}; this is a bug in hpsearch:\n{failure.traceback}")
    kinds = {"DivergedError": StudyError, "OutOfMemoryError": DeviceError, "StorageError": StorageError}
    return kinds.get(failure.error, WorkerError)(failure.text)
