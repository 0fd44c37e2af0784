"""Decode jobs in the subprocess that decode_pool.py starts: `python -m hpsearch.data.decode_worker N_THREADS`.

Threads suffice, because the decoders and the resize release the GIL. The libraries are then loaded only once.
"""

import contextlib
import os
import pickle
import signal
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor

import torch

from hpsearch.data.decode import decode_job
from hpsearch.data.decode_pool import DecodeError, ImageStats, Job, Pixels
from hpsearch.data.memory_gate import MemoryGate

MAX_BYTES = 400 * 2**20
"""Decoded pixels that all threads hold together. A single larger image is decoded alone."""


def main(n_threads: int) -> None:
    """Answer the jobs on standard input until it ends."""
    # Ctrl-C reaches the whole process group, but the parent decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    # Libraries may print to standard output, so the answers get a descriptor of their own.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    lock, gate = threading.Lock(), MemoryGate(MAX_BYTES)

    def run(number: int, job: Job) -> None:
        answer: tuple[int, ImageStats | DecodeError, list[Pixels]]
        try:
            try:
                answer = (number, *decode_job(job, gate.admitted))
            except DecodeError as error:
                answer = (number, error, [])
            with lock:
                pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
                answers.flush()
        except BaseException:
            # If only this thread ended, the parent would wait forever.
            traceback.print_exc()
            os._exit(70)

    with ThreadPoolExecutor(n_threads) as threads, contextlib.suppress(EOFError):
        while True:
            threads.submit(run, *pickle.load(sys.stdin.buffer))


if __name__ == "__main__":
    main(int(sys.argv[1]))
