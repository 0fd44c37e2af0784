"""Decode in the subprocess that `decoding.Decoders` starts: `python -m hpsearch.data.decode_worker N` for N threads.

Threads are enough: the decoders and the resize release Python's lock, and the libraries are loaded once.
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

from hpsearch.data.decode import BadImageError, decode_job, open_job
from hpsearch.data.decode_pool import Damage, Facts, Job, Pixels
from hpsearch.data.memory_gate import MemoryGate

BYTES_IN_FLIGHT = 400 * 2**20
"""Decoded pixels that all threads hold together, unless a single image has more."""


class _Worker:
    def __init__(self, answers: BinaryIO) -> None:
        self._answers = answers
        self._lock = threading.Lock()
        self._gate = MemoryGate(BYTES_IN_FLIGHT)

    def run(self, number: int, job: Job) -> None:
        """Decode one job and answer. End the process if that fails for another reason than the image."""
        try:
            self._answer(number, None, [])
            try:
                pair = open_job(job)
                # Until the answer is sent: answers must not pile up here if the parent reads slowly.
                with self._gate.admitted(pair.working_bytes(job)):
                    self._answer(number, *decode_job(pair, job))
            except BadImageError as error:
                self._answer(number, Damage(error.kind, str(error)), [])
        except BrokenPipeError:
            # The parent is gone.
            os._exit(1)
        except BaseException:
            # A thread that ends alone would leave the parent waiting forever.
            sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
            os._exit(70)

    def _answer(self, number: int, result: Facts | Damage | None, pixels: list[Pixels]) -> None:
        with self._lock:
            pickle.dump((number, result, pixels), self._answers, pickle.HIGHEST_PROTOCOL)
            self._answers.flush()


def main(n_threads: int) -> None:
    """Answer the jobs on standard input until it ends."""
    # Ctrl-C reaches the whole process group, and the parent decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    # What a library prints must not come between the answers.
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
