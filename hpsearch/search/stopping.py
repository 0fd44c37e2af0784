"""Requests to stop a running study: signals, `hpsearch stop`, and the budget of hours."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable

from hpsearch.errors import StoppedError
from hpsearch.paths import StudyPaths

logger = logging.getLogger(__name__)

GRACE_S = 12.0
"""How long a used-up budget waits for the epoch to end before it stops the workers at once."""


class Stop:
    """Asks a running study to stop: once after the current epochs, twice at once."""

    def __init__(self) -> None:
        self.requests = 0
        self.signal = 0
        """Number of the signal that asked; SIGTERM for `hpsearch stop`, 0 if the hours were used up."""
        self.epoch_left_s: Callable[[], float | None] = lambda: None
        """Seconds until the epochs being trained end; NaN if not known, None if none is trained."""

    def request(self, signal_number: int = 0, *, at_once: bool = False) -> None:
        """Ask to stop. May be called from a signal handler or another thread."""
        self.requests += 2 if at_once else 1
        self.signal = self.signal or signal_number

    def poll(self, study: StudyPaths) -> bool:
        """Read and remove the request of `hpsearch stop` in the study's folder; return whether there was one."""
        if not study.stop_request.exists():
            return False
        # As if the process had been terminated, so that what follows in a script does not run.
        self.request(signal.SIGTERM, at_once=study.stop_request.read_text().strip() == "now")
        study.stop_request.unlink(missing_ok=True)
        return True

    def check(self, text: str) -> None:
        """Raise StoppedError with `text` if a stop was requested."""
        if self.is_requested:
            raise StoppedError(text, self.signal)

    @property
    def is_requested(self) -> bool:
        return self.requests > 0

    @property
    def is_urgent(self) -> bool:
        return self.requests > 1


class Budget:
    """Stops a study when its hours are used up."""

    def __init__(self, hours: float | None, stop: Stop, say: Callable[[str], None]) -> None:
        self._stop_at = time.monotonic() + hours * 3600 if hours is not None else math.inf
        self._stop = stop
        self._say = say

    def poll(self) -> None:
        """Request a stop after the current epochs when time is up, and at once when they take too long."""
        over = time.monotonic() - self._stop_at
        if over >= 0 and not self._stop.is_requested:
            logger.info("the budget of hours is used up")
            self._say("the budget of hours is used up: stopping after this epoch")
            self._stop.request()
        elif over > GRACE_S:
            self._stop.request(at_once=True)
