"""Decode jobs in the subprocess that decode_pool.py starts: `python -m hpsearch.data.decode_worker N_THREADS`.

Threads suffice, because the decoders and the resize release the GIL. The libraries are then loaded only once.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

import torch

from hpsearch.data.decode import decode_job, open_job
from hpsearch.data.decode_pool import DecodeError, ImageStats, Job, Pixels
from hpsearch.data.memory_gate import MemoryGate

MAX_BYTES = 400 * 2**20
"""Decoded pixels that all threads hold together. A single larger image is decoded alone."""


class _Worker:
    def __init__(self, answers: BinaryIO) -> None:
        self._answers = answers
        self._lock = threading.Lock()
        self._gate = MemoryGate(MAX_BYTES)

    def run(self, number: int, job: Job) -> None:
        """Decode one job and send the answer. End the process if that fails for another reason than the image."""
        try:
            self._send(number, None, [])
            try:
                pair = open_job(job)
                # Held until the answer is sent, so that answers do not pile up if the parent reads slowly.
                with self._gate.admitted(pair.working_bytes(job)):
                    self._send(number, *decode_job(pair, job))
            except DecodeError as error:
                self._send(number, error, [])
        except BrokenPipeError:
            # The parent process has ended.
            os._exit(1)
        except BaseException:
            # If only this thread ended, the parent would wait forever.
            sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
            os._exit(70)

    def _send(self, number: int, result: ImageStats | DecodeError | None, pixels: list[Pixels]) -> None:
        with self._lock:
            pickle.dump((number, result, pixels), self._answers, pickle.HIGHEST_PROTOCOL)
            self._answers.flush()


def main(n_threads: int) -> None:
    """Answer the jobs on standard input until it ends."""
    # Ctrl-C reaches the whole process group, but the parent decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    # Libraries may print to standard output, so the answers get a descriptor of their own.
    worker = _Worker(os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)
    with ThreadPoolExecutor(n_threads) as threads:
        while True:
            try:
                number, job = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            threads.submit(worker.run, number, job)


if __name__ == "__main__":
    main(int(sys.argv[1]))
