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
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue

import torch

from hpsearch.data.decode import decode_job
from hpsearch.data.decode_pool import DecodeError, ImageStats, Job, Pixels
from hpsearch.data.memory_gate import MemoryGate

MAX_BYTES = 400 * 2**20
"""Decoded pixels that all threads hold together. A single larger image is decoded alone."""
Answer = tuple[ImageStats | DecodeError, list[Pixels]]


def main(n_threads: int) -> None:
    """Answer the jobs on standard input, in order, until it ends."""
    # Ctrl-C reaches the whole process group, but the parent decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    # Libraries may print to standard output, so the answers get a descriptor of their own.
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    gate, threads = MemoryGate(MAX_BYTES), ThreadPoolExecutor(n_threads)
    # Bounds the answers that wait for an earlier one, or for a slow parent.
    places = threading.Semaphore(4 * n_threads)
    answers: SimpleQueue[Future[Answer] | None] = SimpleQueue()

    def answer(job: Job) -> Answer:
        try:
            return decode_job(job, gate.admitted)
        except DecodeError as error:
            return error, []

    def read_jobs() -> None:
        with contextlib.suppress(EOFError):
            while True:
                job = pickle.load(sys.stdin.buffer)
                places.acquire()
                answers.put(threads.submit(answer, job))
        answers.put(None)

    threading.Thread(target=read_jobs, daemon=True).start()
    try:
        while (future := answers.get()) is not None:
            pickle.dump(future.result(), output, pickle.HIGHEST_PROTOCOL)
            output.flush()
            places.release()
    except BaseException:
        traceback.print_exc()
        # Without waiting for the other threads.
        os._exit(70)


if __name__ == "__main__":
    main(int(sys.argv[1]))
