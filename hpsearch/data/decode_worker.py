"""Decode jobs in the subprocess that decode_pool.py starts: `python -m hpsearch.data.decode_worker N_THREADS`.

Threads suffice, because the decoders and the resize release the GIL. The libraries are then loaded only once.
"""

import os
import pickle
import signal
import sys
import traceback
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from hpsearch.data.decode import decode_job
from hpsearch.data.decode_pool import DecodeError, ImageStats, Job, Pixels
from hpsearch.data.memory_gate import MemoryGate

MAX_BYTES = 400 * 2**20
"""Decoded pixels that all threads hold together. A single larger image is decoded alone."""
Answer = tuple[ImageStats | DecodeError, list[Pixels]]


def main(n_threads: int) -> None:
    """Answer the lists of jobs on standard input, in order, until it ends."""
    # Ctrl-C reaches the whole process group, but the parent decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    # Libraries may print to standard output, so the answers get a descriptor of their own.
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    gate, threads = MemoryGate(MAX_BYTES), ThreadPoolExecutor(n_threads)

    def answer(job: Job) -> Answer:
        try:
            return decode_job(job, gate.admitted)
        except DecodeError as error:
            return error, []

    def send(future: Future[Answer]) -> None:
        pickle.dump(future.result(), output, pickle.HIGHEST_PROTOCOL)
        output.flush()

    waiting: deque[Future[Answer]] = deque()
    try:
        while True:
            for job in pickle.load(sys.stdin.buffer):
                # Bounds the answers that wait for an earlier one, or for a slow parent.
                if len(waiting) == 4 * n_threads:
                    send(waiting.popleft())
                waiting.append(threads.submit(answer, job))
            while waiting:
                send(waiting.popleft())
    except BaseException as error:
        if not isinstance(error, EOFError):
            traceback.print_exc()
        # Without waiting for the other threads.
        os._exit(70)


if __name__ == "__main__":
    main(int(sys.argv[1]))
