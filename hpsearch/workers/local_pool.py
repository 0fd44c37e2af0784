"""Worker pool of local processes: start workers, give them jobs, and replace workers that die.

A worker runs `hpsearch.workers.process` in a process of its own, which is not started by `multiprocessing`. The pool
therefore also works in notebooks and in scripts without a main guard, and a worker does not copy the coordinator's
memory. Messages are JSON objects sent over a socket pair, so nothing is ever unpickled.
"""

import contextlib
import json
import logging
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from hpsearch import subprocesses
from hpsearch.errors import WorkerError
from hpsearch.workers.jobs import Failed, Ready, WorkerSettings, from_message
from hpsearch.workers.pool import Event, Worker, WorkerPool

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 300.0
"""Time in seconds within which a worker must become ready. Importing torch from a cold network disk is slow."""
MAX_FAILED_STARTS = 3


@dataclass(eq=False, kw_only=True)
class LocalWorker(Worker):
    """A worker process and its current job."""

    process: subprocess.Popen[bytes]
    connection: Connection
    log: Path

    def send(self, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self.connection.send_bytes(json.dumps(message).encode())

    def kill(self) -> None:
        self.process.kill()
        # Wait until the process can no longer write. If the system cannot end it in time, it stays in the pool until
        # its socket closes, which `events` notices.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)


class LocalPool(WorkerPool):
    """Pool of worker processes on this machine."""

    def __init__(self, log_folder: Path) -> None:
        super().__init__()
        self._workers: list[LocalWorker] = []
        self._log_folder = log_folder
        self._failed_starts = 0

    def resize(self, settings: Sequence[WorkerSettings]) -> None:
        wanted = dict(enumerate(settings))
        kept = {worker.index: worker for worker in self._workers if worker.settings == wanted.get(worker.index)}
        _end([worker for worker in self._workers if worker.index not in kept])
        self._workers = [kept.get(index) or self._start(index, each) for index, each in wanted.items()]

    def events(self, timeout_s: float) -> Iterator[Event]:
        by_connection = {worker.connection: worker for worker in self._workers}
        self._forgive_pause()
        ready = set(wait(list(by_connection), timeout_s))
        self._polled_at = time.monotonic()
        for connection, worker in by_connection.items():
            if connection in ready:
                yield self._receive(worker)
            elif not worker.is_ready and time.monotonic() - worker.last_report_at > START_TIMEOUT_S:
                worker.kill()

    def close(self) -> None:
        _end(self._workers)
        self._workers = []

    def _receive(self, worker: LocalWorker) -> Event:
        try:
            report = from_message(json.loads(worker.connection.recv_bytes()))
        except (EOFError, OSError):
            return self._reap(worker)
        if isinstance(report, Ready):
            self._failed_starts = 0
        return self._note(worker, report)

    def _start(self, index: int, settings: WorkerSettings) -> LocalWorker:
        ours, theirs = socket.socketpair()
        log = self._log_folder / f"worker{index}.log"
        # Thread counts affect floating-point results, and some libraries read them only from these variables.
        threads = str(settings.threads)
        with log.open("wb") as output:
            process = subprocess.Popen(
                subprocesses.command("hpsearch.workers.process", str(theirs.fileno()), json.dumps(vars(settings))),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=subprocesses.environment(OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads),
                pass_fds=[theirs.fileno()],
                # Ctrl-C in the terminal reaches only the coordinator. A worker ends when its socket closes.
                start_new_session=True,
            )
        theirs.close()
        connection = Connection(ours.detach())
        return LocalWorker(index=index, settings=settings, process=process, connection=connection, log=log)

    def _reap(self, worker: LocalWorker) -> Event:
        """Replace a worker whose process has ended. Raises WorkerError if workers cannot be started at all."""
        _end([worker])
        cause = _cause_of_death(worker)
        if not worker.is_ready:
            self._failed_starts += 1
            if worker.process.returncode > 0 or self._failed_starts >= MAX_FAILED_STARTS:
                raise WorkerError(f"worker {worker.index} did not start ({cause}); its output is in {worker.log}")
            logger.warning("worker %d ended before it was ready, %s; starting another", worker.index, cause)
        self._workers[self._workers.index(worker)] = self._start(worker.index, worker.settings)
        return Event(worker, worker.job, Failed(error="died", text=cause))


def _end(workers: Sequence[LocalWorker]) -> None:
    """Kill workers. This is safe at any time, because a fit resumes from its checkpoint."""
    for worker in workers:
        worker.process.kill()
        worker.connection.close()
    for worker in workers:
        worker.process.wait()


def _cause_of_death(worker: LocalWorker) -> str:
    code = worker.process.returncode
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    lines = worker.log.read_text(errors="replace").strip().splitlines() if worker.log.is_file() else []
    return f"exit status {code}: {lines[-1]}" if lines else f"exit status {code}"
