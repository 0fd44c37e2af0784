"""Whole studies in which the coordinator is real, but whose fits are written down instead of trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from hpsearch.search.callbacks import StudyCallback
from hpsearch.search.coordinator import Coordinator
from hpsearch.search.stopping import Stop
from hpsearch.workers import loop
from hpsearch.workers.jobs import ClusterWorker, EpochEnded, Finished, FitJob, Job, Report, Stopped, WorkerSettings
from hpsearch.workers.pool import Event, Worker
from tests.recorded import FakeStudy, finish_fit, trial_quality, write_epoch
from tests.search.in_process import PLAN


class InterruptedStudyError(Exception):
    """The process of the study was killed."""


class SimulatedWorker(Worker):
    """A worker without a process."""

    def send(self, message: Mapping[str, Any]) -> None: ...

    def kill(self) -> None:
        self.job = None


class SimulatedPool:
    """Workers that finish an epoch each time that chance picks them.

    A trial's score is `trial_quality`, and run noise that depends on the trial and the fold alone.
    """

    def __init__(self, study: FakeStudy, n_workers: int, rng: np.random.Generator, n_events: int | None) -> None:
        self.study = study
        self.workers: list[Worker] = [
            SimulatedWorker(index=n, settings=WorkerSettings(), is_ready=True) for n in range(n_workers)
        ]
        self.machines: dict[str, ClusterWorker] = {}
        self.fits: list[tuple[int, int]] = []
        """Trial and fold of every job, in order."""
        self._rng = rng
        self._n_left = n_events
        self._go = True

    def __len__(self) -> int:
        return len(self.workers)

    def idle(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.job is None]

    def busy(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.job is not None]

    def submit(self, worker: Worker, job: Job) -> None:
        assert isinstance(job, FitJob)
        worker.job = job
        self.fits.append((job.trial, job.fold))

    def reply(self, worker: Worker, *, go: bool) -> None:
        self._go = go

    def events(self, timeout_s: float) -> Iterator[Event]:
        if self._n_left == 0:
            raise InterruptedStudyError
        self._n_left = None if self._n_left is None else self._n_left - 1
        busy = self.busy()
        assert busy, "deadlock: no worker has a job, and the study is not over"
        worker = busy[int(self._rng.integers(len(busy)))]
        job = worker.job
        assert isinstance(job, FitJob)
        fit, images = self.study.record.fit(job.trial, job.fold), np.array(job.held_out)
        trial = self.study.record.trial(job.trial)
        noise = 0.01 * np.random.default_rng([trial.place, job.fold]).standard_normal()
        quality = float(np.clip(trial_quality(trial) + noise, 0.05, 0.95))
        epoch, n_epochs = len(fit.epochs()) + 1, self.study.n_epochs
        if epoch <= n_epochs:
            write_epoch(fit.paths, epoch, float(epoch), quality, job.fold, images, n_epochs)
            yield Event(worker, job, EpochEnded(fit.epochs()[-1]))
        if epoch >= n_epochs or not self._go:
            report: Report = Stopped()
            if epoch >= n_epochs:
                finish_fit(fit.paths, quality, job.fold, images, 16, self.study.machine)
                if self._n_left == 0:
                    raise InterruptedStudyError
                summary = fit.summary()
                assert summary is not None
                report = Finished(summary.value)
            worker.job = None
            yield Event(worker, job, report)


def simulate(
    project: Path,
    *overrides: str,
    n_workers: int = 1,
    seed: int = 0,
    interrupt_after: Sequence[int] = (),
    **more: Any,
) -> tuple[FakeStudy, list[tuple[int, int]]]:
    """Run a study whose workers finish epochs in the order of `seed`; return it and the fits, in order.

    The process is killed after each of these numbers of epochs, and the study then continues. If a fit has finished
    with this epoch, the coordinator has not heard of it.
    """
    study, rng, fits = FakeStudy(project, overrides=overrides, **more), np.random.default_rng(seed), []
    caches: Any = SimpleNamespace(paths=lambda config: (Path("images"), None))
    for n_events in (*interrupt_after, None):
        pool: Any = SimulatedPool(study, n_workers, rng, n_events)
        coordinator = Coordinator(study.record, pool, PLAN, caches, StudyCallback(), Stop(), lambda: None)
        coordinator.resume()
        with contextlib.suppress(InterruptedStudyError):
            loop.run(pool, coordinator)
        fits += pool.fits
    return study, fits
