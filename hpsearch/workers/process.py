"""A worker process: runs one job at a time.

Started as `python -m hpsearch.workers.process SOCKET SETTINGS`. It reads jobs as JSON, answers with reports and
writes a checkpoint after each epoch, so it may be killed at any time. It ends when its socket closes, because then
its coordinator is gone.
"""

from __future__ import annotations

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

import numpy as np
import numpy.typing as npt

from hpsearch.errors import DivergedError, HpsearchError, OutOfMemoryError, StorageError
from hpsearch.training.loop import OnEpoch
from hpsearch.training.rows import EpochRow
from hpsearch.workers import benchmark_tasks, fit_task, scoring_tasks
from hpsearch.workers.context import WorkerContext
from hpsearch.workers.jobs import (
    CountJob,
    EpochEnded,
    Failed,
    Finished,
    FitJob,
    FitScore,
    Job,
    KeepJob,
    MeasureJob,
    OfficialScoreJob,
    RateJob,
    Ready,
    Report,
    ScoreJob,
    SelectPostprocessingJob,
    Stopped,
    job_from_json,
    report_to_json,
)
from hpsearch.workers.pool import WorkerSettings

Message = dict[str, Any]
Send = Callable[[Message], None]
Receive = Callable[[], Message]


def main() -> None:
    """Run jobs until the socket closes."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    connection = Connection(int(sys.argv[1]))
    settings = WorkerSettings(**json.loads(sys.argv[2]))
    for name in (signal.SIGINT, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)
    _end_with_parent()
    messages = _messages(connection)

    def send(message: Message) -> None:
        try:
            connection.send_bytes(json.dumps(message).encode())
        except OSError:
            os._exit(0)

    serve(settings, send, messages.get)


def serve(settings: WorkerSettings, send: Send, receive: Receive) -> None:
    """Report `Ready`, then run every job that is received; ends only by an exception of `send` or `receive`."""
    context = WorkerContext(settings)

    def report_epoch(row: EpochRow, scores: npt.NDArray[np.float32]) -> Literal["go", "stop"]:
        send(report_to_json(EpochEnded(row)))
        return "go" if receive()["go"] else "stop"

    send(report_to_json(Ready()))
    while True:
        send(report_to_json(_run(job_from_json(receive()), context, report_epoch)))


def _run(job: Job, context: WorkerContext, on_epoch: OnEpoch) -> Report:
    """Run one job and return how it ended."""
    try:
        return _run_task(job, context, on_epoch)
    except DivergedError as error:
        return Failed(reason="diverged", text=str(error), is_known=True)
    except OutOfMemoryError as error:
        context.forget_images()
        return Failed(reason="out_of_memory", text=str(error), is_known=True)
    except HpsearchError as error:
        is_storage = isinstance(error, StorageError)
        return Failed(reason="error", text=str(error), is_storage=is_storage, is_known=True)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return Failed(reason="error", text=text, traceback=traceback.format_exc())


def _run_task(job: Job, context: WorkerContext, on_epoch: OnEpoch) -> Report:
    match job:
        case FitJob():
            summary = fit_task.run_fit(job, context, on_epoch)
            return Stopped() if summary is None else Finished(FitScore(summary.value))
        case MeasureJob():
            return Finished(benchmark_tasks.measure(job, context))
        case RateJob():
            return Finished(benchmark_tasks.measure_rate(job, context))
        case ScoreJob():
            scoring_tasks.score(job, context)
        case OfficialScoreJob():
            scoring_tasks.score_officially(job, context)
        case SelectPostprocessingJob():
            scoring_tasks.select(job, context)
        case KeepJob():
            scoring_tasks.keep(job)
        case CountJob():
            scoring_tasks.count(job, context)
    return Finished()


def _end_with_parent() -> None:
    """Have Linux kill this process when the coordinator dies, even while it is stopped and reads nothing."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _messages(connection: Connection) -> queue.Queue[Message]:
    """Return a queue of the coordinator's messages, filled by a thread that ends the process with the socket."""
    messages: queue.Queue[Message] = queue.Queue()

    def read() -> None:
        while True:
            try:
                messages.put(json.loads(connection.recv_bytes()))
            except (EOFError, OSError):
                # Everything up to the last epoch is on disk.
                os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return messages


if __name__ == "__main__":
    main()
