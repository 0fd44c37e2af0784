"""Who works on a shared study: a folder for each coordinator, with its log and what it last said of itself."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpsearch import paths
from hpsearch.errors import ConfigError, RecordError
from hpsearch.paths import StudyPaths


@dataclass(frozen=True)
class Sharing:
    """How the coordinators of a study know that one of them is dead."""

    heartbeat_s: int = 30
    """Each tells the database so often that it lives."""
    grace_s: int = 120
    """Whoever has not for so long is taken for dead, and its trials go to others."""

    @classmethod
    def chosen(cls, heartbeat_s: int | None, grace_s: int | None) -> Sharing | None:
        """None if neither is given; four heartbeats are the grace period of one that is."""
        if heartbeat_s is None and grace_s is None:
            return None
        heartbeat_s = heartbeat_s or max(1, (grace_s or 0) // 4)
        return cls(heartbeat_s, grace_s or 4 * heartbeat_s)

    def __post_init__(self) -> None:
        if not 0 < 3 * self.heartbeat_s <= self.grace_s:
            raise ConfigError(
                f"a grace period of {self.grace_s} s must be at least three heartbeats, of {self.heartbeat_s} s now"
            )


@dataclass(frozen=True, kw_only=True)
class CoordinatorState:
    """What a coordinator last said of itself. Times are Unix times in seconds, by its own clock."""

    id: str
    host: str
    pid: int
    since: float
    seen_at: float
    """When it wrote this."""
    beat_at: float | None = None
    """When the database last answered it, at each heartbeat."""
    left_at: float | None = None
    """When it ended, having let go of its trials."""
    n_trials: int = 0
    """Trials that ended with it."""
    n_epochs: int = 0
    n_images: int = 0
    """Images trained on, each epoch again."""
    undelivered: int = 0
    """Trials that tracking lacked when it ended."""
    fits: tuple[dict[str, int], ...] = ()
    """`trial`, `fold` and last `epoch` of what it has at hand."""

    @property
    def trials_per_hour(self) -> float:
        return self.n_trials * 3600 / max(1.0, self.seen_at - self.since)

    @property
    def images_per_s(self) -> float:
        """Since it began, waiting included."""
        return self.n_images / max(1.0, self.seen_at - self.since)

    def is_living(self, sharing: Sharing, now: float | None = None) -> bool:
        """Whether it has not left and has been seen within the grace period."""
        return self.left_at is None and (now or time.time()) - self.seen_at <= sharing.grace_s


def new_folder(study: StudyPaths) -> Path:
    """A folder of its own for a coordinator in this process: `lab3-4711-0`. Its name is the coordinator's id."""
    host = re.sub(r"[^\w.-]", "_", socket.gethostname()) or "host"
    for n in itertools.count():
        folder = study.coordinators / f"{host}-{os.getpid()}-{n}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise paths.storage_error(folder, error) from error
        return folder
    raise AssertionError("counted to infinity")


def new_state(folder: Path) -> CoordinatorState:
    """Of a coordinator that begins now in this process."""
    now = time.time()
    return CoordinatorState(id=folder.name, host=socket.gethostname(), pid=os.getpid(), since=now, seen_at=now)


def write_state(folder: Path, state: CoordinatorState) -> None:
    paths.write_json(folder / "state.json", dataclasses.asdict(state))


def states(study: StudyPaths) -> list[CoordinatorState]:
    """All coordinators that ever were, by their beginning; one whose file is not whole is left out."""
    found = []
    for path in study.coordinators.glob("*/state.json"):
        try:
            table: dict[str, Any] = paths.read_json(path)
            found.append(CoordinatorState(**{**table, "fits": tuple(table["fits"])}))
        except (RecordError, TypeError, KeyError):
            # On a network disk a file may be between two versions of itself.
            continue
    return sorted(found, key=lambda state: (state.since, state.id))


def living(study: StudyPaths) -> list[CoordinatorState]:
    """Those that work on the study now, the eldest first; none where it is not shared."""
    sharing = read_sharing(study)
    return [state for state in states(study) if state.is_living(sharing)] if sharing is not None else []


def read_sharing(study: StudyPaths) -> Sharing | None:
    """How the study is shared; None if it is not."""
    if not study.sharing.is_file():
        return None
    table = paths.read_json(study.sharing)
    return Sharing(int(table["heartbeat_s"]), int(table["grace_s"]))


def write_sharing(study: StudyPaths, sharing: Sharing, storage: str, began_at: float) -> None:
    """`storage` is the database's address without its password; `began_at` is when the study was begun."""
    paths.write_json(study.sharing, {"storage": storage, "began_at": began_at, **dataclasses.asdict(sharing)})
