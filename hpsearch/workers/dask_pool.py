"""Worker pool on a Dask cluster: each worker is a task on its own Dask worker (`dask_task`).

Messages are those of `LocalPool`, as JSON text. They travel through Dask's scheduler as events of two topics per
worker, one in each direction. A topic pushes: unlike a `distributed.Queue`, it needs no polling, and unlike a
`distributed.Event`, it can carry jobs. hpsearch itself opens no port.
"""

import contextlib
import dataclasses
import json
import logging
import math
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distributed.utils import LoopRunner

from hpsearch.errors import WorkerError
from hpsearch.paths import FitPaths
from hpsearch.workers import attempts, jobs
from hpsearch.workers.dask_task import ENDED, STARTED, commands_of, run_worker
from hpsearch.workers.dask_workers import SILENT, connect, examine, share_memory
from hpsearch.workers.jobs import ClusterWorker, Failed, FitJob, Job, WorkerSettings
from hpsearch.workers.pool import Event, TrackingPool, Worker

logger = logging.getLogger(__name__)

CONNECT_S = 5.0
"""Time in seconds of one attempt to connect to the scheduler."""
FOLLOW_S = 1.0
"""Time in seconds between two requests for the list of Dask workers."""
END_S = 10.0
"""Time in seconds in which a cancelled task must have ended its process. After that its Dask worker is restarted."""


@dataclass(eq=False, kw_only=True)
class DaskWorker(Worker):
    """A task on a Dask worker, and its current job."""

    address: str
    topic: str
    """Name of the task and of the topic of its messages."""
    future: Any = None
    n_starts: int = 0
    """Number of times that Dask has started the task. The second time, the job of the first one is lost."""
    has_ended: threading.Event = field(default_factory=threading.Event)
    was_killed: bool = False


class DaskPool(TrackingPool[DaskWorker]):
    """Pool of workers on a Dask cluster.

    Dask workers that join after `resize` add workers, and Dask workers that leave remove theirs.
    """

    def __init__(
        self, address: str, probe: Path, check: Callable[[], None], *, device: str, limit: int, timeout_s: float
    ) -> None:
        """Connect to the scheduler at `address`, and wait for the first Dask worker.

        `probe` is a file in the project folder that every Dask worker must see. With the device `auto`, the Dask
        workers with a GPU are used, or all of them if none has one. New Dask workers add workers up to `limit` (0: no
        limit). `check` is called repeatedly and may raise an exception to stop waiting. Raises WorkerError if there
        is no Dask worker for `timeout_s` seconds, now or later.
        """
        super().__init__()
        self._address, self._limit, self._timeout_s = address, limit or math.inf, timeout_s
        self._probe = probe.absolute()
        self._client: Any = None
        # All attempts to connect share one thread. Otherwise each one that fails leaves a thread.
        self._loop = LoopRunner()
        self._loop.start()
        self._settings: list[WorkerSettings] = []
        self._size = 0
        """Number of workers that the pool should have. While there are too few Dask workers, it has fewer."""
        self._device = device
        self._present: Mapping[str, Any] = {}
        """Maps the address of each connected Dask worker to what the scheduler knows about it."""
        self._devices: dict[str, ClusterWorker | str | None] = {}
        """Devices of the connected Dask workers, by address. None: not known yet. A string is the reason why the
        Dask worker is not used."""
        self._found: queue.SimpleQueue[Mapping[str, ClusterWorker | str]] = queue.SimpleQueue()
        """Results of `_examine`."""
        self._last_seen: dict[str, float] = {}
        """Maps the address of each Dask worker to the last time when it was connected. Lost ones stay in `machines`
        for `timeout_s` seconds."""
        self._silent: set[str] = set()
        """Dask workers that did not answer. They do not count as connected."""
        self._known: set[str] = set()
        """Dask workers that were counted in `_size`, or not used in `resize`."""
        self._messages: queue.SimpleQueue[tuple[DaskWorker, str]] = queue.SimpleQueue()
        self._followed_at, self._seen_at = -math.inf, time.monotonic()
        try:
            while not self._present or None in self._devices.values():
                check()
                self._follow()
                time.sleep(0.1)
            kinds = []
            for found in map(self._devices.__getitem__, self._present):
                if not isinstance(found, ClusterWorker):
                    raise WorkerError(found)
                kinds.append(found.capacity.device)
            if device == "auto":
                self._device = max(kinds, key=lambda kind: kind != "cpu")
            self._update_machines()
        except BaseException:
            self.close()
            raise

    def resize(self, settings: Sequence[WorkerSettings]) -> None:
        self._settings, self._size, self._known = list(settings), len(settings), set(self.machines)
        kept = [each for each in self._workers if [each.settings] == self._settings[each.index : each.index + 1]]
        self._end([worker for worker in self._workers if worker not in kept])
        self._workers = kept
        self._fill()
        self._update_machines()

    def submit(self, worker: Worker, job: Job) -> None:
        ours = self._own(worker)
        ours.job = job
        if isinstance(job, FitJob):
            job = dataclasses.replace(job, attempt=attempts.begin(FitPaths(job.folder)))
        self._send(ours, jobs.to_message(job))

    def reply(self, worker: Worker, *, go: bool) -> None:
        self._send(self._own(worker), {"go": go})

    def kill(self, worker: Worker) -> None:
        ours = self._own(worker)
        self._end([ours])
        ours.was_killed = True

    def events(self, timeout_s: float) -> Iterator[Event]:
        self._forgive_pause()
        with contextlib.suppress(queue.Empty):
            while True:
                worker, message = self._messages.get(timeout=timeout_s)
                timeout_s = 0.0
                # Messages of a lost worker are late.
                if worker in self._workers:
                    yield self._note(worker, jobs.from_message(json.loads(message)))
        self._polled_at = time.monotonic()
        self._follow()
        for worker in list(self._workers):
            if cause := self._why_lost(worker):
                logger.warning("worker %d %s", worker.index, cause)
                if not worker.was_killed:
                    self._end([worker])
                self._workers.remove(worker)
                yield Event(worker, worker.job, Failed(error="died", text=cause))
        self._fill()

    def close(self) -> None:
        self._end(self._workers)
        self._workers, self._settings = [], []
        if self._client is not None:
            self._client.close()
        self._loop.stop()

    @property
    def _is_connected(self) -> bool:
        return self._client is not None and self._client.status == "running"

    def _send(self, worker: DaskWorker, message: Mapping[str, Any]) -> None:
        worker.last_report_at = time.monotonic()
        # Without a connection, Dask cancels the task, and `events` reports it.
        if self._is_connected:
            with contextlib.suppress(OSError):
                self._client.log_event(commands_of(worker.topic), json.dumps(message))

    def _follow(self) -> None:
        """Update the list of Dask workers. Raises WorkerError if there have been none for too long."""
        now, reason = time.monotonic(), "its scheduler cannot be reached"
        while not self._found.empty():
            self._devices |= (found := self._found.get())
            for address, problem in found.items():
                if isinstance(problem, str):
                    logger.warning("%s; it is not used", problem)
                    if problem.endswith(SILENT):
                        self._silent.add(address)
            self._present = {address: each for address, each in self._present.items() if address not in self._silent}
        if not self._is_connected:
            self._present, self._devices = {}, {}
        if now - self._followed_at < FOLLOW_S:
            return
        if self._client is None or self._client.status == "closed":
            try:
                self._client = connect(self._address, self._loop.loop, min(CONNECT_S, self._timeout_s))
            except OSError as error:
                reason = str(error)
        if self._is_connected:
            reason = "it has no usable Dask worker"
            # If the scheduler does not answer, keep the last list. A lost connection is noticed above.
            with contextlib.suppress(OSError):
                self._update_present()
        self._followed_at = time.monotonic()
        if self._present:
            self._seen_at = now
        elif self._followed_at - self._seen_at > self._timeout_s:
            what = f"--cluster {self._address} has had no workers for {self._timeout_s:.0f} s ({reason})"
            advice = "start `dask scheduler` and `dask worker`, then run the same command again to continue"
            raise WorkerError(f"{what}: {advice}")
        self._update_machines()

    def _update_present(self) -> None:
        """Ask the scheduler for its Dask workers, and examine those that have joined."""
        # `Client.scheduler_info` is not safe here. It returns an attribute to which a thread of Dask assigns an empty
        # list every few seconds, and all Dask workers would seem to be lost.
        found = self._client.sync(self._client.scheduler.identity)["workers"]
        self._present = {address: each for address, each in found.items() if address not in self._silent}
        self._devices = {address: each for address, each in self._devices.items() if address in self._present}
        if joined := [address for address in self._present if address not in self._devices]:
            self._devices |= dict.fromkeys(joined)
            threading.Thread(target=self._examine, args=[joined], name="examine", daemon=True).start()

    def _examine(self, addresses: Sequence[str]) -> None:
        # If the connection is lost, `_follow` forgets these Dask workers.
        with contextlib.suppress(OSError, CancelledError):
            self._found.put(examine(self._client, addresses, self._probe, self._device))

    def _update_machines(self) -> None:
        """Update `machines`, and share the memory of each GPU or host between its Dask workers."""
        now, kind = time.monotonic(), self._device.partition(":")[0]
        used = {worker.address for worker in self._workers}
        self._last_seen |= dict.fromkeys(self._present, now)
        usable = [
            each
            for address in self._present
            if isinstance(each := self._devices[address], ClusterWorker) and each.capacity.device == kind
            if address in used or len(used) < self._limit
        ]
        lost = {
            address: dataclasses.replace(each, is_connected=False)
            for address, each in self.machines.items()
            if address not in self._present and now - self._last_seen.setdefault(address, now) <= self._timeout_s
        }
        limits = {address: info["memory_limit"] for address, info in self._present.items()}
        self.machines = share_memory(usable, limits) | lost
        for worker in self._workers:
            worker.machine = self.machines.get(worker.address, worker.machine)

    def _fill(self) -> None:
        """Start workers on free Dask workers, the largest first."""
        used = {worker.address for worker in self._workers}
        free = [address for address in self._present if address in self.machines and address not in used]
        free.sort(key=lambda address: -self.machines[address].capacity.memory_bytes)
        # New Dask workers first replace lost ones.
        n_wanted = min(len(self._workers) + len(set(free) - self._known), self._limit)
        self._size = max(self._size, int(n_wanted)) if self._settings else 0
        self._known.update(free)
        vacant = sorted(set(range(self._size)) - {worker.index for worker in self._workers})
        self._workers += [self._start(index, address) for index, address in zip(vacant, free, strict=False)]
        self._workers.sort(key=lambda worker: worker.index)

    def _start(self, index: int, address: str) -> DaskWorker:
        settings = self._settings[min(index, len(self._settings) - 1)]
        machine, topic = self.machines[address], f"hpsearch-{index}-{secrets.token_hex(4)}"
        worker = DaskWorker(index=index, settings=settings, address=address, topic=topic, machine=machine)

        def on_message(event: tuple[float, str]) -> None:
            if event[1] == STARTED:
                worker.n_starts += 1
            elif event[1] == ENDED:
                worker.has_ended.set()
            else:
                self._messages.put((worker, event[1]))

        self._client.subscribe_topic(topic, on_message)
        # Dask then gives the GPU to no other task. Several Dask workers may each declare a part of one GPU.
        n_gpus = self._present[address]["resources"].get("GPU", 0) if machine.capacity.device == "cuda" else 0
        # Bind the task to one Dask worker. If that is lost, the coordinator decides where the job continues.
        options = {"key": topic, "workers": [address], "allow_other_workers": False, "pure": False, "retries": 0}
        options["resources"] = {"GPU": min(1, n_gpus)} if n_gpus else None
        worker.future = self._client.submit(run_worker, topic, vars(settings), **options)
        return worker

    def _why_lost(self, worker: DaskWorker) -> str:
        """Return why a worker is lost; empty if it is not. Raises WorkerError if none can be started."""
        if worker.was_killed:
            return "killed"
        if worker.address not in self._present or worker.n_starts > 1:
            return f"lost: Dask worker {worker.address} cannot be reached"
        if worker.future.status != "error":
            return "" if worker.future.status == "pending" else f"lost: Dask cancelled its task on {worker.address}"
        error = worker.future.exception()
        text = str(error) if isinstance(error, WorkerError) else f"Dask worker {worker.address}: {error!r}"
        self._devices[worker.address] = text
        if all(isinstance(self._devices[address], str) for address in self._present):
            raise WorkerError(text)
        return f"cannot be started: {text}"

    def _end(self, workers: Sequence[DaskWorker]) -> None:
        """Cancel the tasks of workers and wait until their processes have ended, so that they can no longer write.

        Restart a Dask worker whose task does not end in time. Without a connection, Dask itself cancels the tasks.
        """
        if not workers or not self._is_connected:
            return
        with contextlib.suppress(OSError):
            self._client.cancel([worker.future for worker in workers])
            alive = [worker for worker in workers if worker.n_starts and worker.address in self._present]
            deadline = time.monotonic() + END_S
            stuck = [w.address for w in alive if not w.has_ended.wait(max(0.0, deadline - time.monotonic()))]
            if stuck:
                logger.warning("restarting Dask workers that do not end their tasks: %s", ", ".join(stuck))
                # `Client.restart_workers` refuses Dask workers without a nanny. The scheduler removes them.
                how = {"timeout": END_S, "wait_for_workers": False, "on_error": "return", "stimulus_id": "hpsearch"}
                self._client.sync(self._client.scheduler.restart_workers, workers=stuck, **how)
