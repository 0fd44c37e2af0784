"""Lock a study for one process, describe the process that holds the lock, and write the study's log."""

import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

from hpsearch import paths
from hpsearch.errors import StudyLockedError
from hpsearch.paths import ProjectPaths, StudyPaths, command_line


@contextmanager
def hold(study: StudyPaths) -> Iterator[None]:
    """Hold the study's lock during the block. Raises StudyLockedError, naming the holder, if it is taken.

    The operating system releases the lock when the process ends, even if it is killed. Folders created here are
    removed if the study has no settings at the end of the block.
    """
    made = [path for path in (study.project.root, study.project.studies, study.root) if not path.exists()]
    try:
        study.root.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(study.lock)
        # Wait for a moment, because another process that calls `is_held` also acquires the lock briefly.
        lock.acquire(timeout=1)
    except filelock.Timeout as error:
        status, stop = (command_line(each, study.name, study.project) for each in ("status", "stop"))
        text = f"study {study.name!r} is being run by {describe_holder(study)}"
        raise StudyLockedError(f"{text}: watch it with `{status}`, stop it with `{stop}`") from error
    except OSError as error:
        raise paths.storage_error(study.lock, error) from error
    try:
        # A killed process may have left behind temporary files, and cluster workers that must no longer write. Remove
        # the attempts first, so that no worker can still rename a new temporary file.
        for attempt in study.root.rglob("attempt"):
            attempt.unlink(missing_ok=True)
        paths.remove_stale_temporaries(study.root)
        paths.write_json(study.holder, {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()})
        yield
    finally:
        # Ignore errors: a leftover file is harmless, because only the lock decides whether the study is running.
        with suppress(OSError):
            study.holder.unlink(missing_ok=True)
        is_empty = study.root in made and not study.toml.is_file()
        if is_empty:
            # Remove the folder while holding the lock, so that no other process can start the study in the meantime.
            shutil.rmtree(study.root, ignore_errors=True)
        lock.release()
        for path in reversed(made) if is_empty else ():
            # Another process may have created files there.
            with suppress(OSError):
                path.rmdir()


def held_studies(project: ProjectPaths) -> list[str]:
    """Return the names of the running studies in this project, sorted, including those without settings yet."""
    names = sorted(path.parent.name for path in project.studies.glob("*/study.lock"))
    return [name for name in names if is_held(project.study(name))]


def is_held(study: StudyPaths) -> bool:
    """Return whether a process holds the study's lock."""
    if not study.lock.exists():
        return False
    lock = filelock.FileLock(study.lock)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return True
    except OSError:
        # The folder is read-only for this user, so the lock cannot be tested. Rely on the holder's file instead.
        return study.holder.exists()
    lock.release()
    return False


def describe_holder(study: StudyPaths) -> str:
    """Return text such as `process 4711 on lab3 since 2026-11-23 14:05`.

    Returns `another process` if the holder's file cannot be read.
    """
    try:
        holder = json.loads(study.holder.read_text(encoding="utf-8"))
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(holder["since"]))
        return f"process {holder['pid']} on {holder['host']} since {since}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


class _LenientHandler(logging.FileHandler):
    """Log handler that ignores write errors. On a full disk, more important writes fail with a clear message."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        pass


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Append the log messages of hpsearch to `path`, one per line, during the block."""
    handler = _LenientHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger("hpsearch")
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        with suppress(OSError):
            handler.close()
