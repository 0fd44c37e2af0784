"""Servers on 127.0.0.1 that end with their `with` block: PostgreSQL and MLflow."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import psutil
import pytest

from tests.workers.dask_cluster import free_port

PATIENCE_S = 240
PASSWORD = "unguessable17"


class Postgres:
    """A PostgreSQL server with its data in a folder of its own; `stop` and `start` in between.

    The test is skipped where PostgreSQL is not installed.
    """

    def __init__(self) -> None:
        # Debian keeps the programs out of PATH.
        folders = os.pathsep.join([os.environ["PATH"], *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin")))])
        self._programs = {name: shutil.which(name, path=folders) for name in ("initdb", "postgres")}
        if None in self._programs.values():
            pytest.skip("PostgreSQL is not installed (initdb and postgres)")
        import psycopg

        self._driver = psycopg
        self._port = free_port()
        # Not in pytest's folder: PostgreSQL does not run as root, and another user may not read that folder.
        self._folder = Path(tempfile.mkdtemp(prefix="hpsearch-postgres-"))
        self._user: dict[str, Any] = {"user": 65534, "group": 65534} if os.geteuid() == 0 else {}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        if self._user:
            os.chown(self._folder, self._user["user"], self._user["group"])
        (self._folder / "password").write_text(PASSWORD)
        (self._folder / "password").chmod(0o644)
        how = ("--auth=scram-sha-256", "--pwfile=password", "--username=hpsearch", "--encoding=UTF8", "--no-sync")
        command = [str(self._programs["initdb"]), "-D", "data", *how]
        done = subprocess.run(command, cwd=self._folder, capture_output=True, text=True, **self._user)
        assert done.returncode == 0, done.stderr
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def url(self, database: str = "postgres", password: str = PASSWORD) -> str:
        return f"postgresql+psycopg://hpsearch:{password}@127.0.0.1:{self._port}/{database}"

    def start(self) -> None:
        """Start the server and wait until it answers."""
        # Without fsync: processes die here, the machine does not.
        options = {"fsync": "off", "listen_addresses": "127.0.0.1", "unix_socket_directories": ""}
        command = [str(self._programs["postgres"]), "-D", "data", "-p", self._port]
        command += [f"--{name}={value}" for name, value in options.items()]
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(command, cwd=self._folder, stdout=log, stderr=log, **self._user)
        give_up_at = time.monotonic() + PATIENCE_S
        while not self._answers():
            assert self._process.poll() is None, (self._folder / "server.log").read_text()
            assert time.monotonic() < give_up_at, "PostgreSQL does not answer"
            time.sleep(0.1)

    def stop(self) -> None:
        """Stop the server at once, as a crash would. What was committed stays."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                # A server that has only begun to start loses the signal.
                self._process.kill()
                self._process.wait()
            self._process = None

    def create(self, database: str) -> str:
        """Create a database and return its URL."""
        with self._connect() as connection:
            connection.execute(f'CREATE DATABASE "{database}"')
        return self.url(database)

    def _connect(self) -> Any:
        return self._driver.connect(self.url().replace("+psycopg", ""), autocommit=True, connect_timeout=2)

    def _answers(self) -> bool:
        try:
            self._connect().close()
        except self._driver.OperationalError:
            return False
        return True


@contextlib.contextmanager
def mlflow_server(folder: Path, port: str, *arguments: str, command: str = "server") -> Iterator[str]:
    """The address of an `mlflow server` that runs in `folder`; it and what it started are gone afterwards."""
    full = [sys.executable, "-m", "mlflow", command, "--host", "127.0.0.1", "--port", port, *arguments]
    # Its queues for judging language models take ten more processes.
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "server.log").open("ab") as log:
        server = psutil.Popen(full, cwd=folder, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(PATIENCE_S):
            if server.poll() is not None:
                break
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            time.sleep(1)
        if server.poll() is not None:
            pytest.fail(f"mlflow {command} ended: {(folder / 'server.log').read_text()}")
        yield address
    finally:
        processes = [*server.children(recursive=True), server] if server.is_running() else []
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes)
