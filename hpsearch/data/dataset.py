"""Image/mask pairs of a dataset, problems with them, and keys that name caches and surveys by their files."""

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hpsearch.paths import sha256_file

END_BYTES = 64 * 2**10
"""Bytes of each end of a file that a key depends on."""
Split = Literal["train", "val", "test"]
Layout = Literal["archive", "splits", "folders"]


@dataclass(frozen=True)
class Problem:
    """One error or note about an image or the whole dataset."""

    kind: str
    """Kind of problem, with the same words for every image (`missing mask`)."""
    id: str
    """Id of the image, empty for the whole dataset."""
    files: tuple[Path, ...]
    text: str
    """Description with both values."""
    split: Split


@dataclass(frozen=True)
class Sample:
    """One image with its mask."""

    id: str
    """Stem of the image's name in Unicode form NFC."""
    image: Path
    mask: Path
    split: Split

    def problem(self, kind: str, text: str, *files: Path) -> Problem:
        """Return a problem of this sample. `files` defaults to image and mask."""
        return Problem(kind, self.id, files or (self.image, self.mask), text, self.split)


@dataclass(frozen=True)
class Dataset:
    """All pairs of a dataset, train before val before test, sorted by id inside each split."""

    samples: tuple[Sample, ...]
    problems: tuple[Problem, ...]
    """Files without a partner, and other problems that names and links show."""
    root: Path
    layout: Layout
    flags: str = ""
    """Flags that name it on the command line: `--data DIR`, or `--images DIR --masks DIR`."""

    def split(self, *splits: Split) -> tuple[Sample, ...]:
        """Return the samples of these splits, in the dataset's order."""
        return tuple(sample for sample in self.samples if sample.split in splits)

    def problem(self, kind: str, text: str, split: Split = "train") -> Problem:
        """Return a problem of the whole dataset."""
        return Problem(kind, "", (self.root,), text, split)


def files_key(head: object, samples: Sequence[Sample]) -> str:
    """Return 24 hexadecimal digits that depend on `head` (plain types) and on every image and mask.

    The length and both ends of each file are read. A replaced image is thus noticed at every start, without reading
    the whole dataset.
    """
    digest = hashlib.sha256(json.dumps(head).encode())
    with ThreadPoolExecutor(16) as threads:
        images = threads.map(_fingerprint, [sample.image for sample in samples])
        masks = threads.map(_fingerprint, [sample.mask for sample in samples])
        for sample, image, mask in zip(samples, images, masks, strict=True):
            digest.update(json.dumps([sample.id, sample.split, image, mask]).encode())
    return digest.hexdigest()[:24]


def _fingerprint(path: Path) -> tuple[int, int, int]:
    """Return the length of a file and the CRC-32 of its first and last 64 KiB."""
    try:
        with path.open("rb") as file:
            first = file.read(END_BYTES)
            length = file.seek(0, 2)
            file.seek(max(0, length - END_BYTES))
            return length, zlib.crc32(first), zlib.crc32(file.read(END_BYTES))
    except OSError:
        # Decoding the file reports the reason.
        return -1, 0, 0


def same_bytes(samples: Sequence[Sample]) -> list[str]:
    """Return a label for each sample, equal for byte-identical images. Only images of equal length are read."""
    lengths = [file_length(sample.image) for sample in samples]
    counts = Counter(lengths)
    return [
        file_sha256(sample.image) if counts[length] > 1 and length >= 0 else f"only {sample.id}"
        for sample, length in zip(samples, lengths, strict=True)
    ]


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal, and a unique label for a file that cannot be read."""
    try:
        return sha256_file(path)
    except OSError:
        # Decoding the file reports the reason.
        return f"unreadable {path}"


def file_length(path: Path) -> int:
    """Return the length of a file in bytes, -1 if it cannot be accessed."""
    try:
        return path.stat().st_size
    except OSError:
        return -1
