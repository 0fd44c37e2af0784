"""Define datasets, their image/mask pairs and problems with them, and compute hashes that identify their files."""

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
"""Number of bytes that `files_key` reads at the start of a file, and again at its end."""
Split = Literal["train", "val", "test"]
Layout = Literal["archive", "splits", "folders"]


@dataclass(frozen=True)
class Problem:
    """Error or note about one image or the whole dataset."""

    kind: str
    """Kind of problem, such as `missing mask`. It does not name the image."""
    id: str
    """Id of the image. Empty if the problem concerns the whole dataset."""
    files: tuple[Path, ...]
    text: str
    """Description of the problem. If two values disagree, it contains both."""
    split: Split


@dataclass(frozen=True)
class Sample:
    """Image file with its mask file."""

    id: str
    """File name of the image without suffix, in Unicode form NFC.

    If the name occurs in several splits, it is prefixed with the split, as in `train-001`.
    """
    image: Path
    mask: Path
    split: Split

    def problem(self, kind: str, text: str, *files: Path) -> Problem:
        """Return a problem with this sample. `files` defaults to the image and the mask."""
        return Problem(kind, self.id, files or (self.image, self.mask), text, self.split)


@dataclass(frozen=True)
class Dataset:
    """All image/mask pairs of a dataset, in the order train, val, test and sorted by id within each split."""

    samples: tuple[Sample, ...]
    problems: tuple[Problem, ...]
    """Problems detected from file names and links, such as an image without a mask."""
    root: Path
    layout: Layout
    flags: str = ""
    """Command-line flags that select the dataset: `--data DIR`, or `--images DIR --masks DIR`."""

    def split(self, *splits: Split) -> tuple[Sample, ...]:
        """Return the samples of these splits, in the order of the dataset."""
        return tuple(sample for sample in self.samples if sample.split in splits)

    def problem(self, kind: str, text: str, split: Split = "train") -> Problem:
        """Return a problem with the whole dataset."""
        return Problem(kind, "", (self.root,), text, split)


def files_key(head: object, samples: Sequence[Sample]) -> str:
    """Return a hash (24 hexadecimal digits) of `head`, which must be JSON-serialisable, and of all samples.

    It covers the id, split, image and mask of each sample. Only the length, the first 64 KiB and the last 64 KiB of
    each file are hashed. This detects replaced files without reading the whole dataset.
    """
    digest = hashlib.sha256(json.dumps(head).encode())
    with ThreadPoolExecutor(16) as threads:
        images = threads.map(_fingerprint, [sample.image for sample in samples])
        masks = threads.map(_fingerprint, [sample.mask for sample in samples])
        for sample, image, mask in zip(samples, images, masks, strict=True):
            digest.update(json.dumps([sample.id, sample.split, image, mask]).encode())
    return digest.hexdigest()[:24]


def _fingerprint(path: Path) -> tuple[int, int, int]:
    """Return the length of a file and the CRC-32 of its first and of its last 64 KiB, or (-1, 0, 0) if unreadable."""
    try:
        with path.open("rb") as file:
            first = file.read(END_BYTES)
            length = file.seek(0, 2)
            file.seek(max(0, length - END_BYTES))
            return length, zlib.crc32(first), zlib.crc32(file.read(END_BYTES))
    except OSError:
        # The error is reported when the file is decoded.
        return -1, 0, 0


def same_bytes(samples: Sequence[Sample]) -> list[str]:
    """Return one label per sample. Byte-identical images get the same label.

    An image is read only if another image has the same length in bytes.
    """
    lengths = [file_length(sample.image) for sample in samples]
    counts = Counter(lengths)
    return [
        file_sha256(sample.image) if counts[length] > 1 and length >= 0 else f"only {sample.id}"
        for sample, length in zip(samples, lengths, strict=True)
    ]


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal, or a unique label if the file cannot be read."""
    try:
        return sha256_file(path)
    except OSError:
        # The error is reported when the file is decoded.
        return f"unreadable {path}"


def file_length(path: Path) -> int:
    """Return the length of a file in bytes, or -1 if it cannot be accessed."""
    try:
        return path.stat().st_size
    except OSError:
        return -1
