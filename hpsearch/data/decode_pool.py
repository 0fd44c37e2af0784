"""Decodes images in a subprocess with all cores, so that the caller loads no torch and no damaged file can end it.

The subprocess (decode.py) reads one JSON line per image and answers with one JSON line, followed by the
pixels as bytes.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
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
    """What to make of it; nothing: it is only checked."""
    height: int = 0
    width: int = 0
    crop_seed: str = ""
    """Decides where the random crop lies."""
    measure: bool = True
    """Whether hashes and moments are wanted too."""
    send: bool = True
    """Whether the pixels of the views are wanted, or only what is counted in them."""
    reading: Reading = PLAIN_READING
    parts: Literal["both", "image", "mask"] = "both"
    """Which of the two files is decoded; one alone has no views."""


@dataclass(frozen=True)
class Facts:
    """What is known of a pair once it was decoded."""

    height: int
    width: int
    """Original size."""
    image_sha256: str
    mask_sha256: str
    """Of the files' content."""
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
        """Facts that were written as JSON."""
        return cls(**{**table, "moments": tuple(table["moments"]), "mask_values": tuple(table["mask_values"])})


@dataclass(frozen=True)
class Damage:
    """Why a pair cannot be used."""

    kind: str
    text: str


class Decoders:
    """A subprocess that decodes with `n_threads` threads; a context manager."""

    def __init__(self, n_threads: int | None = None) -> None:
        self._n_threads = n_threads or available_cores()
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: IO[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def decode(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Facts | Damage, list[Pixels]]]:
        """The number of each job, what became of it, and the pixels of its views; in the order they are done.

        Raises CacheError, naming the files that were being read, when the subprocess dies.
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
                line = process.stdout.readline()
                if not line.endswith(b"\n"):
                    raise self._death([jobs[number].image or jobs[number].mask for number in sorted(working)])
                answer = json.loads(line)
                number = answer["number"]
                if "begun" in answer:
                    working.add(number)
                    continue
                working.discard(number)
                result: Facts | Damage
                pixels: list[Pixels] = []
                if "damage" in answer:
                    result = Damage(**answer["damage"])
                else:
                    result = Facts.from_table(answer["facts"])
                    if jobs[number].send:
                        pixels = [_read_pixels(process.stdout, jobs[number]) for _ in jobs[number].views]
                n_done += 1
                yield number, result, pixels
        finally:
            if n_done == len(jobs):
                feeder.join()
            else:
                # Answers that nobody waits for would be taken for those to the next jobs.
                self.close()

    def close(self) -> None:
        """End the subprocess, whatever it is doing."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    # Jobs that were not read any more: nobody wants them.
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()
        stderr, self._stderr = self._stderr, None
        if stderr is not None:
            stderr.close()

    @property
    def pid(self) -> int | None:
        """The subprocess, if one runs."""
        return None if self._process is None else self._process.pid

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            # A file, not a pipe: nobody would read a pipe while the subprocess works.
            self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the subprocess
            self._process = subprocess.Popen(
                subprocesses.command("hpsearch.data.decode", str(self._n_threads)),
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
        # glibc would keep the memory of the largest images, once for each arena; blocks of their own are given back.
        MALLOC_ARENA_MAX="2",
        MALLOC_MMAP_THRESHOLD_=str(2**20),
    )


def _feed(stdin: IO[bytes], jobs: Iterable[Job]) -> None:
    try:
        for number, job in enumerate(jobs):
            stdin.write(json.dumps({"number": number, **asdict(job)}).encode() + b"\n")
        stdin.flush()
    except (BrokenPipeError, ValueError):
        # The subprocess died or was closed: whoever reads its answers says so.
        pass


def _read_pixels(stdout: IO[bytes], job: Job) -> Pixels:
    image = np.empty((job.height, job.width, 3), np.uint8)
    mask = np.empty((job.height, job.width), np.uint8)
    for array in (image, mask):
        view = array.data.cast("B")
        while view:
            n = stdout.readinto(view)  # type: ignore[attr-defined]
            if not n:
                raise CacheError("the process that decodes ended in the middle of an image")
            view = view[n:]
    return image, mask
