"""What every WorkerPool has to do: subclass PoolContract with a fixture `pool` to test an implementation."""

from __future__ import annotations

import time
from pathlib import Path

from hpsearch.inference.postprocessing import Postprocessing
from hpsearch.workers.jobs import Failed, Finished, Job, KeepJob, Ready, WorkerSettings
from hpsearch.workers.loop import run_job, run_jobs_together
from hpsearch.workers.pool import Event, WorkerPool

NOTHING = KeepJob(copies=(), postprocessing=Postprocessing())
"""A job that is done at once."""
IMPOSSIBLE = KeepJob(copies=((Path("missing"), Path("nowhere")),), postprocessing=Postprocessing())
"""A job that fails."""
ONE = (WorkerSettings("cpu", 1),)
PATIENCE_S = 60.0


def wait_for(pool: WorkerPool, report: type) -> Event:
    """Return the first event with such a report."""
    give_up_at = time.monotonic() + PATIENCE_S
    while time.monotonic() < give_up_at:
        for event in pool.events(0.1):
            if isinstance(event.report, report):
                return event
    raise TimeoutError(f"no {report.__name__} within {PATIENCE_S} s")


def begin(pool: WorkerPool, job: Job) -> None:
    """Give a job to the first worker that becomes idle."""
    while not (idle := pool.idle()):
        wait_for(pool, Ready)
    pool.submit(idle[0], job)


class PoolContract:
    """The tests."""

    def test_a_worker_is_idle_when_it_is_ready(self, pool: WorkerPool) -> None:
        pool.resize(ONE)
        assert (len(pool), pool.idle(), pool.busy()) == (1, [], [])
        event = wait_for(pool, Ready)
        assert (event.job, event.worker.index) == (None, 0)
        assert [worker.index for worker in pool.idle()] == [0]

    def test_a_result_arrives_with_its_job(self, pool: WorkerPool) -> None:
        pool.resize(ONE)
        begin(pool, NOTHING)
        assert [worker.job for worker in pool.busy()] == [NOTHING]
        event = wait_for(pool, Finished)
        assert event.job == NOTHING
        assert pool.busy() == []
        assert len(pool.idle()) == 1

    def test_a_job_that_fails_says_why_and_leaves_its_worker_idle(self, pool: WorkerPool) -> None:
        pool.resize(ONE)
        begin(pool, IMPOSSIBLE)
        report = wait_for(pool, Failed).report
        assert isinstance(report, Failed)
        assert report.error == "CheckpointError"
        assert "missing" in report.text
        assert len(pool.idle()) == 1

    def test_a_killed_worker_is_reported_as_died_and_replaced(self, pool: WorkerPool) -> None:
        pool.resize(ONE)
        wait_for(pool, Ready)
        pool.idle()[0].kill()
        report = wait_for(pool, Failed).report
        assert isinstance(report, Failed)
        assert report.error == "died"
        wait_for(pool, Ready)
        assert run_job(pool, NOTHING) == Finished()

    def test_a_worker_with_the_same_settings_stays_when_the_pool_is_resized(self, pool: WorkerPool) -> None:
        pool.resize(ONE)
        wait_for(pool, Ready)
        (before,) = pool.idle()
        pool.resize((*ONE, WorkerSettings("cpu", 2)))
        assert len(pool) == 2
        assert pool.idle()[0] is before
        pool.resize(ONE)
        assert [*pool.idle()] == [before]

    def test_jobs_run_together_begin_when_all_workers_are_ready(self, pool: WorkerPool) -> None:
        pool.resize(ONE * 2)
        assert run_jobs_together(pool, [NOTHING, NOTHING]) == [Finished(), Finished()]
        assert {type(each) for each in run_jobs_together(pool, [NOTHING, IMPOSSIBLE])} == {Finished, Failed}

    def test_without_a_fit_no_epoch_is_trained(self, pool: WorkerPool) -> None:
        pool.resize(ONE)
        assert pool.epoch_left_s() is None

    def test_a_closed_pool_has_no_workers(self, pool: WorkerPool) -> None:
        pool.resize(ONE)
        pool.close()
        assert (len(pool), pool.idle(), pool.busy()) == (0, [], [])
