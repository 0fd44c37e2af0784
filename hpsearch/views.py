"""Keep the views of a study, such as its runs in MLflow, up to date in background threads.

A view is a copy of a study's results. It is derived from the study folder and may lag behind. Training never waits
for a view.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from hpsearch.errors import HpsearchError
from hpsearch.paths import StudyPaths

logger = logging.getLogger(__name__)


class View(Protocol):
    """View of one study. It reads only the study folder."""

    @property
    def name(self) -> str:
        """Name of the view in messages, such as `MLflow`."""

    def update(self, *, is_last: bool = False) -> None:
        """Add everything that is recorded but missing from the view.

        `is_last` means that no process works on the study any more. Raises HpsearchError if the view cannot be
        updated now. The next call continues the update and adds nothing twice.
        """

    def n_behind(self) -> int:
        """Return the number of recorded items that the view may lack, without contacting the view's server."""


class Tracker(Protocol):
    """Factory for the views of studies. `make_tracker` returns one."""

    def view(self, study: StudyPaths) -> View:
        """Return the view of a study, without connecting to a server yet."""


class ViewThread(threading.Thread):
    """Background thread that keeps one view up to date and retries with increasing pauses after failures."""

    def __init__(self, view: View, *, pause_s: float = 1.0, retry_s: float = 1.0, max_retry_s: float = 300.0) -> None:
        """Start the thread.

        It pauses for `pause_s` seconds after an update. After the n-th failure in a row, it pauses for
        `retry_s * 2**(n - 1)` seconds, but at most for `max_retry_s` seconds.
        """
        # A daemon thread, so that a server that does not answer cannot keep the process alive.
        super().__init__(name=f"view: {view.name}", daemon=True)
        self._view, self._pause_s, self._retry_s, self._max_retry_s = view, pause_s, retry_s, max_retry_s
        self._woken, self._closing = threading.Event(), threading.Event()
        self._n_failures = 0
        self.error = ""
        """Reason why the last update failed; empty if it succeeded."""
        self.n_left = 0
        """Number of items that the view lacks, set by `close`."""
        self.start()

    def wake(self) -> None:
        """Notify the thread of new results, and return at once."""
        self._woken.set()

    def close(self, timeout_s: float = 30.0, give_up: Callable[[], bool] = lambda: False) -> int:
        """Update the view one last time, end the thread and return the number of items that the view lacks.

        Waits while the view makes progress. Stops waiting after `timeout_s` without progress, or when `give_up`
        returns true.
        """
        self._closing.set()
        self._woken.set()
        n_behind = self._view.n_behind()
        give_up_at = time.monotonic() + timeout_s
        while self.is_alive() and time.monotonic() < give_up_at and not give_up():
            self.join(0.2)
            if (n_now := self._view.n_behind()) < n_behind:
                n_behind, give_up_at = n_now, time.monotonic() + timeout_s
        n_behind = self._view.n_behind()
        if n_behind and self.is_alive():
            self.error = self.error or f"{self._view.name} does not answer"
        # After an error, updates may be missing that `n_behind` does not count.
        self.n_left = max(n_behind, 1) if self.error else n_behind
        return self.n_left

    def run(self) -> None:
        while True:
            # Clear before reading `_closing`: `close` sets `_closing` first, so its wake-up cannot be lost.
            self._woken.clear()
            is_last = self._closing.is_set()
            self._update(is_last)
            if is_last:
                return
            retry_s = min(self._retry_s * 2 ** (self._n_failures - 1), self._max_retry_s)
            self._closing.wait(retry_s if self._n_failures else self._pause_s)
            if not self._n_failures:
                self._woken.wait()

    def _update(self, is_last: bool) -> None:
        try:
            self._view.update(is_last=is_last)
        except Exception as error:
            self._n_failures = min(self._n_failures + 1, 20)
            self.error = str(error) or type(error).__name__
            if self._n_failures == 1:
                # An unexpected error is a bug in hpsearch: log its traceback, but let the training continue.
                details = None if isinstance(error, HpsearchError) else error
                logger.warning("%s is not up to date, retrying: %s", self._view.name, error, exc_info=details)
        else:
            if self._n_failures:
                logger.info("%s is up to date again", self._view.name)
            self._n_failures = 0
            self.error = ""


def is_updating() -> bool:
    """Return whether any thread of this process still updates a view, even one that `close` stopped waiting for."""
    return any(isinstance(thread, ViewThread) for thread in threading.enumerate())
