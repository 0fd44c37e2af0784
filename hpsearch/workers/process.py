"""Worker process, which runs one job at a time.

It is started as `python -m hpsearch.workers.process SOCKET SETTINGS`. It reads jobs as JSON and answers with reports.
It writes a checkpoint after each epoch, so it may be killed at any time. It ends when its socket closes, because the
coordinator is then gone.
"""

import ctypes
import json
import logging
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Literal

from hpsearch.errors import HpsearchError, OutOfMemoryError
from hpsearch.training.rows import EpochRow
from hpsearch.workers import jobs, tasks
from hpsearch.workers.jobs import Failed, Finished, Job, Report, Stopped, WorkerSettings, from_message, to_message
from hpsearch.workers.tasks import WorkerContext

Message = dict[str, Any]
_TASKS: dict[type[Job], Callable[[Any, WorkerContext], Finished | Stopped | None]] = {
    jobs.FitJob: tasks.run_fit,
    jobs.MeasureJob: tasks.measure,
    jobs.OfficialScoreJob: tasks.score_officially,
    jobs.SelectPostprocessingJob: tasks.select,
    jobs.KeepJob: tasks.keep,
    jobs.CountJob: tasks.count,
}


def main() -> None:
    """Run jobs until the socket closes."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    connection = Connection(int(sys.argv[1]))
    settings = WorkerSettings(**json.loads(sys.argv[2]))
    for name in (signal.SIGINT, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)
    if sys.platform == "linux":
        # Have Linux kill this process when the coordinator dies, because a suspended process cannot notice that its
        # socket has closed.
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    messages: queue.Queue[Message] = queue.Queue()

    def read() -> None:
        while True:
            try:
                messages.put(json.loads(connection.recv_bytes()))
            except (EOFError, OSError):
                # It is safe to exit: everything up to the last epoch is on disk.
                os._exit(0)

    def send(message: Message) -> None:
        try:
            connection.send_bytes(json.dumps(message).encode())
        except OSError:
            os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    serve(settings, send, messages.get)


def serve(settings: WorkerSettings, send: Callable[[Message], None], receive: Callable[[], Message]) -> None:
    """Report `Ready`, then run all jobs that are received. Ends only when `send` or `receive` raises an exception."""

    def report_epoch(row: EpochRow, _: object) -> Literal["go", "stop"]:
        send(to_message(jobs.EpochEnded(row)))
        return "go" if receive()["go"] else "stop"

    context = WorkerContext(settings, report_epoch)
    send(to_message(jobs.Ready()))
    while True:
        send(to_message(_run(from_message(receive()), context)))


def _run(job: Job, context: WorkerContext) -> Report:
    """Run one job and return how it ended."""
    try:
        return _TASKS[type(job)](job, context) or Finished()
    except HpsearchError as error:
        if isinstance(error, OutOfMemoryError):
            context.forget_images()
        return Failed(error=type(error).__name__, text=str(error))
    except Exception as error:
        return Failed(text=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())


if __name__ == "__main__":
    main()
