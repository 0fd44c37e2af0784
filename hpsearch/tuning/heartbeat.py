"""Says of trials, in a thread and over a connection of its own, that the coordinator that has them lives.

Nothing else is done there: however long a suggestion, a database's answer to something else or a disk takes, a
living coordinator's heartbeats come in time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable

from optuna.storages import RDBStorage

from hpsearch.tuning.shared_storage import AWAY, RETRY_S

logger = logging.getLogger(__name__)

STOP_S = 5.0
"""How long the end waits for a heartbeat that is under way."""


class Heart:
    """Beats for the trials that it was told to keep, until it stops."""

    def __init__(self, storage: RDBStorage, every_s: float) -> None:
        self._storage = storage
        self._every_s = every_s
        self._lock = threading.Lock()
        self._trial_ids: set[int] = set()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)
        self._thread.start()

    def take(self, trial_id: int) -> None:
        """Beat at once for the trial, in the caller's thread, and from then on."""
        self._storage.record_heartbeat(trial_id)
        with self._lock:
            self._trial_ids.add(trial_id)

    def keep(self, trial_ids: Iterable[int]) -> None:
        """Beat for these from now on, and for no other."""
        with self._lock:
            self._trial_ids = set(trial_ids)

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(STOP_S)

    def _run(self) -> None:
        pause = 0.0
        while not self._stopped.wait(pause):
            began = time.monotonic()
            try:
                self._beat()
            except AWAY as error:
                # Whoever has more to say to the database says that it is away.
                logger.debug("no heartbeat: %s", error)
                # A session whose connection broke in the midst of a transaction never recovers by itself.
                self._storage.remove_session()
                pause = min(RETRY_S, self._every_s)
            else:
                pause = max(0.0, began + self._every_s - time.monotonic())
        self._storage.remove_session()

    def _beat(self) -> None:
        with self._lock:
            trial_ids = sorted(self._trial_ids)
        for trial_id in trial_ids:
            self._storage.record_heartbeat(trial_id)
