"""The one event loop: give jobs to idle workers and handle their reports until the work is over."""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from hpsearch.errors import DeviceError, HpsearchError, StorageError, StudyError, WorkerError
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
) -> list[Result | None] | None:
    """Run one job on each of as many workers at the same time, and return their results in the order of the jobs.

    Starts when all workers are ready. Returns None if any job failed. `check` is as in `run_job`.
    """
    work = _JobsTogether(pool, list(jobs), check)
    run(pool, work)
    results = [work.results[index] for index in sorted(work.results)]
    return results if len(results) == len(jobs) else None


@dataclass
class _SingleJob:
    """Work that consists of one job."""

    pool: WorkerPool
    job: Job | None
    on_epoch: Callable[[EpochRow], bool]
    check: Callable[[], None]
    finished: Finished | None = None
    is_over: bool = False
    n_deaths: int = 0
    n_epochs: int = 0

    def poll(self) -> bool:
        self.check()
        return True

    def next_job(self) -> Job | None:
        job, self.job = self.job, None
        return job

    def on_event(self, event: Event) -> None:
        match event.report:
            case Finished() | Stopped():
                self.finished = event.report if isinstance(event.report, Finished) else None
                self.is_over = True
            case EpochEnded(row):
                if row.epoch > self.n_epochs:
                    self.n_deaths, self.n_epochs = 0, row.epoch
                self.pool.reply(event.worker, go=self.on_epoch(row))
            case Failed(reason="died", text=text) if event.job is not None:
                self.n_deaths += 1
                # `SelectPostprocessingJob` is "select postprocessing".
                kind = re.sub(r"\B([A-Z])", r" \1", type(event.job).__name__.removesuffix("Job")).lower()
                logger.warning("%s: worker %s", kind, text)
                if self.n_deaths >= DEATHS_PER_JOB:
                    raise WorkerError(f"{kind} ended its worker {self.n_deaths} times: {text}")
                self.job = event.job
            case Failed(reason=reason) if reason != "died":
                raise _error(event.report)


@dataclass
class _JobsTogether:
    """Work that consists of one job per worker, begun at the same time."""

    pool: WorkerPool
    jobs: list[Job]
    check: Callable[[], None]
    has_begun: bool = False
    results: dict[int, Result | None] = field(default_factory=dict)
    """Maps the index of each worker to the result of its job."""

    @property
    def is_over(self) -> bool:
        return self.has_begun and not self.jobs

    def poll(self) -> bool:
        self.check()
        self.has_begun = self.has_begun or len(self.pool.idle()) == len(self.pool)
        return True

    def next_job(self) -> Job | None:
        return self.jobs.pop(0) if self.has_begun and self.jobs else None

    def on_event(self, event: Event) -> None:
        match event.report:
            case Finished(result):
                self.results[event.worker.index] = result
            case Failed(text=text):
                logger.warning("worker %d could not be measured: %s", event.worker.index, text)


def _error(failure: Failed) -> HpsearchError:
    if not failure.is_known:
        return WorkerError(f"{failure.text}; this is a fault in hpsearch:\n{failure.traceback}")
    kinds = {"diverged": StudyError, "out_of_memory": DeviceError}
    return kinds.get(failure.reason, StorageError if failure.is_storage else WorkerError)(failure.text)
