"""Workers that are threads of the test's own process: they start at once, and what they are told can be watched.

Images are decoded in one subprocess and figures are not drawn, so that a study of a few fits takes seconds.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import pytest

from hpsearch.config import StudyConfig
from hpsearch.data.batches import DeviceData
from hpsearch.data.decode_pool import Decoders
from hpsearch.paths import ProjectPaths
from hpsearch.store.record import StudyRecord
from hpsearch.study import StudySummary
from hpsearch.training.runtime import Runtime
from hpsearch.training.task import FitTask
from hpsearch.typed_json import to_json
from hpsearch.workers import process, tasks
from hpsearch.workers.jobs import Job, WorkerSettings
from hpsearch.workers.local_pool import LocalPool, LocalWorker
from hpsearch.workers.plan import ExecutionPlan
from tests.conftest import draw_quickly
from tests.data.conftest import share_decoder
from tests.search.studies import run

JobT = TypeVar("JobT")
PLAN = ExecutionPlan(device="cpu", precision="float32", workers=(WorkerSettings(),), memory_bytes=2**33)


@dataclass
class Watched:
    """The jobs that workers were given, and the arguments with which they called `fit`; both in order."""

    jobs: list[Job] = field(default_factory=list)
    fits: list[dict[str, Any]] = field(default_factory=list)

    def of(self, cls: type[JobT]) -> list[JobT]:
        """Return the jobs of one class."""
        return [job for job in self.jobs if isinstance(job, cls)]


@contextmanager
def workers_in_process() -> Iterator[Watched]:
    """For the block, every worker is a thread of this process that does real jobs."""
    watched = Watched()
    submit, fit = LocalPool.submit, tasks.fit

    def submit_and_note(self: LocalPool, to: LocalWorker, job: Job) -> None:
        watched.jobs.append(job)
        submit(self, to, job)

    def fit_and_note(task: FitTask, data: DeviceData, runtime: Runtime, **options: Any) -> Any:
        watched.fits.append({**vars(task), "data": data, "runtime": runtime, **options})
        return fit(task, data, runtime, **options)

    with pytest.MonkeyPatch.context() as patch, Decoders(2) as decoders:
        share_decoder(decoders, patch)
        draw_quickly(patch)
        patch.setattr(LocalPool, "_start", _start)
        patch.setattr(LocalPool, "submit", submit_and_note)
        patch.setattr(tasks, "fit", fit_and_note)
        yield watched


def run_planned(project: Path, config: StudyConfig, name: str = "tiny", **options: Any) -> StudySummary:
    """Run or continue a tiny study under `PLAN`, so that nothing has to be measured."""
    study = ProjectPaths(project).study(name)
    if not study.toml.is_file():
        StudyRecord.create(study, config).write_plan(to_json(PLAN))
    return run(project, config, name, machine=None, **options)


class _Thread:
    """Stands for the process of a worker."""

    def __init__(self, end: socket.socket, settings: WorkerSettings) -> None:
        self.returncode: int | None = None
        self._socket = end
        self._settings = settings
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        self.returncode = -9
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def wait(self, timeout: float | None = None) -> int:
        self._thread.join(timeout)
        self.returncode = self.returncode or 0
        return self.returncode

    def _serve(self) -> None:
        connection = Connection(self._socket.fileno())

        def send(message: dict[str, Any]) -> None:
            connection.send_bytes(json.dumps(message).encode())

        def receive() -> dict[str, Any]:
            message: dict[str, Any] = json.loads(connection.recv_bytes())
            return message

        try:
            process.serve(self._settings, send, receive)
        except (EOFError, OSError):
            # The coordinator is gone.
            pass
        finally:
            # The socket's own to close.
            connection._handle = None  # type: ignore[attr-defined]
            self._socket.close()


def _start(self: LocalPool, index: int, settings: WorkerSettings) -> LocalWorker:
    ours, theirs = socket.socketpair()
    thread: Any = _Thread(theirs, settings)
    connection, log = Connection(ours.detach()), self._log_folder / f"worker{index}.log"
    return LocalWorker(index=index, settings=settings, process=thread, connection=connection, log=log)
