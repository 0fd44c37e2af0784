"""Collect requests to stop a running study: signals, `hpsearch stop` and the time limit."""

import math
import signal
import time
from collections.abc import Callable

from hpsearch.errors import StoppedError
from hpsearch.paths import StudyPaths

GRACE_S = 12.0
"""Seconds that running epochs may continue after the time limit. After that, the workers are stopped at once."""


class Stop:
    """Requests to stop a study. The first request stops it after the current epochs, the second one at once."""

    def __init__(self) -> None:
        self.requests = 0
        self.signal = 0
        """Number of the signal that requested the stop: SIGTERM for `hpsearch stop`, 0 for the time limit."""
        self.epoch_left_s: Callable[[], float | None] = lambda: None
        """Function that returns the seconds until the running epochs end; NaN if unknown, None if no epoch is
        running."""
        self._ends_at = math.inf

    def request(self, signal_number: int = 0, *, at_once: bool = False) -> None:
        """Request a stop, without finishing the current epochs if `at_once` is true.

        This method may be called from a signal handler or another thread.
        """
        self.requests += 2 if at_once else 1
        self.signal = self.signal or signal_number

    def limit(self, hours: float) -> None:
        """Set a time limit, in hours from now."""
        self._ends_at = time.monotonic() + hours * 3600

    def poll(self, study: StudyPaths) -> str:
        """Check the time limit and `hpsearch stop`. Return the reason if this call requested a stop, else ""."""
        if study.stop_request.exists():
            # Exit like a process terminated by SIGTERM, so that a calling script stops too.
            self.request(signal.SIGTERM, at_once=study.stop_request.read_text().strip() == "now")
            study.stop_request.unlink(missing_ok=True)
            return "a stop was requested by `hpsearch stop`"
        over_s = time.monotonic() - self._ends_at
        if over_s >= 0 and not self.is_requested:
            self.request()
            return "the time limit (--hours) is reached: stopping after the current epochs"
        if over_s > GRACE_S:
            self.request(at_once=True)
        return ""

    @property
    def left_s(self) -> float:
        """Seconds until the time limit; infinite if there is none."""
        return self._ends_at - time.monotonic()

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
