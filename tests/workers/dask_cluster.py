"""A Dask cluster of real processes on 127.0.0.1, which ends with its `with` block."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

import psutil
from distributed import Client

START_S = 60.0


class DaskCluster:
    """A scheduler and its workers; all of them end with the block."""

    def __init__(self, folder: Path, n_workers: int = 0, *options: str, protocol: str = "tcp") -> None:
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self._port = free_port()
        self._protocol, self.address = protocol, f"{protocol}://127.0.0.1:{self._port}"
        self._n_workers, self._options = n_workers, options
        self._client: Any = None

    def __enter__(self) -> Self:
        try:
            self.start_scheduler()
            self._client = Client(self.address, timeout=START_S, set_as_default=False)
            for _ in range(self._n_workers):
                self.add_worker(*self._options)
            wait_until(lambda: len(self.workers()) == self._n_workers)
        except BaseException:
            self.__exit__()
            raise
        return self

    def start_scheduler(self) -> None:
        """Start the scheduler, always at the same address."""
        options = ("--port", self._port, "--protocol", self._protocol, "--no-dashboard")
        self.scheduler = self._run("scheduler", *options)

    def kill_scheduler(self) -> None:
        self.scheduler.kill()
        self.scheduler.wait()

    def worker_processes(self) -> list[psutil.Process]:
        """The processes of hpsearch that Dask workers have started."""
        tree = [each for process in self._processes for each in _with_children(process.pid)]
        return [each for each in tree if "hpsearch.workers.process" in _command_line(each)]

    def dask_workers(self) -> list[psutil.Process]:
        """The running Dask workers: the children of their nannies. Unlike `workers`, it asks no Dask worker."""
        trees = [_with_children(process.pid)[1:] for process in self._processes]
        return [each for tree in trees for each in tree if "spawn_main" in " ".join(_command_line(each))]

    def add_worker(self, *options: str, threads: int = 1) -> subprocess.Popen[bytes]:
        """Start a Dask worker. Without the option `--no-nanny`, its process is restarted when it ends."""
        return self._run("worker", self.address, "--nthreads", str(threads), "--no-dashboard", *options)

    def workers(self) -> dict[str, int]:
        """Process ids of the Dask workers, by address."""
        found: dict[str, int] = self._client.run(os.getpid)
        return found

    def __exit__(self, *_: object) -> None:
        if self._client is not None:
            with contextlib.suppress(OSError):
                self._client.close()
        tree = [each for process in self._processes for each in _with_children(process.pid)]
        for process in reversed(self._processes):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()
        for each in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()

    def _run(self, command: str, *options: str) -> subprocess.Popen[bytes]:
        with (self._folder / f"dask-{command}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "dask", command, "--host", "127.0.0.1", *options],
                cwd=self._folder,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", "DASK_TEMPORARY_DIRECTORY": str(self._folder)},
            )
        self._processes.append(process)
        return process


def free_port() -> str:
    """Return the number of a port at which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def wait_until(is_true: Any, patience_s: float = START_S) -> None:
    """Return as soon as `is_true()`."""
    give_up_at = time.monotonic() + patience_s
    while not is_true():
        if time.monotonic() > give_up_at:
            raise TimeoutError(f"not within {patience_s} s")
        time.sleep(0.05)


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return [] if process.status() == psutil.STATUS_ZOMBIE else process.cmdline()
    except psutil.NoSuchProcess:
        return []


def _with_children(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
