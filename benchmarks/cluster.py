"""Measure how a study scales with the workers of a Dask cluster, and whether its coordinator keeps up with 1000.

    python benchmarks/cluster.py sleeping                 1, 2, 4 and 8 Dask workers, about 5 minutes on two cores
    python benchmarks/cluster.py simulated                1000 simulated Dask workers, many minutes on two cores
    python benchmarks/cluster.py simulated --finished 2000
    python benchmarks/cluster.py sleeping simulated --quick    a minute: shows that it works, its figures mean nothing

sleeping: `run_study` on a real `dask scheduler` and real `dask worker` processes on 127.0.0.1. In the worker
processes, the training and evaluation of an epoch are replaced by sleep (`sleeping/sitecustomize.py`). Everything
else is real, with the default sampler and pruner. An epoch takes 2 s, which is short: epochs at 64x64 on a CPU take
about as long, those at 572x572 on a GPU longer. The work between two epochs does not depend on their length, so
longer epochs scale better. Epochs are counted for 40 s, from the moment when each worker has finished two:

    epochs/s   epochs per second, all workers together
    linear     the same as a share of the number of workers times the epochs per second of one worker
    training   share of the time of the workers in which they train (sleep), over the same 40 s
    epochs     median time in ms from the end of an epoch to the start of the next one: checkpoint, messages, decision
    fits       median time in ms from the last epoch of a fit to the first epoch of the next fit on the same worker

simulated: the coordinator, its loop, its record, `DaskPool` and the callback of the command line are real. Dask, its
workers and the time are simulated. Fits have 10 epochs of 48 to 72 s and search the space of
`experiments/isic2017.toml`, with 5 folds of 430 images, TPE and racing. With `--finished N`, the study has N finished
trials, and a fit on each worker was interrupted at some epoch, as if the command had just been started again. With 0,
the study is new. The simulated clock advances by the processor time that the coordinator needs, so other programs on
the machine do not matter. A call of Dask's scheduler counts as 2 ms, and each time that a file or a folder is forced
to disk as 5 ms, as on a shared file system. Other access to files counts as processor time only. Given are:

    answer      from the moment when the report of an epoch has arrived until the answer is sent. The epoch is then
                recorded, and the pruner's decision is made and written.
    next job    from the moment when the last report of a fit has arrived until the next fit of the worker is sent.
                In most cases, a trial must be suggested first.
    start, then before and after the moment when each worker has had a fit
    busy        share of the time after the start in which the coordinator does not wait for reports
    view        with `--view`, processor time in s of one update of Optuna's database after a trial has changed. In a
                study, a thread of the same process does it. It is not part of the simulation.
    call        functions of the coordinator after the start, in ms
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import heapq
import io
import itertools
import json
import os
import queue
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray
from setting import draw_images

from hpsearch import config as configs
from hpsearch import paths
from hpsearch.cli.progress import StudyProgress
from hpsearch.config import StudyConfig
from hpsearch.data.folds import make_folds
from hpsearch.paths import FitPaths, ProjectPaths
from hpsearch.search import coordinator as coordinators
from hpsearch.search import new_trials
from hpsearch.search.autotune import MachineChoice
from hpsearch.search.callbacks import StudyCallback
from hpsearch.search.coordinator import Coordinator
from hpsearch.search.evaluation import StudyPruner
from hpsearch.search.optuna_view import OptunaView
from hpsearch.search.status import forecast
from hpsearch.search.stopping import Stop
from hpsearch.store import lock
from hpsearch.store.fits import FitRecord
from hpsearch.store.record import StudyRecord
from hpsearch.store.trials import PruneDecision, TrialRecord
from hpsearch.store.versions import code_version, now
from hpsearch.study import run_study
from hpsearch.training.checkpoint import save_array
from hpsearch.training.rows import EpochRow, FitSummary, Scores, to_line
from hpsearch.typed_json import from_json, to_json
from hpsearch.workers import dask_connection, dask_pool, jobs, loop
from hpsearch.workers.dask_pool import DaskPool
from hpsearch.workers.dask_task import ENDED, POLL_S, STARTED
from hpsearch.workers.jobs import (
    Capacity,
    ClusterWorker,
    EpochEnded,
    Finished,
    FitJob,
    Job,
    Ready,
    Stopped,
    WorkerSettings,
)
from hpsearch.workers.plan import ExecutionPlan, sample_space
from hpsearch.workers.pool import Worker

ROOT = Path(__file__).parents[1]
SLEEPING = Path(__file__).parent / "sleeping"
N_EPOCHS, EPOCH_S = 10, 60.0
N_IMAGES, N_FOLDS = 2150, 5
SYNC_S, CALL_S = 0.005, 0.002
"""Simulated time in seconds of forcing a file or a folder to disk, and of a call of Dask's scheduler."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=["sleeping", "simulated", []], help="default: both")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of sleeping workers")
    parser.add_argument("--simulated", type=int, default=1000, help="number of simulated workers")
    parser.add_argument("--finished", type=int, nargs="+", default=[0, 2000], help="finished trials of the study")
    parser.add_argument("--seconds", type=float, default=60.0, help="measured time of each simulated study")
    parser.add_argument("--view", action="store_true", help="measure Optuna's database, too: minutes for 2000 trials")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if not options.what or "sleeping" in options.what:
        print_sleeping(*([1, 2], 0.5, 5.0) if options.quick else (options.workers, 2.0, 40.0))
    if not options.what or "simulated" in options.what:
        size = Size(20, 120.0) if options.quick else Size(options.simulated, options.seconds)
        for n_finished in [10] if options.quick else options.finished:
            print_simulated(size, n_finished, view=options.view or options.quick)


# --- sleeping workers on a real cluster


def print_sleeping(numbers: Sequence[int], epoch_s: float, window_s: float) -> None:
    """Print the table of sleeping workers."""
    print(f"sleeping workers, epochs of {epoch_s:g} s, {window_s:g} s each")
    print(f"{'workers':>7} {'epochs/s':>9} {'linear':>7} {'training':>9} {'epochs':>7} {'fits':>5}")
    first = 0.0
    for n_workers in numbers:
        window = run_sleeping(n_workers, epoch_s, window_s)
        rate, (between_epochs, between_fits) = window.rate(), window.gaps()
        first = first or rate / n_workers
        print(f"{n_workers:7} {rate:9.3f} {rate / first / n_workers:7.1%} {window.training():9.1%}", end=" ")
        print(f"{1000 * between_epochs:7.0f} {1000 * between_fits:5.0f}", flush=True)


def run_sleeping(n_workers: int, epoch_s: float, window_s: float) -> Window:
    """Run a study on so many Dask workers until the window is over."""
    with tempfile.TemporaryDirectory() as name, dask_cluster(Path(name), n_workers, epoch_s) as address:
        project = ProjectPaths(Path(name))
        config = configs.load(None, sleeping_settings(draw_images(Path(name) / "ISIC-2017", 38)))
        plan = ExecutionPlan(device="cpu", precision="float32", workers=(WorkerSettings(),), memory_bytes=2**33)
        StudyRecord.create(project.study("sleeping"), config).write_plan(to_json(plan))
        stop, window = Stop(), Window(n_workers, window_s)
        machine, callback = MachineChoice("cpu", n_workers, 1, address, 60.0), StopAfter(window, stop)
        with mock.patch.object(dask_pool, "DaskPool", functools.partial(WatchedPool, window)):
            record = run_study(project, "sleeping", config, machine=machine, callback=callback, stop=stop).record
        window.fits = [[record.fit(*fit).epochs() for fit in fits] for fits in window.submitted.values()]
        return window


@dataclasses.dataclass
class Window:
    """Time in which all workers train, from the moment when each of them has finished two epochs."""

    n_workers: int
    seconds: float
    began_at: float = 0.0
    submitted: dict[int, list[tuple[int, int]]] = dataclasses.field(default_factory=lambda: defaultdict(list))
    """Trial and fold of the fits of each worker, in order."""
    ready: set[int] = dataclasses.field(default_factory=set)
    """Workers that have finished two epochs. Their processes have then imported all that they need."""
    fits: list[list[list[EpochRow]]] = dataclasses.field(default_factory=list)
    """Epochs of the fits of each worker, in order."""

    def note(self, trial: int, fold: int, epoch: int) -> None:
        """Note that a fit has finished an epoch."""
        if not self.began_at and epoch >= 2:
            self.ready |= {worker for worker, fits in self.submitted.items() if (trial, fold) in fits}
            self.began_at = time.time() if len(self.ready) == self.n_workers else 0.0

    @property
    def is_over(self) -> bool:
        return bool(self.began_at) and time.time() > self.began_at + self.seconds

    def rate(self) -> float:
        """Return the epochs per second in the window. An epoch counts with its part that lies in the window."""
        return sum(inside / seconds for inside, seconds in self._epochs()) / self.seconds

    def training(self) -> float:
        """Return the share of the workers' time in the window in which they train."""
        return sum(inside for inside, _ in self._epochs()) / self.seconds / self.n_workers

    def gaps(self) -> tuple[float, float]:
        """Return the median seconds between the epochs of a fit, and between the fits of a worker."""
        fits = [fit for of_worker in self.fits for fit in of_worker]
        epochs = [_gap(*pair) for fit in fits for pair in itertools.pairwise(fit)]
        ends = [(of_worker[n][-1], fit[0]) for of_worker in self.fits for n, fit in enumerate(of_worker[1:]) if fit]
        return float(np.median(epochs)), float(np.median([_gap(*pair) for pair in ends] or [np.nan]))

    def _epochs(self) -> Iterator[tuple[float, float]]:
        """Yield the seconds of each epoch that lie in the window, and all its seconds."""
        end_at = self.began_at + self.seconds
        for row in (row for of_worker in self.fits for fit in of_worker for row in fit):
            inside = min(row.time, end_at) - max(row.time - row.seconds, self.began_at)
            yield max(0.0, inside), row.seconds


def _gap(before: EpochRow, after: EpochRow) -> float:
    return after.time - after.seconds - before.time


class WatchedPool(DaskPool):
    """Pool that notes which workers have a fit."""

    def __init__(self, window: Window, *arguments: Any, **options: Any) -> None:
        self._window = window
        super().__init__(*arguments, **options)

    def submit(self, worker: Worker, job: Job) -> None:
        super().submit(worker, job)
        if isinstance(job, FitJob):
            self._window.submitted[worker.index].append((job.trial, job.fold))


class StopAfter(StudyCallback):
    """Callback that notes epochs, and stops the study after the window."""

    def __init__(self, window: Window, stop: Stop) -> None:
        self._window, self._stop = window, stop

    def epoch_ended(self, trial: int, fold: int, row: EpochRow) -> None:
        self._window.note(trial, fold, row.epoch)
        if self._window.is_over and not self._stop.is_requested:
            self._stop.request()


def sleeping_settings(data: Path) -> list[str]:
    """Return the settings of a study whose networks and images are small."""
    sizes = ["data.size=32", "unet.base_channels=2", "unet.depth=1", "unet.stacking=1", "train.batch_size=4"]
    space = ["search.unet.stacking=[1, 2]", "search.train.lr={low=0.01, high=0.3, log=true}"]
    return [f'data.root="{data}"', "train.epochs=10", "study.trials=1000", "study.folds=5", *sizes, *space]


@contextmanager
def dask_cluster(folder: Path, n_workers: int, epoch_s: float) -> Iterator[str]:
    """Run a Dask scheduler and Dask workers whose fits sleep. Yield the scheduler's address."""
    file = folder / "scheduler.json"
    changes = {"HPSEARCH_SLEEP_S": str(epoch_s), "OMP_NUM_THREADS": "1", "DASK_TEMPORARY_DIRECTORY": str(folder)}
    environment = {**os.environ, **changes, "PYTHONPATH": str(SLEEPING)}
    common = [*["--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0"], "--scheduler-file", str(file)]
    commands = [["scheduler", *common, "--port", "0"], *[["worker", *common, "--nthreads", "1"]] * n_workers]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        with (folder / "dask.log").open("wb") as log:
            processes += [
                subprocess.Popen([sys.executable, "-m", "dask", *each], stdout=log, stderr=log, env=environment)
                for each in commands
            ]
        while not file.is_file():
            time.sleep(0.1)
        yield json.loads(file.read_text())["address"]
    finally:
        # The Dask workers end with their scheduler, and their processes with them.
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait()


# --- a thousand simulated workers


@dataclasses.dataclass(frozen=True)
class Size:
    """Size of a simulated cluster."""

    n_workers: int
    seconds: float
    """Measured time after the start."""


def print_simulated(size: Size, n_finished: int, *, view: bool) -> None:
    """Run a simulated study and print how far its coordinator is behind."""
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        measured = run_simulated(Path(name), size, n_finished)
        view_s = update_seconds(ProjectPaths(Path(name))) if view else 0.0
    print(f"\n{size.n_workers} simulated workers, {n_finished} finished trials")
    print(f"{'':22} {'per s':>6} {'median':>8} {'95 %':>8} {'99 %':>8} {'longest':>8}")
    for (period, kind), lags in sorted(measured.lags.items()):
        quantiles = np.quantile(lags, [0.5, 0.95, 0.99, 1.0])
        seconds = measured.start_s if period == "start" else size.seconds
        print(f"{f'{period}, {kind}, s':22} {len(lags) / seconds:6.1f}", *(f"{each:8.3f}" for each in quantiles))
    print(f"start {measured.start_s:.1f} s; then busy {measured.busy_s / size.seconds:.0%}")
    if view:
        print(f"view {view_s:.2f} s")
    print(f"{'call':22} {'per s':>6} {'mean ms':>8} {'longest':>8} {'of the time':>11}")
    for call, seconds in sorted(measured.calls.items(), key=lambda item: -sum(item[1])):
        mean, longest = 1000 * float(np.mean(seconds)), 1000 * max(seconds)
        share = sum(seconds) / size.seconds
        print(f"{call:22} {len(seconds) / size.seconds:6.1f} {mean:8.1f} {longest:8.1f} {share:11.1%}", flush=True)


@dataclasses.dataclass
class Measured:
    """Times of a simulated study, in seconds."""

    start_s: float = 0.0
    busy_s: float = 0.0
    """Time after the start in which the coordinator did not wait for reports."""
    has_started: bool = False
    lags: dict[tuple[str, str], list[float]] = dataclasses.field(default_factory=lambda: defaultdict(list))
    calls: dict[str, list[float]] = dataclasses.field(default_factory=lambda: defaultdict(list))

    def note(self, kind: str, lag_s: float) -> None:
        """Note how long a report waited."""
        self.lags["then" if self.has_started else "start", kind].append(lag_s)


class Clock:
    """Clock of a simulated study: it advances with the processor time of the coordinator, and when that waits.

    Other programs on the machine therefore do not matter, and waiting takes no time.
    """

    def __init__(self) -> None:
        self._added_s, self._paused_at = -time.thread_time(), 0.0

    def now(self) -> float:
        """Return the time in seconds."""
        return self._added_s + (self._paused_at or time.thread_time())

    def advance(self, seconds: float) -> None:
        self._added_s += seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock while the process does the work of others."""
        self._paused_at = time.thread_time()
        try:
            yield
        finally:
            self._added_s -= time.thread_time() - self._paused_at
            self._paused_at = 0.0


TIMED: Mapping[str, tuple[Any, str]] = {
    "loop: poll": (Coordinator, "poll"),
    "loop: next_job": (Coordinator, "next_job"),
    "loop: submit": (DaskPool, "submit"),
    "loop: on_event": (Coordinator, "on_event"),
    "loop: Dask workers": (DaskPool, "_fill"),
    "  suggest": (new_trials, "suggest"),
    "  _study_state": (coordinators, "_study_state"),
    "  should_prune": (StudyPruner, "should_prune"),
    "  write_evaluation": (StudyRecord, "write_evaluation"),
    "  _remove_networks": (coordinators, "_remove_networks"),
    "  trial_ended": (StudyProgress, "trial_ended"),
}
"""Functions of the coordinator that are timed. The indented ones are called by the others."""


def timed(measured: Measured, clock: Clock, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that notes how long its calls take."""

    def call(*arguments: Any, **options: Any) -> Any:
        began = clock.now()
        try:
            return function(*arguments, **options)
        finally:
            if measured.has_started:
                measured.calls[name].append(clock.now() - began)

    return call


def run_simulated(folder: Path, size: Size, n_finished: int) -> Measured:
    """Run a study on simulated workers: its start, and then for the measured time."""
    project, measured = ProjectPaths(folder), Measured()
    study = project.study("simulated")
    with mock.patch("os.fsync"):
        record = write_study(project, size, n_finished)
    plan = from_json(ExecutionPlan, record.plan() or {})
    # It runs git once.
    code_version()
    stop, callback = Stop(), StudyProgress("simulated", project)
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock.hold(study))
        clock = Clock()
        dask = SimulatedDask(size, measured, clock)
        for name, (owner, attribute) in TIMED.items():
            if hasattr(owner, attribute):
                function = timed(measured, clock, name, getattr(owner, attribute))
                stack.enter_context(mock.patch.object(owner, attribute, function))
        stack.enter_context(mock.patch("os.fsync", functools.partial(_advance, clock)))
        stack.enter_context(mock.patch("time.monotonic", clock.now))
        stack.enter_context(mock.patch.object(dask_connection, "connect", return_value=dask))
        stack.enter_context(mock.patch.object(dask_connection, "examine", _examine))
        check, options = lambda: None, {"device": "cpu", "limit": 0, "timeout_s": 60.0}
        pool = stack.enter_context(DaskPool("simulated", study.holder, check, print, **options))
        pool._messages = dask  # type: ignore[assignment]
        coordinator = Coordinator(record, pool, plan, Caches(), callback, stop, lambda: None)  # type: ignore[arg-type]
        pool.resize(plan.workers)
        callback.planned(record, plan, forecast(record, plan, N_IMAGES))
        coordinator.resume()
        loop.run(pool, Watched(coordinator, dask, size, measured, clock))
    return measured


def _examine(client: Any, addresses: Sequence[str], probe: Path, device: str) -> dict[str, ClusterWorker]:
    """Stand for `dask_workers.examine`: all workers are equal."""
    capacity = Capacity(device="cpu", precision="float32", memory_bytes=2**40)
    return {
        each: ClusterWorker(address=each, host=each, device_name="simulated", unit=each, threads=8, capacity=capacity)
        for each in addresses
    }


def _advance(clock: Clock, descriptor: int) -> None:
    """Stand for os.fsync."""
    clock.advance(SYNC_S)


def update_seconds(project: ProjectPaths) -> float:
    """Return the seconds that Optuna's database needs to show one changed trial of a study that it knows."""
    study = project.study("simulated")
    view, record = OptunaView(study), StudyRecord.open(study)
    view.update()
    record.write_evaluation(record.trial(record.trial_numbers()[-1]))
    began = time.thread_time()
    view.update()
    return time.thread_time() - began


class Caches:
    """Stands for the caches of images, which the simulated workers do not read."""

    def paths(self, config: StudyConfig) -> tuple[Path, None]:
        return Path("cache"), None


class Watched:
    """The coordinator as work for the loop. It ends the loop after the start and the measured time."""

    is_over = False

    def __init__(self, work: Coordinator, dask: SimulatedDask, size: Size, measured: Measured, clock: Clock) -> None:
        self._work, self._dask, self._size, self._measured, self._clock = work, dask, size, measured, clock
        self._began_at = clock.now()
        self.next_job, self.on_event = work.next_job, work.on_event

    def poll(self) -> bool:
        at, measured = self._clock.now(), self._measured
        if not measured.has_started and len(self._dask.used) == self._size.n_workers:
            measured.start_s, measured.has_started = at - self._began_at, True
            self._began_at, self._dask.waited_s = at, 0.0
        if measured.has_started and at > self._began_at + self._size.seconds:
            measured.busy_s = self._size.seconds - self._dask.waited_s
            return False
        return self._work.poll()


class SimulatedDask:
    """Stands for `distributed.Client` with its workers, and for the queue of their reports in `DaskPool`."""

    status = "running"

    def __init__(self, size: Size, measured: Measured, clock: Clock) -> None:
        self._measured, self._clock = measured, clock
        self._addresses = {
            f"tcp://10.0.{n // 250}.{n % 250}:40000": {"memory_limit": None, "resources": {}}
            for n in range(size.n_workers)
        }
        self._handlers: dict[str, Callable[[tuple[float, str]], None]] = {}
        self._fits: dict[str, tuple[FitJob, list[EpochRow]]] = {}
        self._due: list[tuple[float, int, str, jobs.Report | None]] = []
        """Time, number, worker and report of everything that will happen. None is the end of an epoch."""
        self._available: dict[str, float] = {}
        """Time at which the report became available that each worker sent last."""
        self._parts: dict[str, float] = {}
        """Part of the next epoch that is left in a fit that continues."""
        self._ready: list[tuple[Any, str]] = []
        self._count, self._rng = itertools.count(), np.random.default_rng(0)
        self.used: set[str] = set()
        """Workers that have had a fit."""
        self.waited_s = 0.0

    @property
    def scheduler(self) -> Any:
        return mock.Mock(identity=lambda: {"workers": self._addresses}, log_event=self._log_event)

    def sync(self, function: Callable[..., Any], *, callback_timeout: float, **options: Any) -> Any:
        return function(**options)

    def run(self, function: Callable[[], Any], workers: Sequence[str], on_error: str) -> dict[str, Any]:
        return dict.fromkeys(workers, function())

    def subscribe_topic(self, name: str, handler: Callable[[tuple[float, str]], None]) -> None:
        self._handlers[name] = handler

    def submit(self, function: Any, name: str, settings: Any, **options: Any) -> Any:
        self._handlers[name]((time.time(), STARTED))
        self._add(0.0, name, Ready())
        return mock.Mock(status="pending", key=name)

    def cancel(self, futures: Sequence[Any]) -> None:
        """Cancel tasks. Real ones notice it within `dask_task.POLL_S`."""
        self._clock.advance(POLL_S)
        for future in futures:
            self._fits.pop(future.key, None)
            self._handlers[future.key]((time.time(), ENDED))

    def close(self) -> None:
        pass

    def _log_event(self, topic: str, msg: str) -> None:
        """Take a job or a reply from the coordinator."""
        self._clock.advance(CALL_S)
        name, is_reply = topic.removesuffix("-commands"), msg.startswith('{"go"')
        if name in self._available:
            lag_s = self._clock.now() - self._available.pop(name)
            self._measured.note("answer" if is_reply else "next job", lag_s)
        with self._clock.paused():
            if is_reply:
                self._go_on(name, go=json.loads(msg)["go"])
            else:
                self._begin(name, jobs.from_message(json.loads(msg)))

    def get(self, timeout: float) -> tuple[Any, str]:
        """Return the next report as soon as its time has come. Raises queue.Empty after the timeout."""
        until = self._clock.now() + timeout
        while not self._ready:
            if not self._due or self._due[0][0] > until:
                self._wait(until)
                raise queue.Empty
            at, _, name, report = heapq.heappop(self._due)
            self._wait(at)
            with self._clock.paused():
                self._happen(at, name, report)
        return self._ready.pop()

    def put(self, message: tuple[Any, str]) -> None:
        self._ready.append(message)

    def _wait(self, until: float) -> None:
        if (wait_s := until - self._clock.now()) > 0:
            self.waited_s += wait_s
            self._clock.advance(wait_s)

    def _add(self, in_s: float, name: str, report: jobs.Report | None) -> None:
        heapq.heappush(self._due, (self._clock.now() + in_s, next(self._count), name, report))

    def _happen(self, at: float, name: str, report: jobs.Report | None) -> None:
        """Let a worker end an epoch, or send a report."""
        if report is None and name in self._fits:
            job, rows = self._fits[name]
            scores = fit_scores(job.trial, job.fold)[: len(rows) + 1]
            rows.append(epoch_row(len(scores), scores[-1]))
            save_array(FitPaths(job.folder).scores, scores)
            paths.append_line(FitPaths(job.folder).epochs, to_line(rows[-1]))
            report = EpochEnded(rows[-1])
        if name in self._fits:
            self._available[name] = at
        if report is not None:
            self._handlers[name]((at, json.dumps(jobs.to_message(report))))

    def _begin(self, name: str, job: Job) -> None:
        assert isinstance(job, FitJob)
        self.used.add(name)
        self._fits[name] = job, FitRecord(FitPaths(job.folder)).epochs()
        if rows := self._fits[name][1]:
            # A fit that continues reports its last epoch again, and is somewhere in the next one.
            self._parts[name] = self._rng.random()
            self._add(0.0, name, EpochEnded(rows[-1]))
        else:
            FitPaths(job.folder).root.mkdir(parents=True, exist_ok=True)
            self._add(EPOCH_S * self._rng.uniform(0.8, 1.2), name, None)

    def _go_on(self, name: str, *, go: bool) -> None:
        job, rows = self._fits[name]
        if not go and len(rows) < N_EPOCHS:
            self._add(0.0, name, Stopped())
        elif len(rows) < N_EPOCHS:
            self._add(self._parts.pop(name, 1.0) * EPOCH_S * self._rng.uniform(0.8, 1.2), name, None)
        else:
            write_end(FitPaths(job.folder), job.trial, job.fold)
            self._add(0.0, name, Finished(rows[-1].scores.dice))


def fit_scores(trial: int, fold: int) -> NDArray[np.float32]:
    """Return the scores of a fit after each of its epochs, (epochs, images)."""
    rng = np.random.default_rng([trial, 1])
    end = 0.83 + 0.005 * rng.standard_normal()
    speed, x = np.exp(rng.uniform(0, 2.9)), np.arange(1, N_EPOCHS + 1) / N_EPOCHS
    rng = np.random.default_rng([trial, fold, 2])
    curve = (end + 0.006 * rng.standard_normal()) * np.expm1(-speed * x) / np.expm1(-speed)
    images = 0.1 * np.random.default_rng([fold, 3]).standard_normal(N_IMAGES // N_FOLDS)
    noise = 0.06 * rng.standard_normal(N_IMAGES // N_FOLDS)
    return np.clip(curve[:, None] + images + noise, 0, 1).astype(np.float32)


def epoch_row(epoch: int, scores: NDArray[np.float32]) -> EpochRow:
    mean = float(scores.mean())
    found = Scores(1 - mean, mean, mean - 0.1, 0.95)
    costs = {"train_s": 0.9 * EPOCH_S, "eval_s": 0.1 * EPOCH_S, "images_per_s": 30.0, "peak_bytes": 2**33}
    return EpochRow(epoch=epoch, time=round(time.time(), 3), train=found, held_out=found, lr=0.01, **costs)


def write_fit(fit: FitPaths, trial: int, fold: int, n_epochs: int) -> None:
    """Write the epochs and scores of a fit."""
    scores = fit_scores(trial, fold)[:n_epochs]
    fit.root.mkdir(parents=True)
    save_array(fit.scores, scores)
    rows = [epoch_row(epoch, each) for epoch, each in enumerate(scores, start=1)]
    fit.epochs.write_text("".join(to_line(row) + "\n" for row in rows))
    if n_epochs == N_EPOCHS:
        write_end(fit, trial, fold)


def write_end(fit: FitPaths, trial: int, fold: int) -> None:
    """Write the last files of a fit, except networks and examples."""
    n_images = N_IMAGES // N_FOLDS
    save_array(fit.counts, np.tile(np.array([20, 5, 5, 70], np.int64), (n_images, 1)))
    score = float(fit_scores(trial, fold)[-1].mean(dtype=np.float64))
    paths.write_json(fit.fit, {"format": 1, **to_json(FitSummary(epochs=N_EPOCHS, value=score))})
    fit.attempt.unlink(missing_ok=True)


def write_study(project: ProjectPaths, size: Size, n_finished: int) -> StudyRecord:
    """Write a study with finished trials and, for each worker, a trial in the middle of a fit.

    A tenth of the finished trials are complete, the others were pruned after their first fold or in it.
    """
    settings = [f"train.epochs={N_EPOCHS}", "study.trials=100000", "study.folds=5", "study.seed=0"]
    config = configs.load(ROOT / "experiments" / "isic2017.toml", settings).absolute()
    record = StudyRecord.create(project.study("simulated"), config)
    ids = [f"ISIC_{number:07d}" for number in range(N_IMAGES)]
    folds = make_folds(ids, ["train"] * N_IMAGES, ids, folds=N_FOLDS, seed=0)
    record.write_folds(folds, "simulated")
    plan = ExecutionPlan(
        device="cuda", precision="bf16", workers=(WorkerSettings("cuda", 8),) * size.n_workers, memory_bytes=2**37
    )
    record.write_plan(to_json(plan))
    rng = np.random.default_rng(0)
    candidates = sample_space(config, n_finished + size.n_workers if n_finished else 1)
    # An empty study has no fits to continue.
    for number, candidate in enumerate(candidates if n_finished else ()):
        params = {name: configs.get_setting(candidate, name) for name in config.search}
        trial = TrialRecord(number=number, params=params, config=candidate.to_dict(), began_at=now())
        n_folds, n_epochs = 1, int(rng.integers(2, N_EPOCHS))
        if number >= n_finished:
            n_folds = 1 + int(rng.random() < 0.2)
        elif number % 10 == 0:
            n_folds, n_epochs = N_FOLDS, N_EPOCHS
        elif rng.random() < 0.5:
            n_epochs = N_EPOCHS
        for fold in range(n_folds):
            whole = N_EPOCHS if fold < n_folds - 1 else n_epochs
            write_fit(record.fit(number, fold).paths, number, fold, whole)
        if number < n_finished and n_folds == N_FOLDS:
            trial = dataclasses.replace(trial, outcome="complete", value=record.value(number), ended_at=now())
        elif number < n_finished:
            estimate = float(fit_scores(number, 0)[n_epochs - 1].mean())
            decisions = tuple(
                PruneDecision(epoch == n_epochs, estimate, 0, epoch, "below", 0.05, 0.01, 0.006, 0.001, 0)
                for epoch in range(1, n_epochs + 1)
            )
            ended = {"value": estimate, "ended_at": now(), "decisions": decisions}
            trial = dataclasses.replace(trial, outcome="pruned", **ended)
        record.write_evaluation(trial)
    return record


if __name__ == "__main__":
    main()
