"""Check whether Dask workers can be used, and find out what they can train."""

import asyncio
import contextlib
import dataclasses
import logging
import socket
import ssl
import struct
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

from distributed import Client, Security, comm
from distributed.comm.core import CommClosedError, FatalCommClosedError
from distributed.utils import sync
from distributed.versions import VersionMismatchWarning

from hpsearch.errors import WorkerError
from hpsearch.typed_json import from_json
from hpsearch.workers.dask_task import find_device
from hpsearch.workers.jobs import ClusterWorker, worker_name

ANSWER_S = 10.0
"""Time in seconds in which a Dask worker must answer before it is used. A suspended one does not answer."""
CLIENT_S = 5.0
"""Time in seconds in which the client must register, reconnect or close."""
HANDSHAKE_S = 1.0
"""Time in seconds in which a scheduler must answer after it has accepted a connection."""
SILENT = "does not answer"
MEMORY_UNIT = 2**26
"""Memory in bytes is rounded down to a multiple of this."""

VERSIONS: dict[str, Callable[[], str]] = {
    "hpsearch": partial(metadata.version, "hpsearch"),
    "torch": partial(metadata.version, "torch"),
    "Dask": partial(metadata.version, "distributed"),
    "Python": sysconfig.get_python_version,
}
"""Functions that return the versions that must be the same on all machines."""


TLS_ERRORS = (TypeError, RuntimeError, FileNotFoundError, ssl.SSLError, FatalCommClosedError)
"""Exceptions that Dask raises if TLS is not configured, or not as in the scheduler's configuration."""


def connect(address: str, loop: Any, timeout_s: float) -> Client:
    """Connect to the scheduler at `address` within `timeout_s` seconds, with a client in the event loop `loop`.

    Raises WorkerError if the TLS configuration is wrong, and OSError if there is no scheduler at this address.
    """
    # Dask prints a traceback for every lost connection, and a table of versions. The pool reports both itself.
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", category=VersionMismatchWarning)
    try:
        sync(loop, _require_scheduler, address, timeout_s)
        return Client(address, loop=loop, set_as_default=False, name="hpsearch", timeout=CLIENT_S)
    except TLS_ERRORS as error:
        advice = "check distributed.comm.tls in Dask's configuration, described in docs/distributed.md"
        raise WorkerError(f"--cluster {address} cannot be used ({error}): {advice}") from error


async def _require_scheduler(address: str, timeout_s: float) -> None:
    """Raise OSError if no scheduler answers at `address`. A Dask client would wait for an answer without a limit."""
    options = Security().get_connection_args("client")
    try:
        # `timeout` limits only the time until the server accepts the connection.
        connecting = comm.connect(address, timeout=timeout_s, **options)
        await (await asyncio.wait_for(connecting, timeout_s + HANDSHAKE_S)).close()
    except (TimeoutError, MemoryError, ValueError, struct.error) as error:
        # The last three are raised for an answer of another protocol.
        what = "the address accepts connections, but does not answer as a Dask scheduler"
        raise OSError(f"{what}; perhaps it is the address of Dask's dashboard") from error
    except FatalCommClosedError:
        raise
    except OSError as error:
        raise OSError("no scheduler answers there") from error


def examine(client: Any, addresses: Sequence[str], probe: Path, device: str) -> dict[str, ClusterWorker | str]:
    """Return the device of each Dask worker, or the reason why the Dask worker cannot be used, by address.

    The reason ends with `SILENT` for a Dask worker that does not answer. `probe` is a file that the Dask workers must
    see. The memory is that of the whole device. This may take minutes, because torch is imported there. Raises
    OSError or CancelledError if the connection is lost.
    """
    names: dict[str, str] = {}
    found: dict[str, ClusterWorker | str] = {}
    for address in addresses:
        host = None
        with contextlib.suppress(TimeoutError):
            answers = client.run(socket.gethostname, workers=[address], on_error="return", callback_timeout=ANSWER_S)
            host = answers[address]
        if isinstance(host, str):
            names[address] = worker_name(host, address)
        else:
            found[address] = f"Dask worker {address.rpartition('/')[2]} {SILENT}"
    found |= _problems(client, names, probe)
    usable = [address for address in names if address not in found]
    for address, table in client.run(find_device, device, workers=usable, on_error="return").items():
        if isinstance(table, Exception):
            found[address] = f"Dask worker {names[address]}: {table}"
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


def _problems(client: Any, names: Mapping[str, str], probe: Path) -> dict[str, str]:
    """Return why Dask workers cannot be used, by address. `names` maps their addresses to their names.

    Only functions of the standard library run there, because a Dask worker without hpsearch would end.
    """
    problems: dict[str, str] = {}
    run = partial(client.run, workers=[*names], on_error="return")
    for program, version in VERSIONS.items():
        for address, found in run(version).items():
            if not isinstance(found, CommClosedError) and _release(found) != _release(version()):
                theirs = f"no {program}" if isinstance(found, PackageNotFoundError) else f"{program} {found}"
                what = f"Dask worker {names[address]} has {theirs}, this machine has {program} {version()}"
                problems.setdefault(address, f"{what}: install the same version on all machines")
    for address, content in run(partial(Path.read_text, probe)).items():
        if not isinstance(content, CommClosedError) and content != probe.read_text():
            what = f"Dask worker {names[address]} does not see the project folder: it has another {probe}, or none"
            advice = "Mount the project folder and the images at the same paths on all machines"
            problems.setdefault(address, f"{what}. {advice}")
    return problems


def _release(version: object) -> str:
    """Return a version without its build: `2.15.0+cpu` and `2.15.0+cu130` are the same for different devices."""
    return str(version).partition("+")[0]
