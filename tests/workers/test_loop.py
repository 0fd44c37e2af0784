from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hpsearch import config as configs
from hpsearch.errors import DeviceError, StorageError, StudyError, WorkerError
from hpsearch.training.rows import EpochRow, Scores
from hpsearch.workers.jobs import (
    CachePaths,
    EpochEnded,
    Failed,
    Finished,
    FitJob,
    Job,
    Report,
    Stopped,
    WorkerSettings,
)
from hpsearch.workers.local_pool import Event
from hpsearch.workers.loop import run, run_job
from hpsearch.workers.pool import Worker

JOB = FitJob(
    trial=0,
    fold=0,
    config=configs.load(None).with_params({}),
    folder=Path("fold0"),
    caches=CachePaths(Path("cache")),
    train=(),
    held_out=(),
    seed=0,
)
DIED = Failed(error="died", text="killed by SIGKILL")
DONE = Finished(0.5)


def epoch(number: int) -> EpochEnded:
    scores = Scores(0.1, 0.5, 0.5, 0.5)
    return EpochEnded(
        EpochRow(
            epoch=number,
            time=0.0,
            train=scores,
            held_out=scores,
            lr=0.1,
            train_s=1.0,
            eval_s=0.0,
            images_per_s=1.0,
            peak_bytes=0,
        )
    )


@dataclass
class ScriptedWorker:
    index: int = 0
    job: Job | None = None
    last_report_at: float = 0.0
    capacity: None = None
    name: str = "worker 1"


@dataclass
class ScriptedPool:
    """One worker that reports what a script says; a job is submitted anew after each death."""

    reports: list[Report]
    worker: ScriptedWorker = field(default_factory=ScriptedWorker)
    submitted: int = 0
    replies: list[bool] = field(default_factory=list)

    def __len__(self) -> int:
        return 1

    def idle(self) -> list[ScriptedWorker]:
        return [] if self.worker.job else [self.worker]

    def busy(self) -> list[ScriptedWorker]:
        return [self.worker] if self.worker.job else []

    def submit(self, worker: object, job: Job) -> None:
        self.worker.job = job
        self.submitted += 1

    def reply(self, worker: object, *, go: bool) -> None:
        self.replies.append(go)

    def events(self, timeout_s: float) -> Iterator[Event]:
        report, job = self.reports.pop(0), self.worker.job
        if not isinstance(report, EpochEnded):
            self.worker.job = None
        yield Event(self.worker, job, report)

    def kill(self, worker: object) -> None: ...

    def resize(self, settings: Sequence[WorkerSettings]) -> None: ...

    def set_device(self, device: str) -> None: ...

    def epoch_left_s(self) -> float | None: ...

    def close(self) -> None: ...


def test_a_job_returns_its_last_report() -> None:
    pool = ScriptedPool([epoch(1), epoch(2), DONE])
    assert run_job(pool, JOB) == DONE
    assert pool.replies == [True, True]


def test_a_job_that_is_stopped_returns_nothing() -> None:
    pool = ScriptedPool([epoch(1), epoch(2), Stopped()])
    assert run_job(pool, JOB, on_epoch=lambda row: row.epoch < 2) is None
    assert pool.replies == [True, False]


def test_a_job_is_submitted_again_when_its_worker_dies() -> None:
    pool = ScriptedPool([epoch(1), DIED, DIED, epoch(2), DIED, DIED, DONE])
    assert run_job(pool, JOB) == DONE
    assert pool.submitted == 5


def test_a_job_that_ends_three_workers_without_an_epoch_in_between_is_given_up() -> None:
    pool = ScriptedPool([epoch(1), DIED, epoch(1), DIED, DIED, DONE])
    with pytest.raises(WorkerError, match=r"3 workers died during fit: killed by SIGKILL"):
        run_job(pool, JOB)


@pytest.mark.parametrize(
    ("failed", "error", "text"),
    [
        (Failed(error="DivergedError", text="nan"), StudyError, "^nan$"),
        (Failed(error="OutOfMemoryError", text="too large"), DeviceError, "^too large$"),
        (Failed(error="StorageError", text="disk full"), StorageError, "^disk full$"),
        (Failed(error="CacheError", text="no such file"), WorkerError, "^no such file$"),
        (Failed(text="KeyError: 3", traceback="line 7"), WorkerError, "a bug in hpsearch:\nline 7"),
    ],
)
def test_a_failure_becomes_the_error_that_it_was(failed: Failed, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        run_job(ScriptedPool([failed]), JOB)


def test_a_check_ends_the_waiting() -> None:
    def check() -> None:
        raise StudyError("stopped")

    with pytest.raises(StudyError, match="stopped"):
        run_job(ScriptedPool([DONE]), JOB, check=check)


class BusyPool:
    """Two idle workers, and a third one that has reported an epoch. Notes what it is asked for."""

    def __init__(self) -> None:
        self.free, self.calls = [ScriptedWorker(0), ScriptedWorker(1)], ["epoch waits"]

    def idle(self) -> list[ScriptedWorker]:
        return list(self.free)

    def busy(self) -> list[ScriptedWorker]:
        return [ScriptedWorker(2, JOB)]

    def submit(self, worker: ScriptedWorker, job: Job) -> None:
        self.free.remove(worker)
        self.calls.append(f"job of worker {worker.index}")

    def events(self, timeout_s: float) -> Iterator[Event]:
        if self.calls[-1] == "job of worker 0":
            yield Event(ScriptedWorker(2, JOB), JOB, epoch(1))  # type: ignore[arg-type]


class SlowToSuggest:
    """Work whose jobs take long to find."""

    def __init__(self, pool: BusyPool) -> None:
        self.pool = pool
        self.is_over = False

    def poll(self) -> bool:
        return bool(self.pool.free)

    def next_job(self, worker: Worker) -> Job:
        return JOB

    def on_event(self, event: Event) -> None:
        self.pool.calls.append("epoch is handled")


def test_a_report_is_handled_before_the_next_idle_worker_gets_a_job() -> None:
    pool = BusyPool()
    run(pool, SlowToSuggest(pool))  # type: ignore[arg-type]
    assert pool.calls == ["epoch waits", "job of worker 0", "epoch is handled", "job of worker 1"]
