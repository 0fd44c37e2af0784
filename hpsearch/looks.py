"""Keeps account of every look at a test set: how often, when and with what it was scored.

A test set that has been looked at often is a second validation set. Looks are kept in the project folder, and in the
user's state folder too, so that another project folder does not forget them. A test set is known by the content of
its files, not by their names or place.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpsearch import paths
from hpsearch.data.cache import Index
from hpsearch.errors import StorageError
from hpsearch.paths import ProjectPaths

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Look:
    """One scoring of a test set."""

    test_set: str
    """Digest of its content, as `digest_of_test_set` gives it."""
    at: float
    """Unix time in seconds."""
    study: str
    study_began_at: float
    """When its first trial began: with the name it tells studies apart, wherever their folder is moved."""
    trial: int
    folder: str
    """Of the project, absolute, as it was then."""
    n_images: int
    metric: str
    score: float
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


def digest_of_test_set(cache_folder: Path) -> str:
    """Digest of the images and masks in a cache of the test split: 16 hexadecimal digits, in any order."""
    facts = Index.read(cache_folder).facts
    lines = sorted(f"{each.image_sha256} {each.mask_sha256}" for each in facts)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def note_look(project: ProjectPaths, look: Look) -> None:
    """Enter a look into the project's account and the user's. Only the first has to be writable."""
    line = json.dumps(dataclasses.asdict(look))
    paths.append_line(project.looks, line)
    state = user_account()
    try:
        state.parent.mkdir(parents=True, exist_ok=True)
        paths.append_line(state, line)
    except (OSError, StorageError) as error:
        logger.info("this look at the test set is on record in the project folder only: %s", error)


def looks_at(project: ProjectPaths, test_set: str) -> list[Look]:
    """Every known look at a test set, in the order of time. Lines that make no sense are left out."""
    found: dict[str, Look] = {}
    for path in (project.looks, user_account()):
        for table in _read(path):
            try:
                look = Look(**table)
            except TypeError:
                continue
            if look.test_set == test_set:
                found.setdefault(look.id, look)
    return sorted(found.values(), key=lambda look: (look.at, look.id))


def describe_looks(looks: Sequence[Look]) -> str:
    """How often a test set was looked at, and with how many configurations."""
    if len(looks) < 2:
        return "this is the first look at this test set"
    configurations = {(look.study, look.study_began_at, look.trial) for look in looks}
    times = f"this test set has been scored {len(looks)} times, with {len(configurations)} configuration"
    return times + ("s" if len(configurations) > 1 else "")


def first_look_of(looks: Sequence[Look], study: str, study_began_at: float) -> Look | None:
    """The first time that this study scored the test set; what it found later may owe something to that."""
    return next((look for look in looks if (look.study, look.study_began_at) == (study, study_began_at)), None)


def n_looks_before(looks: Sequence[Look], study_began_at: float) -> int:
    """How often the test set had been scored before a study began."""
    return sum(look.at < study_began_at for look in looks)


def user_account() -> Path:
    """Where the user's own account lies: $XDG_STATE_HOME, or ~/.local/state."""
    state = os.environ.get("XDG_STATE_HOME", "")
    root = Path(state) if state else Path(os.path.expanduser("~")) / ".local" / "state"
    return root / "hpsearch" / "test-looks.jsonl"


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    tables = []
    for line in lines:
        try:
            table = json.loads(line)
        except ValueError:
            continue
        if isinstance(table, dict):
            tables.append(table)
    return tables
