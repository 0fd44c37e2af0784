from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hpsearch import config as configs
from hpsearch.workers import process
from hpsearch.workers.jobs import CachePaths, Failed, FitJob, Ready, WorkerSettings
from hpsearch.workers.local_pool import LocalPool, LocalWorker
from tests.search.in_process import workers_in_process
from tests.workers.pool_contract import ONE, PoolContract, wait_for


def worker(trial: int | None, silent_s: float = 0.0) -> LocalWorker:
    """A worker without a process, fitting a trial, that reported last so many seconds ago."""
    nothing: Any = None
    last_report_at = time.monotonic() - silent_s
    job = None if trial is None else fit_job(trial)
    return LocalWorker(
        index=0,
        settings=WorkerSettings(),
        process=nothing,
        connection=nothing,
        log=Path(),
        is_ready=True,
        job=job,
        last_report_at=last_report_at,
    )


def fit_job(trial: int) -> FitJob:
    config = configs.load(None).with_params({})
    caches = CachePaths(Path("cache"))
    return FitJob(trial=trial, fold=0, config=config, folder=Path(), caches=caches, train=(), held_out=(), seed=0)


def left_s(epoch_s: dict[int, float], *busy: LocalWorker) -> float | None:
    pool = LocalPool(Path())
    pool._workers = list(busy)
    pool._epoch_s = epoch_s
    return pool.epoch_left_s()


def test_the_epochs_being_trained_end_when_the_longest_does() -> None:
    first, second = worker(1, 4.0), worker(2, 1.0)
    assert left_s({1: 10.0, 2: 3.0}, first, second) == pytest.approx(6.0, abs=0.5)
    assert left_s({1: 2.0, 2: 0.5}, first, second) == 0.0


def test_an_epoch_of_a_trial_without_any_before_may_take_any_time() -> None:
    first, second = worker(1), worker(2)
    found = left_s({1: 10.0}, first, second)
    assert found is not None
    assert math.isnan(found)


def test_without_a_fit_no_epoch_is_trained() -> None:
    assert left_s({1: 10.0}, worker(None)) is None
    assert left_s({}) is None


def test_a_worker_killed_while_it_starts_leaves_a_line_and_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with workers_in_process(), LocalPool(tmp_path) as pool:
        with monkeypatch.context() as patch:
            patch.setattr(process, "serve", lambda settings, send, receive: receive())
            pool.resize(ONE)
            pool._workers[0].kill()
        assert wait_for(pool, Failed).job is None
        wait_for(pool, Ready)
    line = "worker 0 ended before it was ready, killed by SIGKILL (out of memory?); starting another"
    assert caplog.messages == [line]


class TestThreads(PoolContract):
    """The pool with its workers as threads of the test's own process."""

    @pytest.fixture
    def pool(self, tmp_path: Path) -> Iterator[LocalPool]:
        with workers_in_process(), LocalPool(tmp_path) as pool:
            yield pool


@pytest.mark.slow
class TestProcesses(PoolContract):
    @pytest.fixture
    def pool(self, tmp_path: Path) -> Iterator[LocalPool]:
        with LocalPool(tmp_path) as pool:
            yield pool
