"""Decode images in a subprocess, so that the caller loads no torch and no damaged file can end it.

The subprocess (decode_worker.py) reads pickled jobs and answers each with two pickled tuples: number, result, pixels.
The first has the result None and says that the job begins, so that the files are known if the process dies.
"""

from __future__ import annotations

import contextlib
import pickle
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import IO, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from hpsearch import subprocesses
from hpsearch.cores import available_cores
from hpsearch.data.reading import PLAIN_READING, Reading
from hpsearch.errors import CacheError

View = Literal["resize", "random crop", "centre crop"]
"""How an image is brought to the size of the cache."""
Pixels = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""An image (H, W, 3) and its mask (H, W) of 0 and 1."""


@dataclass(frozen=True)
class Job:
    """One pair to decode."""

    image: str
    mask: str
    views: tuple[View, ...] = ()
    """Views to make. Without views the pair is only checked."""
    height: int = 0
    width: int = 0
    crop_seed: str = ""
    """Seed of the place of the random crop."""
    measure: bool = True
    """Whether to compute hashes and moments."""
    send: bool = True
    """Whether to return the pixels of the views, or only their counts."""
    reading: Reading = PLAIN_READING
    parts: Literal["both", "image", "mask"] = "both"
    """Which of the two files to decode. One alone has no views."""


@dataclass(frozen=True)
class Facts:
    """Facts about a decoded pair."""

    height: int
    width: int
    """Original size."""
    image_sha256: str
    mask_sha256: str
    """SHA-256 of the files' content."""
    foreground: int
    """Lesion pixels of the original mask."""
    moments: tuple[int, ...]
    """Sums over the pixels of the first view: R, G, B, RR, GG, BB, RG, RB, GB. Empty without views."""
    crc: int
    """CRC-32 of the bytes of all views."""
    view_foreground: int = -1
    """Lesion pixels of the mask in the first view; -1 without views."""
    mask_values: tuple[str, ...] = ()
    """The mask's values as text (masks.MaskValue): background and lesion, or the only one."""
    largest: int = 0
    """Largest value of an image of more than 8 bits, before it is scaled; 0 for others."""
    is_constant: bool = False
    """Whether all pixels of the image are of one colour. False where it was not asked for (`Job.measure`)."""
    is_oriented: bool = False
    """Whether image or mask has an EXIF orientation other than upright."""

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Self:
        """Return the facts in a table that was read from JSON."""
        return cls(**{**table, "moments": tuple(table["moments"]), "mask_values": tuple(table["mask_values"])})


@dataclass(frozen=True)
class Damage:
    """Why a pair cannot be used."""

    kind: str
    text: str


class Decoders(AbstractContextManager["Decoders"]):
    """A subprocess that decodes with `n_threads` threads. Leaving the context ends it."""

    def __init__(self, n_threads: int | None = None) -> None:
        self._n_threads = n_threads or available_cores()
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: IO[bytes] | None = None

    def __exit__(self, *_: object) -> None:
        self.close()

    def decode(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Facts | Damage, list[Pixels]]]:
        """Yield the number of each job, its result and the pixels of its views, in the order of completion.

        Raises CacheError, naming the files that were being read, if the subprocess dies.
        """
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        feeder = threading.Thread(target=_feed, args=(process.stdin, jobs), daemon=True)
        feeder.start()
        working: set[int] = set()
        n_done = 0
        try:
            while n_done < len(jobs):
                try:
                    number, result, pixels = pickle.load(process.stdout)
                except (EOFError, pickle.UnpicklingError):
                    raise self._death([jobs[n].image or jobs[n].mask for n in sorted(working)]) from None
                if result is None:
                    working.add(number)
                    continue
                working.discard(number)
                n_done += 1
                yield number, result, pixels
        finally:
            if n_done == len(jobs):
                feeder.join()
            else:
                # Otherwise the remaining answers would be taken for those to the next jobs.
                self.close()

    def close(self) -> None:
        """End the subprocess, also while it works."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    # Closing flushes jobs that the subprocess did not read.
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()
        stderr, self._stderr = self._stderr, None
        if stderr is not None:
            stderr.close()

    @property
    def pid(self) -> int | None:
        """Process id of the subprocess, None if there is none."""
        return None if self._process is None else self._process.pid

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            # A file and not a pipe, because nobody reads while the subprocess works.
            self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the subprocess
            self._process = subprocess.Popen(
                subprocesses.command("hpsearch.data.decode_worker", str(self._n_threads)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=subprocess_environment(),
            )
        return self._process

    def _death(self, files: list[str]) -> CacheError:
        assert self._process is not None
        assert self._stderr is not None
        code = self._process.wait()
        self._stderr.seek(0)
        last = self._stderr.read().decode(errors="replace").strip().splitlines()[-1:]
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        why = f" ({last[0]})" if last else ""
        return CacheError(f"the process that decodes ended {how}{why} while it read {', '.join(files) or 'nothing'}")


def subprocess_environment() -> dict[str, str]:
    """Return the environment of a subprocess that decodes with threads of its own."""
    return subprocesses.environment(
        OMP_NUM_THREADS="1",
        MKL_NUM_THREADS="1",
        # glibc would keep the memory of the largest images in every arena. It returns blocks that it maps separately.
        MALLOC_ARENA_MAX="2",
        MALLOC_MMAP_THRESHOLD_=str(2**20),
    )


def _feed(stdin: IO[bytes], jobs: Sequence[Job]) -> None:
    # If the subprocess died or was closed, the reader of its answers raises the error.
    with contextlib.suppress(BrokenPipeError, ValueError):
        for each in enumerate(jobs):
            pickle.dump(each, stdin)
        stdin.flush()
