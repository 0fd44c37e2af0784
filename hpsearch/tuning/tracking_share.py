"""Which trials of a shared study a coordinator delivers to MLflow."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import Any

import filelock

from hpsearch.store.record import StudyRecord
from hpsearch.tuning import coordinators

VIEW_S = 1.0
"""How old the view of who lives may be."""


class TrackingShare:
    """What a coordinator delivers to MLflow: its own trials, and the eldest also those of the dead and the gone."""

    def __init__(self, record: StudyRecord, owner: str) -> None:
        self._record = record
        self._owner = owner
        self._owners: dict[int, str] = {}
        """Of the ended trials."""
        self._living: tuple[str, ...] = ()
        self._looked_at = -1e9

    def delivers(self, trial: int) -> bool:
        owner = self._owner_of(trial)
        return owner == self._owner or (self.leads() and owner not in self._look())

    def leads(self) -> bool:
        return next(iter(self._look()), self._owner) == self._owner

    def is_last(self) -> bool:
        return set(self._look()) <= {self._owner}

    def alone(self) -> AbstractContextManager[Any]:
        return filelock.FileLock(self._record.paths.tracking.with_suffix(".lock"))

    def _owner_of(self, number: int) -> str:
        if number not in self._owners:
            trial = self._record.trial(number)
            if trial.outcome is None:
                # Whoever lets go of it is followed by another.
                return trial.owner
            self._owners[number] = trial.owner
        return self._owners[number]

    def _look(self) -> tuple[str, ...]:
        """Ids of those who live, the eldest first."""
        if time.monotonic() - self._looked_at > VIEW_S:
            self._living = tuple(state.id for state in coordinators.living(self._record.paths))
            self._looked_at = time.monotonic()
        return self._living
