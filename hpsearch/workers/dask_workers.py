"""Check whether Dask workers can be used, and find out what they can train."""

import dataclasses
import logging
import os
import ssl
import sysconfig
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from distributed import Client
from distributed.comm.core import CommClosedError, FatalCommClosedError

from hpsearch.errors import WorkerError
from hpsearch.typed_json import from_json
from hpsearch.workers.dask_task import find_device
from hpsearch.workers.jobs import ClusterWorker

ANSWER_S = 10.0
"""Time in seconds in which a Dask worker must answer before it is used. A suspended one does not answer."""
SILENT = "does not answer"
MEMORY_UNIT = 2**26
"""Memory in bytes is rounded down to a multiple of this."""

VERSIONS: dict[str, Callable[[], str]] = {
    "hpsearch": partial(metadata.version, "hpsearch"),
    "torch": partial(metadata.version, "torch"),
    "Python": sysconfig.get_python_version,
}
"""Functions that return the versions that must be the same on all machines."""


TLS_ERRORS = (TypeError, RuntimeError, FileNotFoundError, ssl.SSLError, FatalCommClosedError)
"""Exceptions that Dask raises if TLS is not configured, or not as in the scheduler's configuration."""


def connect(address: str, loop: Any, timeout_s: float) -> Client:
    """Connect to the scheduler at `address`, with a client that runs in the event loop `loop`.

    Raises WorkerError if the TLS configuration is wrong, and OSError or ValueError if the scheduler cannot be
    reached.
    """
    # Dask prints a traceback for every lost connection. The pool reports it itself.
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
    try:
        return Client(address, loop=loop, set_as_default=False, name="hpsearch", timeout=timeout_s)
    except TLS_ERRORS as error:
        advice = "check distributed.comm.tls in Dask's configuration, described in docs/distributed.md"
        raise WorkerError(f"--cluster {address} cannot be used ({error}): {advice}") from error


def examine(client: Any, addresses: Sequence[str], probe: Path, device: str) -> dict[str, ClusterWorker | str]:
    """Return the device of each Dask worker, or the reason why the Dask worker cannot be used, by address.

    The reason ends with `SILENT` for a Dask worker that does not answer. `probe` is a file that the Dask workers must
    see. The memory is that of the whole device. This may take minutes, because torch is imported there. Raises
    OSError or CancelledError if the connection is lost.
    """
    found: dict[str, ClusterWorker | str] = {}
    for address in addresses:
        try:
            client.run(os.getpid, workers=[address], callback_timeout=ANSWER_S)
        except TimeoutError:
            found[address] = f"Dask worker {address} {SILENT}"
    answering = [address for address in addresses if address not in found]
    found |= _problems(client, answering, probe)
    usable = [address for address in addresses if address not in found]
    for address, table in client.run(find_device, device, workers=usable, on_error="return").items():
        if isinstance(table, Exception):
            found[address] = f"Dask worker {address}: {table}"
        else:
            found[address] = from_json(ClusterWorker, {"address": address, **table})
    return found


def share_memory(workers: Sequence[ClusterWorker], limits: Mapping[str, int | None]) -> dict[str, ClusterWorker]:
    """Return the Dask workers with their shares of the memory of their GPU or host, by address.

    On a CPU, a share is at most the memory limit of the Dask worker, if it has one.
    """
    n_sharing, shared = Counter(worker.unit for worker in workers), {}
    for worker in workers:
        memory_bytes = worker.capacity.memory_bytes // n_sharing[worker.unit]
        if worker.capacity.device == "cpu":
            memory_bytes = min(memory_bytes, limits[worker.address] or memory_bytes)
        # Machines of the same type differ by a few pages.
        memory_bytes = max(1, memory_bytes // MEMORY_UNIT) * MEMORY_UNIT
        capacity = dataclasses.replace(worker.capacity, memory_bytes=memory_bytes)
        shared[worker.address] = dataclasses.replace(worker, capacity=capacity)
    return shared


def _problems(client: Any, addresses: Sequence[str], probe: Path) -> dict[str, str]:
    """Return why Dask workers cannot be used, by address.

    Only functions of the standard library run there, because a Dask worker without hpsearch would end.
    """
    problems: dict[str, str] = {}
    run = partial(client.run, workers=addresses, on_error="return")
    for program, version in VERSIONS.items():
        for address, found in run(version).items():
            if not isinstance(found, CommClosedError) and _release(found) != _release(version()):
                what = f"Dask worker {address} has {program} {found}, the coordinator has {version()}"
                problems.setdefault(address, f"{what}: install the same version on all machines")
    for address, content in run(partial(Path.read_text, probe)).items():
        if not isinstance(content, CommClosedError) and content != probe.read_text():
            what = f"Dask worker {address} does not see the coordinator's {probe}"
            advice = "share the project folder and the images at the same paths on all machines"
            problems.setdefault(address, f"{what}: {advice}")
    return problems


def _release(version: object) -> str:
    """Return a version without its build: `2.15.0+cpu` and `2.15.0+cu130` are the same for different devices."""
    return str(version).partition("+")[0]
