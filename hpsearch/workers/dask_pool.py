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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpsearch.errors import WorkerError
from hpsearch.paths import FitPaths
from hpsearch.workers import attempts, jobs
from hpsearch.workers.dask_connection import DaskConnection, Say
from hpsearch.workers.dask_task import ENDED, STARTED, commands_of, run_worker
from hpsearch.workers.dask_workers import share_memory
from hpsearch.workers.jobs import ClusterWorker, Failed, FitJob, Job, WorkerSettings
from hpsearch.workers.pool import Check, Event, Worker, WorkerPool

logger = logging.getLogger(__name__)

END_S = 10.0
"""Time in seconds in which a cancelled task must have ended its process. After that its Dask worker is restarted."""


@dataclass(eq=False, kw_only=True)
class DaskWorker(Worker):
    """A task on a Dask worker, and its current job."""

    dask: DaskConnection
    address: str
    topic: str
    """Name of the task and of the topic of its messages."""
    future: Any = None
    n_starts: int = 0
    """Number of times that Dask has started the task. The second time, the job of the first one is lost."""
    has_ended: threading.Event = field(default_factory=threading.Event)
    was_killed: bool = False

    def send(self, message: Mapping[str, Any]) -> None:
        # Without a connection, Dask cancels the task, and `events` reports it.
        if self.dask.is_open:
            with contextlib.suppress(OSError):
                log_event = self.dask.client.scheduler.log_event
                self.dask.ask(log_event, topic=commands_of(self.topic), msg=json.dumps(message))

    def kill(self) -> None:
        _end(self.dask, [self])
        self.was_killed = True


class DaskPool(WorkerPool):
    """Pool of workers on a Dask cluster.

    Dask workers that join after `resize` add workers, and Dask workers that leave remove theirs.
    """

    def __init__(
        self, address: str, probe: Path, check: Check, say: Say, *, device: str, limit: int, timeout_s: float
    ) -> None:
        """Connect to the scheduler at `address`, and wait for the first Dask worker.

        `probe` is a file in the project folder that every Dask worker must see. With the device `auto`, the Dask
        workers with a GPU are used, or all of them if none has one. New Dask workers add workers up to `limit` (0: no
        limit). `check` is called repeatedly and may raise an exception to stop waiting. `say` is called with a line
        about each wait and each Dask worker that is not used. Raises WorkerError if there is no Dask worker for
        `timeout_s` seconds, now or later.
        """
        super().__init__()
        self._workers: list[DaskWorker] = []
        self._dask = DaskConnection(address, probe, device, timeout_s, say)
        self._limit, self._timeout_s = limit or math.inf, timeout_s
        self._settings: list[WorkerSettings] = []
        self._size = 0
        """Number of workers that the pool should have. While there are too few Dask workers, it has fewer."""
        self._device = device
        self._last_seen: dict[str, float] = {}
        """Maps the address of each Dask worker to the last time when it was connected. Lost ones stay in `machines`
        for `timeout_s` seconds."""
        self._known: set[str] = set()
        """Dask workers that were counted in `_size`, or not used in `resize`."""
        self._messages: queue.SimpleQueue[tuple[DaskWorker, str]] = queue.SimpleQueue()
        try:
            kinds = [worker.capacity.device for worker in self._dask.first_workers(check)]
            if device == "auto":
                self._device = max(kinds, key=lambda kind: kind != "cpu")
            self._update_machines()
        except BaseException:
            self.close()
            raise

    def resize(self, settings: Sequence[WorkerSettings]) -> None:
        self._settings, self._size, self._known = list(settings), len(settings), set(self.machines)
        kept = [each for each in self._workers if [each.settings] == self._settings[each.index : each.index + 1]]
        _end(self._dask, [worker for worker in self._workers if worker not in kept])
        self._workers = kept
        self._fill()
        self._update_machines()

    def submit(self, worker: Worker, job: Job) -> None:
        if isinstance(job, FitJob):
            job = dataclasses.replace(job, attempt=attempts.begin(FitPaths(job.folder)))
        super().submit(worker, job)

    def events(self, timeout_s: float) -> Iterator[Event]:
        self._forgive_pause()
        with contextlib.suppress(queue.Empty):
            while True:
                worker, message = self._messages.get(timeout=timeout_s)
                timeout_s = 0.0
                # Messages of a lost worker are late.
                if worker in self._workers:
                    report = jobs.from_message(json.loads(message))
                    if isinstance(report, Failed) and report.error == "died":
                        report = dataclasses.replace(report, text=f"{worker.name} lost its process: {report.text}")
                    yield self._note(worker, report)
        self._polled_at = time.monotonic()
        if self._dask.follow():
            self._update_machines()
        for worker in list(self._workers):
            if cause := self._why_lost(worker):
                if not worker.was_killed:
                    _end(self._dask, [worker])
                self._workers.remove(worker)
                yield Event(worker, worker.job, Failed(error="died", text=f"{worker.name} {cause}"))
        self._fill()

    def close(self) -> None:
        _end(self._dask, self._workers)
        self._workers, self._settings = [], []
        self._dask.close()

    def _update_machines(self) -> None:
        """Update `machines`, and share the memory of each GPU or host between its Dask workers."""
        now, kind = time.monotonic(), self._device.partition(":")[0]
        used = {worker.address for worker in self._workers}
        self._last_seen |= dict.fromkeys(self._dask.present, now)
        usable = [
            each
            for address in self._dask.present
            if isinstance(each := self._dask.devices[address], ClusterWorker) and each.capacity.device == kind
            if address in used or len(used) < self._limit
        ]
        lost = {
            address: dataclasses.replace(each, is_connected=False)
            for address, each in self.machines.items()
            if address not in self._dask.present and now - self._last_seen.setdefault(address, now) <= self._timeout_s
        }
        limits = {address: info["memory_limit"] for address, info in self._dask.present.items()}
        self.machines = share_memory(usable, limits) | lost
        for worker in self._workers:
            worker.machine = self.machines.get(worker.address, worker.machine)

    def _fill(self) -> None:
        """Start workers on free Dask workers, the largest first."""
        used = {worker.address for worker in self._workers}
        free = [address for address in self._dask.present if address in self.machines and address not in used]
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
        worker = DaskWorker(
            index=index, settings=settings, dask=self._dask, address=address, topic=topic, machine=machine
        )

        def on_message(event: tuple[float, str]) -> None:
            if event[1] == STARTED:
                worker.n_starts += 1
            elif event[1] == ENDED:
                worker.has_ended.set()
            else:
                self._messages.put((worker, event[1]))

        self._dask.client.subscribe_topic(topic, on_message)
        # Dask then gives the GPU to no other task. Several Dask workers may each declare a part of one GPU.
        n_gpus = self._dask.present[address]["resources"].get("GPU", 0) if machine.capacity.device == "cuda" else 0
        # Bind the task to one Dask worker. If that is lost, the coordinator decides where the job continues.
        options = {"key": topic, "workers": [address], "allow_other_workers": False, "pure": False, "retries": 0}
        options["resources"] = {"GPU": min(1, n_gpus)} if n_gpus else None
        worker.future = self._dask.client.submit(run_worker, topic, vars(settings), **options)
        return worker

    def _why_lost(self, worker: DaskWorker) -> str:
        """Return why a worker is lost; empty if it is not. Raises WorkerError if none can be started."""
        if worker.was_killed:
            return "was killed"
        if worker.address not in self._dask.present or worker.n_starts > 1:
            return "is lost: it is no longer connected"
        if worker.future.status != "error":
            return "" if worker.future.status == "pending" else "is lost: Dask cancelled its task"
        error = worker.future.exception()
        text = str(error) if isinstance(error, WorkerError) else f"Dask worker {worker.name}: {error!r}"
        self._dask.devices[worker.address] = text
        if all(isinstance(self._dask.devices[address], str) for address in self._dask.present):
            raise WorkerError(text)
        return f"cannot be started: {text}"


def _end(dask: DaskConnection, workers: Sequence[DaskWorker]) -> None:
    """Cancel the tasks of workers and wait until their processes have ended, so that they can no longer write.

    Restart a Dask worker whose task does not end in time. Without a connection, Dask itself cancels the tasks.
    """
    if not workers or not dask.is_open:
        return
    with contextlib.suppress(OSError):
        dask.client.cancel([worker.future for worker in workers])
        alive = [worker for worker in workers if worker.n_starts and worker.address in dask.present]
        deadline = time.monotonic() + END_S
        stuck = [w for w in alive if not w.has_ended.wait(max(0.0, deadline - time.monotonic()))]
        if stuck:
            names = ", ".join(worker.name for worker in stuck)
            logger.warning("restarting Dask workers that do not end their tasks: %s", names)
            # `Client.restart_workers` refuses Dask workers without a nanny. The scheduler removes them.
            how = {"timeout": END_S / 2, "wait_for_workers": False, "on_error": "return", "stimulus_id": "hpsearch"}
            addresses = [worker.address for worker in stuck]
            dask.ask(dask.client.scheduler.restart_workers, workers=addresses, **how)
