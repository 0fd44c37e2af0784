"""Connection to the scheduler of a Dask cluster, which keeps the list of its Dask workers up to date."""

import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

from distributed.utils import LoopRunner

from hpsearch.errors import WorkerError
from hpsearch.workers.dask_workers import SILENT, connect, examine
from hpsearch.workers.jobs import ClusterWorker
from hpsearch.workers.pool import Check

logger = logging.getLogger(__name__)

FIRST_CONNECT_S, CONNECT_S = 1.0, 5.0
"""Time in seconds of the first attempt to connect to the scheduler, and of each further one."""
SCHEDULER_S = 10.0
"""Time in seconds in which the scheduler must answer a request. Without a limit, Ctrl-C would have no effect."""
FOLLOW_S = 1.0
"""Time in seconds between two requests for the list of Dask workers."""
Say = Callable[[str], None]
"""Function that is called with each line for the user."""


class DaskConnection:
    """Connection to a Dask cluster, and its Dask workers. `follow` updates them, from the caller's thread."""

    def __init__(self, address: str, probe: Path, device: str, timeout_s: float, say: Say) -> None:
        """Prepare the connection; `follow` connects. The arguments are those of `DaskPool`."""
        self._address, self._timeout_s = address, timeout_s
        self._probe, self._device, self._say = probe.absolute(), device, say
        self.client: Any = None
        # All attempts to connect share one thread. Otherwise each one that fails leaves a thread.
        self._loop = LoopRunner()
        self._loop.start()
        self.present: Mapping[str, Any] = {}
        """Maps the address of each connected Dask worker to what the scheduler knows about it."""
        self.devices: dict[str, ClusterWorker | str | None] = {}
        """Devices of the connected Dask workers, by address. None: not known yet. A string is the reason why the
        Dask worker is not used."""
        self._found: queue.SimpleQueue[Mapping[str, ClusterWorker | str]] = queue.SimpleQueue()
        """Results of `_examine`."""
        self._silent: set[str] = set()
        """Dask workers that did not answer. They do not count as connected."""
        self._followed_at, self._seen_at = -math.inf, time.monotonic()
        self._is_waiting = False
        """Whether there is no Dask worker, and the user was told so."""

    @property
    def is_open(self) -> bool:
        """Whether the scheduler is connected."""
        return self.client is not None and self.client.status == "running"

    def first_workers(self, check: Check) -> list[ClusterWorker]:
        """Wait until Dask workers are connected and examined, and return them.

        `check` is called repeatedly. Raises WorkerError if one of them cannot be used.
        """
        while not self.present or None in self.devices.values():
            check()
            self.follow()
            time.sleep(0.1)
        found = [self.devices[address] for address in self.present]
        for problem in found:
            if isinstance(problem, str):
                raise WorkerError(problem)
        return [each for each in found if isinstance(each, ClusterWorker)]

    def follow(self) -> bool:
        """Update the Dask workers, and return whether it was time to do so.

        Raises WorkerError if there have been none for too long.
        """
        self._take_found()
        if not self.is_open:
            if self.present:
                logger.warning("lost the connection to the Dask scheduler at %s", self._address)
            self.present, self.devices = {}, {}
        now = time.monotonic()
        if now - self._followed_at < FOLLOW_S:
            return False
        reason = self._connect() if self.client is None or self.client.status == "closed" else ""
        has_answered = False
        if self.is_open:
            try:
                self._update_present()
                has_answered, reason = True, "the scheduler has no Dask worker that answers"
            except OSError:
                # Keep the last list. A lost connection is noticed above.
                reason = "its scheduler does not answer"
        self._followed_at = time.monotonic()
        if has_answered and self.present:
            self._seen_at, self._is_waiting = now, False
        else:
            self._wait(reason or "its scheduler cannot be reached")
        return True

    def close(self) -> None:
        """Close the connection."""
        if self.client is not None:
            # A scheduler that does not answer cannot be told.
            with contextlib.suppress(OSError):
                self.client.close()
        self._loop.stop()

    def ask(self, function: Callable[..., Any], **options: Any) -> Any:
        """Call a remote function of the scheduler. Raises OSError if it does not answer in time."""
        return self.client.sync(function, callback_timeout=SCHEDULER_S, **options)

    def _connect(self) -> str:
        """Try to connect, and return why this is not possible; empty if it is."""
        limit_s = CONNECT_S if self._is_waiting else FIRST_CONNECT_S
        try:
            self.client = connect(self._address, self._loop.loop, min(limit_s, self._timeout_s))
        except OSError as error:
            return str(error)
        logger.info("connected to the Dask scheduler at %s", self._address)
        return ""

    def _wait(self, reason: str) -> None:
        """Tell the user once that there is no Dask worker. Raises WorkerError if this has lasted too long."""
        if self._followed_at - self._seen_at > self._timeout_s:
            what = f"--cluster {self._address} has had no workers for {self._timeout_s:.0f} s ({reason})"
            advice = "start `dask scheduler` and `dask worker`, then run the same command again to continue"
            raise WorkerError(f"{what}: {advice}")
        if not self._is_waiting:
            self._is_waiting = True
            self._warn(f"waiting up to {self._timeout_s:.0f} s for the Dask cluster {self._address}: {reason}")

    def _update_present(self) -> None:
        """Ask the scheduler for its Dask workers, and examine those that have joined."""
        # `Client.scheduler_info` is not safe here. It returns an attribute to which a thread of Dask assigns an empty
        # list every few seconds, and all Dask workers would seem to be lost.
        found = self.ask(self.client.scheduler.identity)["workers"]
        for address, each in self.devices.items():
            if address not in found and isinstance(each, ClusterWorker):
                logger.info("Dask worker %s left", each.name)
        self.present = {address: each for address, each in found.items() if address not in self._silent}
        self.devices = {address: each for address, each in self.devices.items() if address in self.present}
        if joined := [address for address in self.present if address not in self.devices]:
            self.devices |= dict.fromkeys(joined)
            threading.Thread(target=self._examine, args=[joined], name="examine", daemon=True).start()

    def _examine(self, addresses: Sequence[str]) -> None:
        # If the connection is lost, `follow` forgets these Dask workers. A client that is closed meanwhile has no
        # scheduler, and Dask raises AttributeError.
        with contextlib.suppress(OSError, CancelledError, AttributeError):
            self._found.put(examine(self.client, addresses, self._probe, self._device))

    def _take_found(self) -> None:
        """Take over the results of `_examine`."""
        while not self._found.empty():
            self.devices |= (found := self._found.get())
            for address, each in found.items():
                if isinstance(each, ClusterWorker):
                    logger.info("Dask worker %s joined: %s, threads: %d", each.name, each.device_name, each.threads)
                else:
                    self._warn(f"{each}; it is not used")
                    if each.endswith(SILENT):
                        self._silent.add(address)
            self.present = {address: each for address, each in self.present.items() if address not in self._silent}

    def _warn(self, text: str) -> None:
        logger.warning("%s", text)
        self._say(text)
