"""Reads the decoded images of one pool or test split, in one of four kinds that answer alike, and names it by a key.

    memmap   images.npy and masks.npy, mapped into the memory of all processes that read them
    files    one .npy file per image
    memory   decoded into the memory of each process that opens it; nothing but the index on the disk
    none     decoded again at each reading, for comparison and for when there is room nowhere

A cache is a folder with an index.json, written by build.py. It holds one RGB version; grayscale is made of the batch.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import weakref
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from hpsearch.config.data import GRAY_WEIGHTS, Color
from hpsearch.data.decode_pool import Damage, Decoders, Facts, Job, Pixels, View
from hpsearch.data.layouts import Problem, Sample, Split
from hpsearch.data.reading import PLAIN_READING, Reading
from hpsearch.errors import CacheError
from hpsearch.paths import sha256_text

KEY_VERSION = 1
"""Changes when the same files and preparation would give other pixels: then no study can go on with its data."""
INDEX_VERSION = 2
"""Changes with what an index holds: caches of another version are built again."""
Kind = Literal["memmap", "files", "memory", "none"]
INDEX = "index.json"
END_BYTES = 64 * 2**10
"""What is read of each end of a file for the key."""
"""Luma of ITU-R BT.601, for R, G, B."""


@dataclass(frozen=True)
class Preparation:
    """What is done to each image before it is cached."""

    height: int
    width: int
    views: tuple[View, ...]
    """What is kept of each image: the first is trained on, the last scores it when it is held out."""
    seed: int = 0
    """Decides, with the id, where a random crop lies."""
    reading: Reading = PLAIN_READING
    """How the files become pixels."""

    @property
    def image_bytes(self) -> int:
        """Memory of one image and its mask, all views."""
        return len(self.views) * self.height * self.width * 4

    def job(self, sample: Sample) -> Job:
        return Job(
            str(sample.image),
            str(sample.mask),
            self.views,
            self.height,
            self.width,
            f"{self.seed}:{sample.id}",
            reading=self.reading,
        )


@dataclass(frozen=True)
class Index:
    """Everything about a cache but the pixels."""

    key: str
    kind: Kind
    preparation: Preparation
    samples: tuple[Sample, ...]
    facts: tuple[Facts, ...]
    problems: tuple[Problem, ...]
    """Pairs that could not be used and are not in the cache."""

    def write(self, path: Path) -> None:
        content = json.dumps(
            {
                "version": INDEX_VERSION,
                "key": self.key,
                "kind": self.kind,
                "preparation": asdict(self.preparation),
                "samples": [
                    {"id": s.id, "split": s.split, "image": str(s.image), "mask": str(s.mask)} for s in self.samples
                ],
                "facts": [asdict(facts) for facts in self.facts],
                "problems": [{**asdict(p), "files": [str(path) for path in p.files]} for p in self.problems],
            }
        )
        text = json.dumps({"sha256": sha256_text(content)}) + "\n" + content + "\n"
        path.write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The index of the cache in `folder`. CacheError if there is none, or not as it was written."""
        path = folder / INDEX
        try:
            head, content, end = path.read_text(encoding="utf-8").split("\n")
            checksum = json.loads(head)["sha256"]
        except FileNotFoundError as error:
            raise CacheError(f"{folder} is no cache: it has no {INDEX}") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CacheError(f"{path} is damaged: {error}") from error
        if end or sha256_text(content) != checksum:
            raise CacheError(f"{path} was changed since it was written")
        table = json.loads(content)
        if table["version"] != INDEX_VERSION:
            raise CacheError(f"{path} is of version {table['version']}, this program reads {INDEX_VERSION}")
        preparation = {
            **table["preparation"],
            "views": tuple(table["preparation"]["views"]),
            "reading": Reading.from_table(table["preparation"]["reading"]),
        }
        return cls(
            key=table["key"],
            kind=table["kind"],
            preparation=Preparation(**preparation),
            samples=tuple(
                Sample(id=s["id"], image=Path(s["image"]), mask=Path(s["mask"]), split=s["split"])
                for s in table["samples"]
            ),
            facts=tuple(Facts.from_table(facts) for facts in table["facts"]),
            problems=tuple(
                Problem(**{**p, "files": tuple(Path(path) for path in p["files"])}) for p in table["problems"]
            ),
        )


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of images / 255, one value per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Cache(ABC):
    """The images of a pool (train before val, each sorted by id) or of the test split, at one size."""

    def __init__(self, folder: Path, index: Index) -> None:
        self.path = folder
        self.index = index

    @property
    def key(self) -> str:
        return self.index.key

    @property
    def kind(self) -> Kind:
        return self.index.kind

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(sample.id for sample in self.index.samples)

    @property
    def splits(self) -> tuple[Split, ...]:
        return tuple(sample.split for sample in self.index.samples)

    @property
    def sha256(self) -> tuple[str, ...]:
        """Of the content of each image file, hexadecimal."""
        return tuple(facts.image_sha256 for facts in self.index.facts)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the cached images."""
        return self.index.preparation.height, self.index.preparation.width

    @property
    def original_sizes(self) -> NDArray[np.int64]:
        """Height and width of each image file, (N, 2)."""
        return np.array([(facts.height, facts.width) for facts in self.index.facts], np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self.index.samples)

    @property
    def has_held_out_view(self) -> bool:
        """Whether `read` gives other pixels with `held_out`: where the images were cropped at random."""
        return len(self.index.preparation.views) > 1

    def read(self, indices: NDArray[np.int64], *, held_out: bool = False) -> Pixels:
        """Images (B, H, W, 3) uint8 and masks (B, H, W) uint8 of 0 and 1, the caller's own, in the order given.

        `held_out`: as the images are scored, which differs where they were cropped at random: in the centre.
        """
        return self._read(np.asarray(indices, np.int64), -1 if held_out else 0)

    @property
    def images(self) -> NDArray[np.uint8]:
        """All images (N, H, W, 3), not to be written to; `files` and `none` read them all at this moment."""
        return self._whole()[0]

    @property
    def masks(self) -> NDArray[np.uint8]:
        """All masks (N, H, W), likewise."""
        return self._whole()[1]

    def normalization(self, indices: NDArray[np.int64], color: Color) -> Normalization:
        """Mean and standard deviation over all pixels of these images alone, from sums kept in the index.

        A deviation below one of 255 levels is given as one level: images of one colour shall not be divided by 0.
        """
        if len(indices) == 0:
            raise ValueError("there are no images to normalise by")
        # Exact: a square is below 2^16, so it would take 10^14 pixels to overflow.
        moments = np.array([self.index.facts[i].moments for i in indices.tolist()], np.int64).sum(0)
        n = len(indices) * self.size[0] * self.size[1]
        r, g, b, rr, gg, bb, rg, rb, gb = (int(moment) / n for moment in moments)
        mean = np.array([r, g, b])
        covariance = np.array([[rr, rg, rb], [rg, gg, gb], [rb, gb, bb]]) - np.outer(mean, mean)
        if color == "grayscale":
            gray = np.array(GRAY_WEIGHTS)
            means, variances = [float(gray @ mean)], [float(gray @ covariance @ gray)]
        else:
            means, variances = mean.tolist(), covariance.diagonal().tolist()
        return Normalization(
            mean=tuple(value / 255 for value in means),
            std=tuple(max(1.0, math.sqrt(max(0.0, value))) / 255 for value in variances),
        )

    def damaged(self) -> list[str]:
        """Ids whose cached pixels are not those that were written."""
        wrong = []
        for i, (id, facts) in enumerate(zip(self.ids, self.index.facts, strict=True)):
            crc = 0
            for view in range(len(self.index.preparation.views)):
                for array in self._read(np.array([i]), view):
                    crc = zlib.crc32(array.data, crc)
            if crc != facts.crc:
                wrong.append(id)
        return wrong

    @abstractmethod
    def _read(self, indices: NDArray[np.int64], view: int) -> Pixels:
        """The pixels of the view of that number."""

    def _whole(self) -> Pixels:
        return self._read(np.arange(len(self)), 0)


class MemmapCache(Cache):
    """All images in one memory-mapped file, the masks in another."""

    def __init__(self, folder: Path, index: Index) -> None:
        super().__init__(folder, index)
        files = memmap_files(folder, index.preparation, len(index.samples))
        arrays = [np.asarray(np.load(path, "r", allow_pickle=False)) for path, _ in files]
        self._views = list(zip(arrays[::2], arrays[1::2], strict=True))

    def _read(self, indices: NDArray[np.int64], view: int) -> Pixels:
        images, masks = self._views[view]
        return images[indices], masks[indices]

    def _whole(self) -> Pixels:
        return self._views[0]


class FilesCache(Cache):
    """One .npy file per image: (views, H * W * 4) uint8, the image and then its mask."""

    def __init__(self, folder: Path, index: Index) -> None:
        super().__init__(folder, index)
        self._files = [image_file(folder, i) for i in range(len(index.samples))]
        shape = image_file_shape(index.preparation)
        self._starts = [len(npy_header(shape)) + view * shape[1] for view in range(shape[0])]

    def _read(self, indices: NDArray[np.int64], view: int) -> Pixels:
        images = np.empty((len(indices), *self.size, 3), np.uint8)
        masks = np.empty((len(indices), *self.size), np.uint8)
        for row, i in enumerate(indices.tolist()):
            # Straight into place: np.load takes as long again to read its header.
            with self._files[i].open("rb") as file:
                file.seek(self._starts[view])
                n_bytes = file.readinto(images[row].data) + file.readinto(masks[row].data)
            if n_bytes != images[row].size + masks[row].size:
                raise CacheError(f"{self._files[i]} was cut short while it was in use")
        return images, masks


class MemoryCache(Cache):
    """Decoded into this process's memory when it is opened."""

    def __init__(self, folder: Path, index: Index) -> None:
        super().__init__(folder, index)
        n = len(index.samples)
        self._views = [
            (np.empty((n, *self.size, 3), np.uint8), np.empty((n, *self.size), np.uint8))
            for _ in index.preparation.views
        ]
        with Decoders() as decoders:
            _decode_into(self._views, decoders, index, np.arange(n))

    def _read(self, indices: NDArray[np.int64], view: int) -> Pixels:
        images, masks = self._views[view]
        return images[indices], masks[indices]

    def _whole(self) -> Pixels:
        return self._views[0]


class NoCache(Cache):
    """Decoded at each reading, by a subprocess that waits for the next."""

    def __init__(self, folder: Path, index: Index) -> None:
        super().__init__(folder, index)
        self._decoders = Decoders()
        weakref.finalize(self, self._decoders.close)

    def _read(self, indices: NDArray[np.int64], view: int) -> Pixels:
        n = len(indices)
        views = [
            (np.empty((n, *self.size, 3), np.uint8), np.empty((n, *self.size), np.uint8))
            for _ in self.index.preparation.views
        ]
        _decode_into(views, self._decoders, self.index, indices)
        return views[view]


_KINDS: Mapping[Kind, Callable[[Path, Index], Cache]] = {
    "memmap": MemmapCache,
    "files": FilesCache,
    "memory": MemoryCache,
    "none": NoCache,
}


def open_cache(path: Path) -> Cache:
    """The cache in the folder `path`. CacheError, naming the file, if it is torn or was edited."""
    index = Index.read(path)
    check_files(path, index)
    return _KINDS[index.kind](path, index)


def cache_key(samples: Sequence[Sample], preparation: Preparation) -> str:
    """24 hexadecimal digits that change with the preparation and with any file, but not with where the files lie."""
    table = asdict(preparation)
    del table["reading"]
    return files_key([KEY_VERSION, table, *preparation.reading.key()], samples)


def files_key(head: object, samples: Sequence[Sample]) -> str:
    """24 hexadecimal digits that change with `head` (plain types) and with any image or mask.

    Of each file the length and both ends are read, so that an image replaced since the cache was built is noticed at
    every start without reading the whole dataset.
    """
    digest = hashlib.sha256(json.dumps(head).encode())
    with ThreadPoolExecutor(16) as threads:
        images = threads.map(_fingerprint, [sample.image for sample in samples])
        masks = threads.map(_fingerprint, [sample.mask for sample in samples])
        for sample, image, mask in zip(samples, images, masks, strict=True):
            digest.update(json.dumps([sample.id, sample.split, image, mask]).encode())
    return digest.hexdigest()[:24]


def check_files(folder: Path, index: Index) -> None:
    """CacheError, naming the file and both lengths, if a file of the cache is not as long as the index says."""
    p, n = index.preparation, len(index.samples)
    files: list[tuple[Path, tuple[int, ...]]] = []
    if index.kind == "memmap":
        files = memmap_files(folder, p, n)
    elif index.kind == "files":
        files = [(image_file(folder, i), image_file_shape(p)) for i in range(n)]
    for path, shape in files:
        n_bytes = len(npy_header(shape)) + math.prod(shape)
        if _length(path) != n_bytes:
            raise CacheError(f"{path} is {_length(path)} bytes, the index says {n_bytes}")


def memmap_files(folder: Path, preparation: Preparation, n: int) -> list[tuple[Path, tuple[int, ...]]]:
    """The files of a memmap cache and their shapes: images and masks of each view."""
    shape = (n, preparation.height, preparation.width)
    files: list[tuple[Path, tuple[int, ...]]] = []
    for view in preparation.views:
        prefix = "centre_" if view == "centre crop" and len(preparation.views) > 1 else ""
        files += [(folder / f"{prefix}images.npy", (*shape, 3)), (folder / f"{prefix}masks.npy", shape)]
    return files


def image_file(folder: Path, number: int) -> Path:
    """Where a files cache keeps the image of that number."""
    return folder / f"{number:06d}.npy"


def image_file_shape(preparation: Preparation) -> tuple[int, int]:
    """Shape of what a files cache keeps of one image."""
    return len(preparation.views), preparation.height * preparation.width * 4


def npy_header(shape: tuple[int, ...]) -> bytes:
    """What NumPy writes before the values of a uint8 array; as long for any length of the first axis."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue()


def _decode_into(views: list[Pixels], decoders: Decoders, index: Index, indices: NDArray[np.int64]) -> None:
    jobs = [replace(index.preparation.job(index.samples[i]), measure=False) for i in indices.tolist()]
    changed = ""
    for row, facts, pixels in decoders.decode(jobs):
        if isinstance(facts, Damage):
            changed = facts.text
        elif facts.crc != index.facts[indices[row]].crc:
            changed = f"{jobs[row].image} or its mask is not what it was"
        else:
            for (images, masks), (image, mask) in zip(views, pixels, strict=True):
                images[row], masks[row] = image, mask
    if changed:
        raise CacheError(f"{changed}; the data changed while it was in use: start again")


def _fingerprint(path: Path) -> tuple[int, int, int]:
    """Length, CRC-32 of the first and of the last 64 KiB."""
    try:
        with path.open("rb") as file:
            first = file.read(END_BYTES)
            length = file.seek(0, 2)
            file.seek(max(0, length - END_BYTES))
            return length, zlib.crc32(first), zlib.crc32(file.read(END_BYTES))
    except OSError:
        # The decoding says that and why it cannot be read.
        return -1, 0, 0


def _length(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1
