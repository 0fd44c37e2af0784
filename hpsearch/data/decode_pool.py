"""Decode images in a subprocess, so that the caller does not import torch and damaged files cannot crash it.

The subprocess (decode.py) reads a pickled list of jobs. For each job, in order, it writes a pickled tuple of the
result and the pixels.
"""

import itertools
import pickle
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
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
"""Way of fitting an image to the cached size. The resulting image and mask are also called a view."""
Pixels = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""Images (..., H, W, 3) and their masks (..., H, W) of 0 and 1."""
Progress = Callable[[int, int], None]
"""Progress callback, called with (done, total)."""


@dataclass(frozen=True)
class Job:
    """Image/mask pair to decode. If `views` is empty, the pair is only checked."""

    image: Path | None
    mask: Path | None
    """Path of the mask. If either path is None, `views` must be empty."""
    views: tuple[View, ...] = ()
    height: int = 0
    width: int = 0
    """Height and width of the views in pixels."""
    crop_seed: str = ""
    """Seed for the position of the random crop."""
    measure: bool = True
    """Whether to compute `ImageStats.image_sha256`, `mask_sha256`, `moments` and `is_constant`."""
    send: bool = True
    """Whether to return the pixels of the views."""
    reading: Reading = PLAIN_READING


@dataclass(frozen=True)
class ImageStats:
    """Size, hashes and pixel sums of one decoded pair."""

    height: int
    width: int
    """Original height and width in pixels."""
    image_sha256: str = ""
    mask_sha256: str = ""
    """SHA-256 of the image and mask files, in hexadecimal. Both are empty if `Job.measure` is False."""
    foreground: int = 0
    """Number of lesion pixels in the original mask."""
    moments: tuple[int, ...] = ()
    """Sums of R, G and B and of the products RR, GG, BB, RG, RB and GB over all pixels of the first view.

    Empty if there are no views or `Job.measure` is False.
    """
    crc: int = 0
    """CRC-32 of the bytes of all views."""
    view_foreground: int = -1
    """Number of lesion pixels in the first view of the mask. -1 if there are no views."""
    mask_values: tuple[str, ...] = ()
    """Pixel values of the mask as text (`MaskValue.text`): background and lesion, or a single value."""
    largest: int = 0
    """Largest pixel value before scaling to 8 bits. 0 for images with at most 8 bits per channel."""
    is_constant: bool = False
    """Whether all pixels of the image have the same colour. False if `Job.measure` is False."""

    def lesion_share(self, size: tuple[int, int] | None = None) -> float:
        """Return the share of lesion pixels in the original mask or, given the `size` of views, in the first view."""
        if size is None:
            return self.foreground / (self.height * self.width)
        return self.view_foreground / (size[0] * size[1])


def crc_of(pixels: list[Pixels]) -> int:
    """Return the CRC-32 of the bytes of all images and masks in `pixels`."""
    return reduce(lambda crc, array: zlib.crc32(array.data, crc), itertools.chain(*pixels), 0)


@dataclass(eq=False)
class DecodeError(DatasetError):
    """Raised if an image/mask pair cannot be used."""

    kind: str
    """Kind of problem, such as `undecodable file`. It does not name the image."""
    text: str

    def __str__(self) -> str:
        return self.text


class Decoders(AbstractContextManager["Decoders"]):
    """Subprocess that decodes images in `n_threads` threads (default: one per core). Leaving the context kills it."""

    def __init__(self, n_threads: int | None = None) -> None:
        self._n_threads = n_threads or available_cores()
        self._process: subprocess.Popen[bytes] | None = None
        self._has_unread = False
        """Whether the subprocess has results that were not read yet."""

    def __exit__(self, *_: object) -> None:
        self.close()

    def decode(
        self, jobs: Sequence[Job], progress: Progress | None = None
    ) -> Iterator[tuple[ImageStats | DecodeError, list[Pixels]]]:
        """Yield the result of each job and the pixels of its views, in the order of the jobs.

        `progress` is called when the caller has processed a result. Calling `decode` again ends an unfinished
        iteration. Raises CacheError, naming the files that were being read, if the subprocess dies.
        """
        if self._has_unread:
            # Unread results of the last call would be mistaken for results of these jobs.
            self.close()
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        number = 0
        try:
            self._has_unread = True
            pickle.dump(list(jobs), process.stdin)
            process.stdin.flush()
            for number in range(len(jobs)):
                yield pickle.load(process.stdout)
                if progress is not None:
                    progress(number + 1, len(jobs))
            self._has_unread = False
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            raise self._death(process.wait(), jobs[number : number + self._n_threads]) from None
        finally:
            # End the subprocess if nothing will read its remaining results. A later call may already have replaced
            # it.
            if self._has_unread and process is self._process:
                self.close()

    def close(self) -> None:
        """Kill the subprocess, even if it is still decoding."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._stderr.close()
            self._process, self._has_unread = None, False

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            # Use a file, because nothing reads stderr while the subprocess runs. A pipe would fill up and block it.
            self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the subprocess
            self._process = subprocess.Popen(
                subprocesses.command("hpsearch.data.decode", str(self._n_threads)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=subprocesses.environment(
                    OMP_NUM_THREADS="1",
                    MKL_NUM_THREADS="1",
                    # By default, each glibc arena keeps the memory of its largest images. Large blocks that are
                    # mapped separately are returned to the system.
                    MALLOC_ARENA_MAX="2",
                    MALLOC_MMAP_THRESHOLD_=str(2**20),
                ),
            )
        return self._process

    def _death(self, code: int, jobs: Sequence[Job]) -> CacheError:
        self._stderr.seek(0)
        last = self._stderr.read().decode(errors="replace").strip().splitlines()[-1:]
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        why = f" ({last[0]})" if last else ""
        files = ", ".join(str(job.image or job.mask) for job in jobs)
        return CacheError(f"the decoding process ended {how}{why} while it was reading {files}")
