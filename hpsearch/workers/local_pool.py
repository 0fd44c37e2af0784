"""Worker processes from the coordinator's side: started, handed jobs, heard, replaced when they die.

A worker runs `hpsearch.workers.process` in a process of its own, not a child of `multiprocessing`: it works from a
notebook and from an unguarded script, and the coordinator's memory is not copied into it. Messages are JSON objects
over a socket pair, so nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

from hpsearch import subprocesses
from hpsearch.errors import DeviceError, StorageError, StudyError, WorkerError

logger = logging.getLogger(__name__)

POLL_S = 0.25
PAUSE_S = 30.0
"""A coordinator that has not looked at its workers for so long was not running."""
DEATHS_PER_JOB = 3
"""A job, or a fold's fit, that has ended its worker so often without an epoch in between is given up."""
START_TIMEOUT_S = 300.0
"""A worker that has not said `ready` by then is not coming: importing torch from a cold network disk is slow."""


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker is given at its start and keeps for the whole study."""

    device: str = "cpu"
    threads: int = 1


@dataclass(eq=False)
class Worker:
    """One worker process and the job it has."""

    index: int
    settings: WorkerSettings
    process: subprocess.Popen[bytes]
    connection: Connection
    log: Path
    is_ready: bool = False
    job: dict[str, Any] | None = None
    heard_at: float = field(default_factory=time.monotonic)

    @property
    def is_idle(self) -> bool:
        return self.is_ready and self.job is None


@dataclass(frozen=True)
class Event:
    """What a worker said, and of which job.

    `kind` is `ready`, `epoch`, `finished`, `stopped`, `diverged`, `out_of_memory`, `error` or `died`.
    """

    worker: Worker
    kind: str
    job: dict[str, Any] | None
    message: dict[str, Any]


class Workers:
    """Worker processes, none at first. Use as a context manager: on leaving none is left running."""

    def __init__(self, log_folder: Path, check: Callable[[], None] = lambda: None) -> None:
        """`check` is called again and again while `do` and `do_each` wait, and ends the waiting by raising."""
        self.check = check
        self._log_folder = log_folder
        self._failed_starts = 0
        self._workers: list[Worker] = []
        self._asked_at = time.monotonic()
        self._epoch_s: dict[int, float] = {}
        """Trial to the seconds of its last epoch, of whichever fold."""

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._workers)

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers)

    def become(self, settings: Sequence[WorkerSettings]) -> None:
        """Have one worker for each of `settings`, in this order. One that is as it should be stays."""
        kept = self._workers[: len(settings)]
        _end(self._workers[len(settings) :])
        for index, wanted in enumerate(settings):
            if index == len(kept):
                kept.append(self._start(index, wanted))
            elif kept[index].settings != wanted:
                _end([kept[index]])
                kept[index] = self._start(index, wanted)
        self._workers = kept

    def settle(self, device: str, worker: Worker) -> None:
        """Note which device a worker found when it was told `auto`."""
        worker.settings = dataclasses.replace(worker.settings, device=device)

    def idle(self) -> list[Worker]:
        """Workers that are ready and have no job, by index."""
        return [worker for worker in self._workers if worker.is_idle]

    def busy(self) -> list[Worker]:
        return [worker for worker in self._workers if worker.job is not None]

    def submit(self, worker: Worker, job: Mapping[str, Any]) -> None:
        """Hand a job to an idle worker; it answers with events that carry the job."""
        worker.job = dict(job)
        worker.heard_at = time.monotonic()
        # A worker that has just died is noticed by `events`, with this job.
        with contextlib.suppress(OSError):
            _send(worker.connection, worker.job)

    def reply(self, worker: Worker, *, go: bool) -> None:
        """Answer an `epoch` event: go on with the next epoch, or stop here with a checkpoint."""
        worker.heard_at = time.monotonic()
        with contextlib.suppress(OSError):
            _send(worker.connection, {"go": go})

    def epoch_left_s(self) -> float | None:
        """Return the seconds until the epochs being trained end; NaN if not known, None if none is trained."""
        fits = [worker for worker in self._workers if worker.job is not None and worker.job["job"] == "fit"]
        expected = [self._epoch_s.get(worker.job["trial"], math.nan) for worker in fits if worker.job is not None]
        if not fits or any(map(math.isnan, expected)):
            return math.nan if fits else None
        now = time.monotonic()
        return max(max(0.0, s - (now - worker.heard_at)) for s, worker in zip(expected, fits, strict=True))

    def kill(self, worker: Worker) -> None:
        """End one worker at once; `events` reports its death and it is replaced."""
        _kill(worker.process)
        # What it wrote last is written then. One that the system cannot end is noticed by its silence.
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(10)

    def events(self, timeout_s: float) -> Iterator[Event]:
        """What the workers said within the timeout, in the order of their index. Dead workers are replaced."""
        by_connection = {worker.connection: worker for worker in self._workers}
        # A coordinator that was stopped itself (SIGSTOP) must not take its workers' silence for theirs.
        pause_s = time.monotonic() - self._asked_at
        if pause_s > PAUSE_S:
            for worker in self._workers:
                worker.heard_at += pause_s
        ready = set(wait(list(by_connection), timeout_s))
        self._asked_at = time.monotonic()
        for connection, worker in by_connection.items():
            if connection not in ready:
                if not worker.is_ready and time.monotonic() - worker.heard_at > START_TIMEOUT_S:
                    self.kill(worker)
                continue
            try:
                message = json.loads(connection.recv_bytes())
            except (EOFError, OSError):
                yield self._bury(worker)
                continue
            worker.heard_at = time.monotonic()
            job = worker.job
            if message["event"] == "ready":
                worker.is_ready = True
                self._failed_starts = 0
            elif message["event"] != "epoch":
                worker.job = None
            elif job is not None:
                self._epoch_s[job["trial"]] = message["row"]["train_s"] + message["row"]["eval_s"]
            yield Event(worker, message["event"], job, message)

    def close(self) -> None:
        """End all workers: politely when idle, at once when not."""
        _end(self._workers)
        self._workers = []

    def _start(self, index: int, settings: WorkerSettings) -> Worker:
        ours, theirs = socket.socketpair()
        log = self._log_folder / f"worker{index}.log"
        # Thread counts decide floating-point bytes, and some libraries read them only from here.
        threads = str(settings.threads)
        with log.open("wb") as output:
            process = subprocess.Popen(
                subprocesses.command("hpsearch.workers.process", str(theirs.fileno()), json.dumps(vars(settings))),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=subprocesses.environment(OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads),
                pass_fds=[theirs.fileno()],
                # Ctrl-C on the terminal is the coordinator's to hear; a worker ends when its socket closes.
                start_new_session=True,
            )
        theirs.close()
        return Worker(index, settings, process, Connection(ours.detach()), log)

    def _bury(self, worker: Worker) -> Event:
        worker.connection.close()
        _kill(worker.process)
        worker.process.wait()
        message = {"event": "died", "text": _cause_of_death(worker)}
        if not worker.is_ready:
            self._failed_starts += 1
            if worker.process.returncode > 0 or self._failed_starts >= 3:
                raise WorkerError(
                    f"worker {worker.index} did not start ({message['text']}); its output is in {worker.log}"
                )
        self._workers[self._workers.index(worker)] = self._start(worker.index, worker.settings)
        return Event(worker, "died", worker.job, message)


def do(
    workers: Workers,
    job: Mapping[str, Any],
    *,
    on_epoch: Callable[[dict[str, Any]], bool] = lambda row: True,
) -> dict[str, Any] | None:
    """Have the first worker do one job; its `finished` message, or None if `on_epoch` stopped it.

    `on_epoch` hears the row of every epoch and says whether to go on. When a worker dies, the next one goes on from
    its checkpoint. Raises what the job raised, or WorkerError when it has ended three workers without an epoch in
    between.
    """
    deaths = epochs = 0
    submitted = False
    while True:
        workers.check()
        if not submitted and (idle := workers.idle()):
            workers.submit(idle[0], job)
            submitted = True
        for event in workers.events(POLL_S):
            if event.kind == "finished":
                return event.message
            if event.kind == "stopped":
                return None
            if event.kind == "epoch":
                if event.message["row"]["epoch"] > epochs:
                    deaths, epochs = 0, event.message["row"]["epoch"]
                workers.reply(event.worker, go=on_epoch(event.message["row"]))
            elif event.kind == "diverged":
                raise StudyError(event.message["text"])
            elif event.kind == "out_of_memory":
                raise DeviceError(event.message["text"])
            elif event.kind == "error":
                _raise(event.message)
            elif event.kind == "died":
                deaths += 1
                submitted = False
                logger.warning("%s: worker %s", job["job"], event.message["text"])
                if deaths >= DEATHS_PER_JOB:
                    raise WorkerError(f"{job['job']} ended its worker {deaths} times: {event.message['text']}")


def do_each(workers: Workers, jobs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """Have as many workers as there are jobs do one each at the same time, once all are ready.

    Their `finished` messages in the order of the jobs, or None if any of them failed or died.
    """
    while len(workers.idle()) < len(workers):
        workers.check()
        for _ in workers.events(POLL_S):
            pass
    for worker, job in zip(workers.idle(), jobs, strict=False):
        workers.submit(worker, job)
    messages: dict[int, dict[str, Any]] = {}
    while workers.busy():
        workers.check()
        for event in workers.events(POLL_S):
            if event.kind == "finished":
                messages[event.worker.index] = event.message
            elif event.kind != "ready":
                logger.warning("worker %d could not be measured: %s", event.worker.index, event.message["text"])
    return [messages[index] for index in sorted(messages)] if len(messages) == len(jobs) else None


def _raise(message: Mapping[str, Any]) -> NoReturn:
    if message["is_storage"]:
        raise StorageError(message["text"])
    if message["is_known"]:
        raise WorkerError(message["text"])
    raise WorkerError(f"{message['text']}; this is a fault in hpsearch:\n{message['traceback']}")


def _end(workers: Sequence[Worker]) -> None:
    for worker in workers:
        if worker.job is not None or not worker.is_ready:
            _kill(worker.process)
        worker.connection.close()
    for worker in workers:
        try:
            worker.process.wait(10)
        except subprocess.TimeoutExpired:
            _kill(worker.process)
            worker.process.wait()


def _send(connection: Connection, message: Mapping[str, Any]) -> None:
    connection.send_bytes(json.dumps(message).encode())


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()


def _cause_of_death(worker: Worker) -> str:
    code = worker.process.returncode
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"killed by {name}{hint}"
    lines = worker.log.read_text(errors="replace").strip().splitlines() if worker.log.is_file() else []
    return f"exit status {code}: {lines[-1]}" if lines else f"exit status {code}"
