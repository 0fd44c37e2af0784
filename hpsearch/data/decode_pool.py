"""Decode images in a subprocess. The caller loads no torch, and no damaged file can end it.

The subprocess (decode.py) reads a pickled list of jobs and answers each, in order, with a pickled tuple of
result and pixels.
"""

import itertools
import pickle
import subprocess
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hpsearch import subprocesses
from hpsearch.cores import available_cores
from hpsearch.data.reading import PLAIN_READING, Reading
from hpsearch.errors import CacheError, DatasetError

View = Literal["resize", "random crop", "centre crop"]
"""Method that brings an image to the size of the cache."""
Pixels = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""An image (H, W, 3) and its mask (H, W) of 0 and 1."""


@dataclass(frozen=True)
class Job:
    """One pair to decode. Without views it is only checked."""

    image: Path | None
    mask: Path | None
    """The two files. A job with only one of them has no views."""
    views: tuple[View, ...] = ()
    height: int = 0
    width: int = 0
    """Size of the views."""
    crop_seed: str = ""
    """Seed for the position of the random crop."""
    measure: bool = True
    """Whether to compute hashes and moments."""
    send: bool = True
    """Whether to return the pixels of the views."""
    reading: Reading = PLAIN_READING


@dataclass(frozen=True)
class ImageStats:
    """Sizes, hashes and pixel sums of one decoded pair."""

    height: int
    width: int
    """Original size."""
    image_sha256: str = ""
    mask_sha256: str = ""
    """SHA-256 of the files' content. Empty without `Job.measure`."""
    foreground: int = 0
    """Lesion pixels of the original mask."""
    moments: tuple[int, ...] = ()
    """Sums over the pixels of the first view: R, G, B, RR, GG, BB, RG, RB, GB. Empty without views."""
    crc: int = 0
    """CRC-32 of the bytes of all views."""
    view_foreground: int = -1
    """Lesion pixels of the mask in the first view, -1 without views."""
    mask_values: tuple[str, ...] = ()
    """Values of the mask as text (masks.MaskValue): background and lesion, or the only one."""
    largest: int = 0
    """Largest value of an image of more than 8 bits before scaling, 0 for other images."""
    is_constant: bool = False
    """Whether all pixels of the image have one colour. False without `Job.measure`."""

    def lesion_share(self, size: tuple[int, int] | None = None) -> float:
        """Return the share of the mask that is lesion, in the file or in the first view, whose size is `size`."""
        if size is None:
            return self.foreground / (self.height * self.width)
        return self.view_foreground / (size[0] * size[1])


def crc_of(pixels: list[Pixels]) -> int:
    """Return the CRC-32 of the bytes of all views."""
    return reduce(lambda crc, array: zlib.crc32(array.data, crc), itertools.chain(*pixels), 0)


class DecodeError(DatasetError):
    """A pair that cannot be used."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(kind, text)
        self.kind = kind
        """The kind of problem, with the same words for every image (`undecodable file`)."""
        self.text = text

    def __str__(self) -> str:
        return self.text


class Decoders(AbstractContextManager["Decoders"]):
    """A subprocess that decodes with `n_threads` threads. Leaving the context ends it."""

    def __init__(self, n_threads: int | None = None) -> None:
        self._n_threads = n_threads or available_cores()
        self._process: subprocess.Popen[bytes] | None = None

    def __exit__(self, *_: object) -> None:
        self.close()

    def decode(self, jobs: Sequence[Job]) -> Iterator[tuple[int, ImageStats | DecodeError, list[Pixels]]]:
        """Yield the number of each job, its result and the pixels of its views, in the order of the jobs.

        Raises CacheError, naming the files that were being read, if the subprocess dies.
        """
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        number = 0
        try:
            pickle.dump(list(jobs), process.stdin)
            process.stdin.flush()
            for number in range(len(jobs)):
                yield number, *pickle.load(process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            error = self._death(jobs[number : number + self._n_threads])
            self.close()
            raise error from None
        except BaseException:
            # Otherwise the remaining answers would be mistaken for answers to the next jobs.
            self.close()
            raise

    def close(self) -> None:
        """End the subprocess, even while it works."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._stderr.close()
            self._process = None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            # Not a pipe, which would fill up because nothing reads it while the subprocess works.
            self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the subprocess
            self._process = subprocess.Popen(
                subprocesses.command("hpsearch.data.decode", str(self._n_threads)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=subprocesses.environment(
                    OMP_NUM_THREADS="1",
                    MKL_NUM_THREADS="1",
                    # glibc keeps the memory of the largest images in every arena, but returns blocks that it maps
                    # separately.
                    MALLOC_ARENA_MAX="2",
                    MALLOC_MMAP_THRESHOLD_=str(2**20),
                ),
            )
        return self._process

    def _death(self, jobs: Sequence[Job]) -> CacheError:
        assert self._process is not None
        code = self._process.wait()
        self._stderr.seek(0)
        last = self._stderr.read().decode(errors="replace").strip().splitlines()[-1:]
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        why = f" ({last[0]})" if last else ""
        files = ", ".join(str(job.image or job.mask) for job in jobs)
        return CacheError(f"the process that decodes ended {how}{why} while it read {files}")
