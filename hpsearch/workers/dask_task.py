"""Run a worker process in a task on a Dask worker, and pass its messages on.

A task represents a worker, not a job. Fits run in a subprocess of the Dask worker, which runs the same program as the
processes of `LocalPool`. Results are therefore the same as on one machine: the number of threads is set before torch
is imported, and nothing else runs in the process. Torch is imported once, and the images stay loaded between jobs. A
hanging fit can be killed. A crash, or a fit that runs out of memory, ends the subprocess and not the Dask worker.
"""

import asyncio
import json
import os
import subprocess
import threading
from functools import partial
from pathlib import Path
from typing import Any

from distributed import Client, Status, Worker, get_worker

from hpsearch import subprocesses
from hpsearch.errors import WorkerError
from hpsearch.workers.jobs import WorkerSettings, from_message, to_message
from hpsearch.workers.local_pool import LocalPool

POLL_S = 0.25
"""Time in seconds between two checks whether the task was cancelled."""
STARTED, ENDED = "started", "ended"
"""Messages of the task itself. It has no process any more when it sends `ENDED`."""


def commands_of(name: str) -> str:
    """Return the topic of the coordinator's messages to the task `name`. The task answers to the topic `name`."""
    return f"{name}-commands"


async def find_device(name: str, dask_worker: Worker) -> dict[str, Any]:
    """Run `workers.device` on this machine, in a subprocess because torch would take memory in the Dask worker.

    Raises WorkerError if the device is not available.
    """
    command, environment = subprocesses.command("hpsearch.workers.device", name), subprocesses.environment()
    run = partial(subprocess.run, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment)
    done = await asyncio.to_thread(run, command)
    if done.returncode:
        # The last line of a traceback: the class of the error and its text.
        raise WorkerError(done.stderr.strip().rpartition("\n")[2].partition(": ")[2])
    return {**json.loads(done.stdout), "threads": dask_worker.state.nthreads}


def run_worker(name: str, settings: dict[str, Any]) -> None:
    """Run a worker process until the task is cancelled or the Dask worker closes.

    Raises WorkerError if the process cannot be started.
    """
    dask_worker = get_worker()
    key, is_connected = dask_worker.get_current_task(), threading.Event()
    dask_worker.log_event(name, STARTED)
    # Dask's nanny sets this for its workers. It costs a training process on a CPU 40 % more time, in page faults.
    os.environ.pop("MALLOC_TRIM_THRESHOLD_", None)
    try:
        with (
            # Not `get_client`: this client and its subscription end with the task.
            Client(dask_worker.scheduler.address, security=dask_worker.security, set_as_default=False) as client,
            LocalPool(Path(dask_worker.local_directory)) as pool,
        ):

            def on_command(event: tuple[float, str]) -> None:
                # Runs in Dask's thread, so commands are handled even while `pool.events` waits.
                command = json.loads(event[1])
                if "go" in command:
                    for worker in pool.busy():
                        pool.reply(worker, go=command["go"])
                elif command:
                    for worker in pool.idle():
                        pool.submit(worker, from_message(command))
                is_connected.set()

            client.subscribe_topic(commands_of(name), on_command)
            # The scheduler drops messages before the subscription takes effect: send some until one comes back.
            while not is_connected.is_set() and _is_wanted(dask_worker, key):
                client.log_event(commands_of(name), "{}")
                is_connected.wait(POLL_S)
            pool.resize([WorkerSettings(**settings)])
            while _is_wanted(dask_worker, key):
                for event in pool.events(POLL_S):
                    dask_worker.log_event(name, json.dumps(to_message(event.report)))
    finally:
        dask_worker.log_event(name, ENDED)


def _is_wanted(dask_worker: Worker, key: str) -> bool:
    """Return whether the task was not cancelled. Dask does so when the coordinator ends or its connection is lost."""
    task = dask_worker.state.tasks.get(key)
    is_open = dask_worker.status in (Status.running, Status.paused)
    return is_open and task is not None and task.state == "executing"
