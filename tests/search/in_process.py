"""Workers that are threads of the test's own process: they start at once, and what they are told can be watched.

Images are decoded in one subprocess and figures are not drawn, so that a study of a few fits takes seconds.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from hpsearch.config import StudyConfig
from hpsearch.data.decode_pool import Decoders
from hpsearch.paths import ProjectPaths
from hpsearch.store.record import StudyRecord
from hpsearch.study import StudySummary
from hpsearch.workers import process as worker
from hpsearch.workers.local_pool import Worker, Workers, WorkerSettings
from hpsearch.workers.plan import ExecutionPlan
from tests.conftest import draw_quickly
from tests.data.conftest import share_decoder
from tests.search.studies import run

PLAN = ExecutionPlan(device="cpu", precision="float32", workers=(WorkerSettings(),), memory_bytes=2**33)


@dataclass
class Watched:
    """What the coordinator told its workers, and with which arguments they called `fit`; both in order."""

    jobs: list[dict[str, Any]] = field(default_factory=list)
    fits: list[dict[str, Any]] = field(default_factory=list)

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The jobs of one kind: `fit`, `choose`, ..."""
        return [job for job in self.jobs if job["job"] == kind]


@contextmanager
def workers_in_process() -> Iterator[Watched]:
    """For the block, every worker is a thread of this process that does real jobs."""
    watched = Watched()
    submit, fit = Workers.submit, worker.fit

    def submit_and_note(self: Workers, to: Worker, job: Mapping[str, Any]) -> None:
        watched.jobs.append(dict(job))
        submit(self, to, job)

    def fit_and_note(**arguments: Any) -> Any:
        watched.fits.append(arguments)
        return fit(**arguments)

    with pytest.MonkeyPatch.context() as patch, Decoders(2) as decoders:
        share_decoder(decoders, patch)
        draw_quickly(patch)
        patch.setattr(Workers, "_start", _start)
        patch.setattr(Workers, "submit", submit_and_note)
        patch.setattr(worker, "fit", fit_and_note)
        yield watched


def run_planned(project: Path, config: StudyConfig, name: str = "tiny", **options: Any) -> StudySummary:
    """Run or continue a tiny study under `PLAN`, so that nothing has to be measured."""
    study = ProjectPaths(project).study(name)
    if not study.toml.is_file():
        StudyRecord.create(study, config).write_plan(PLAN.to_dict())
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

        def hear() -> dict[str, Any]:
            message: dict[str, Any] = json.loads(connection.recv_bytes())
            return message

        session = worker.Session(self._settings.device, self._settings.threads, send, hear)
        try:
            send({"event": "ready"})
            while True:
                session.do(hear())
        except (EOFError, OSError):
            # The coordinator is gone.
            pass
        finally:
            # The socket's own to close.
            connection._handle = None  # type: ignore[attr-defined]
            self._socket.close()


def _start(self: Workers, index: int, settings: WorkerSettings) -> Worker:
    ours, theirs = socket.socketpair()
    process: Any = _Thread(theirs, settings)
    return Worker(index, settings, process, Connection(ours.detach()), self._log_folder / f"worker{index}.log")
