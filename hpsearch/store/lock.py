"""One coordinator a study: a lock that dies with its holder, and a file that says who that is."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import filelock

from hpsearch import paths
from hpsearch.errors import StudyLockedError
from hpsearch.paths import ProjectPaths, StudyPaths, command_line
from hpsearch.tuning import coordinators
from hpsearch.tuning.coordinators import CoordinatorState


@contextmanager
def hold(study: StudyPaths, *, among_others: bool = False) -> Iterator[None]:
    """Hold the study for the block. StudyLockedError, saying who holds it, if another process does.

    The lock is the operating system's: it goes with its process, however that ends. While coordinators share the
    study, only one of them may have it, `among_others`. Folders that were made for a study are removed if it has no
    settings at the end of the block.
    """
    if not among_others and coordinators.living(study):
        raise _locked(study)
    made = [path for path in (study.project.root, study.project.studies, study.root) if not path.exists()]
    try:
        study.root.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(study.lock)
        # Whoever only asks whether it is held holds it for an instant.
        lock.acquire(timeout=1)
    except filelock.Timeout as error:
        raise _locked(study) from error
    except OSError as error:
        raise paths.storage_error(study.lock, error) from error
    try:
        # What the holder before left that was killed.
        if not among_others:
            paths.remove_stale_temporaries(study.root)
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        paths.write_json(study.holder, holder)
        yield
    finally:
        # A lock that is free tells the same as a file that is gone.
        with suppress(OSError):
            study.holder.unlink(missing_ok=True)
        is_empty = study.root in made and not study.toml.is_file()
        if is_empty:
            # While it is locked, so that nobody else has begun the study meanwhile.
            shutil.rmtree(study.root, ignore_errors=True)
        lock.release()
        for path in reversed(made) if is_empty else ():
            # Others may have put something there.
            with suppress(OSError):
                path.rmdir()


def running_studies(project: ProjectPaths) -> list[str]:
    """Return the names of the studies here that a process holds now, sorted."""
    return [name for name in project.study_names() if is_held(project.study(name))]


def is_held(study: StudyPaths) -> bool:
    """Whether a process holds the study now, or several share it."""
    if coordinators.living(study):
        return True
    if not study.lock.exists():
        return False
    lock = filelock.FileLock(study.lock)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return True
    except OSError:
        # A folder that one may only read, somebody else's study: believe what its holder wrote.
        return study.holder.exists()
    lock.release()
    return False


def describe_holder(study: StudyPaths) -> str:
    """`process 4711 on lab3 since 2026-11-23 14:05`, as far as it is known."""
    if others := coordinators.living(study):
        return _describe(others)
    try:
        holder = json.loads(study.holder.read_text(encoding="utf-8"))
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(holder["since"]))
        return f"process {holder['pid']} on {holder['host']} since {since}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _locked(study: StudyPaths) -> StudyLockedError:
    status, stop = (command_line(each, study.name, study.project) for each in ("status", "stop"))
    return StudyLockedError(
        f"study {study.name!r} is being run by {describe_holder(study)}: see it with `{status}`, end it with `{stop}`"
    )


def _describe(others: Sequence[CoordinatorState]) -> str:
    first = f"process {others[0].pid} on {others[0].host}"
    return first if len(others) == 1 else f"{first} and {len(others) - 1} more"
