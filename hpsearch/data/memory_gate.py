"""Limit the memory that threads hold together."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class MemoryGate:
    """Admits threads while the memory they hold together stays within a limit. A single thread is always admitted."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held_bytes = 0
        self._changed = threading.Condition()

    @contextmanager
    def admitted(self, n_bytes: int) -> Iterator[None]:
        """Hold `n_bytes` during the block, after waiting until they fit."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held_bytes or self._held_bytes + n_bytes <= self._limit_bytes)
            self._held_bytes += n_bytes
        try:
            yield
        finally:
            with self._changed:
                self._held_bytes -= n_bytes
                self._changed.notify_all()
