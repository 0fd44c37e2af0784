"""Decode images in a subprocess, so that the caller need not import torch and damaged files cannot crash it.

The subprocess (decode.py) reads a pickled list of jobs. For each job, in order, it writes a pickled tuple of the
result and the pixels.
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
"""Method of resizing or cropping an image to the cached size."""
Pixels = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""Image (H, W, 3) and mask (H, W) of 0 and 1."""


@dataclass(frozen=True)
class Job:
    """Image/mask pair to decode. If `views` is empty, the pair is only checked."""

    image: Path | None
    mask: Path | None
    """Path of the mask. A job with only one of image and mask must not have views."""
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
    """SHA-256 of the image and mask files, in hexadecimal. Empty without `Job.measure`."""
    foreground: int = 0
    """Number of lesion pixels in the original mask."""
    moments: tuple[int, ...] = ()
    """Sums of R, G, B, RR, GG, BB, RG, RB and GB over all pixels of the first view.

    Empty without views or without `Job.measure`.
    """
    crc: int = 0
    """CRC-32 of the bytes of all views."""
    view_foreground: int = -1
    """Number of lesion pixels in the first view of the mask. -1 without views."""
    mask_values: tuple[str, ...] = ()
    """Pixel values of the mask as text (`MaskValue.text`): background and lesion, or a single value."""
    largest: int = 0
    """Largest pixel value before scaling to 8 bits. 0 for images of 8 bits or fewer per channel."""
    is_constant: bool = False
    """Whether all pixels of the image have the same colour. False without `Job.measure`."""

    def lesion_share(self, size: tuple[int, int] | None = None) -> float:
        """Return the share of lesion pixels in the original mask, or in the first view if its `size` is given."""
        if size is None:
            return self.foreground / (self.height * self.width)
        return self.view_foreground / (size[0] * size[1])


def crc_of(pixels: list[Pixels]) -> int:
    """Return the CRC-32 of the bytes of all images and masks in `pixels`."""
    return reduce(lambda crc, array: zlib.crc32(array.data, crc), itertools.chain(*pixels), 0)


class DecodeError(DatasetError):
    """Error for an image/mask pair that cannot be used."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(kind, text)
        self.kind = kind
        """Kind of problem, such as `undecodable file`. It is the same text for every image."""
        self.text = text

    def __str__(self) -> str:
        return self.text


class Decoders(AbstractContextManager["Decoders"]):
    """Decode jobs in a subprocess with `n_threads` threads. Leaving the context ends the subprocess."""

    def __init__(self, n_threads: int | None = None) -> None:
        self._n_threads = n_threads or available_cores()
        self._process: subprocess.Popen[bytes] | None = None

    def __exit__(self, *_: object) -> None:
        self.close()

    def decode(self, jobs: Sequence[Job]) -> Iterator[tuple[int, ImageStats | DecodeError, list[Pixels]]]:
        """Yield the index of each job, its result and the pixels of its views, in the order of the jobs.

        If the subprocess dies, raises CacheError with the names of the files that were being read.
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
            # Otherwise the remaining results would be mistaken for results of the next jobs.
            self.close()
            raise

    def close(self) -> None:
        """Kill the subprocess, even if it is still decoding."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._stderr.close()
            self._process = None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            # A pipe would fill up, because nothing reads it while the subprocess runs.
            self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the subprocess
            self._process = subprocess.Popen(
                subprocesses.command("hpsearch.data.decode", str(self._n_threads)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=subprocesses.environment(
                    OMP_NUM_THREADS="1",
                    MKL_NUM_THREADS="1",
                    # glibc would keep the memory of the largest images in every arena. It returns blocks to the
                    # system if they are mapped separately.
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
