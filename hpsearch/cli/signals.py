"""Turn signals into requests to stop."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hpsearch.cli.streams import write_to_stderr

if TYPE_CHECKING:
    from hpsearch.search.stopping import Stop


@contextmanager
def stop_on_signals(stop: Stop, show: Callable[[str], None] = write_to_stderr) -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into requests to stop for the block.

    `show` is called in the signal handler with a line for the user. The handler may have interrupted any code.
    """

    def request(number: int, _frame: object) -> None:
        left_s = stop.epoch_left_s()
        # A cluster that sends SIGTERM kills soon afterwards, so do not wait for the end of the epoch.
        stop.request(number, at_once=number != signal.SIGINT)
        show("Stopping now" if stop.is_urgent else _announce(left_s))

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # `nohup` ignores SIGHUP, and it must stay ignored.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, request)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _announce(left_s: float | None) -> str:
    """Return what a request to stop waits for, with `left_s` seconds left in the current epoch."""
    if left_s is None:
        return "Stopping"
    # NaN: no epoch of this configuration has ended yet.
    about = "" if math.isnan(left_s) else f" (about {max(1, round(left_s))} s)"
    return f"Finishing the current epoch{about}; press Ctrl-C again to stop now"
