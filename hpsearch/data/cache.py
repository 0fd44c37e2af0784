"""Read decoded images from a cache, which contains either the pool or the test split.

The pool consists of the training and validation images. All kinds of cache have the same interface:

    memmap   images.npy and masks.npy, memory-mapped and shared by all processes that read them
    files    one .npy file per image
    memory   images decoded into the memory of each process that opens the cache; only the index is on disk
    none     images decoded at each read, if neither disk nor memory has room for them

A cache is a folder with an index.json, written by build.py. Cached images are RGB. They are converted to grayscale
when batches are made.
"""

import io
import json
import math
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from hpsearch.config.data import GRAY_WEIGHTS, Color
from hpsearch.data.dataset import Problem, Sample, file_length, files_key
from hpsearch.data.decode_pool import DecodeError, Decoders, ImageStats, Job, Pixels, View, crc_of
from hpsearch.data.reading import PLAIN_READING, Reading
from hpsearch.errors import CacheError
from hpsearch.paths import sha256_text
from hpsearch.typed_json import from_json

INDEX_VERSION = 2
"""Version of the index format. Caches with another version are rebuilt."""
KEY_VERSION = 1
"""Version of decoding and resizing. It changes whenever the same files would give different pixels.

A study cannot continue with caches of another version.
"""
Kind = Literal["memmap", "files", "memory", "none"]
INDEX = "index.json"
PixelFiles = list[tuple[Path, tuple[int, ...]]]
"""Paths of the .npy files of a cache, each with the shape of its uint8 array."""


@dataclass(frozen=True)
class Preparation:
    """Settings that determine the cached pixels of an image."""

    height: int
    width: int
    views: tuple[View, ...]
    """Views stored for each image. Training reads the first view. Evaluation reads the last one."""
    seed: int = 0
    """Seed of the random crops. The position of a crop depends on this seed and the image's id."""
    reading: Reading = PLAIN_READING

    def job(self, sample: Sample) -> Job:
        """Return the job that decodes `sample`."""
        size, crop_seed = (self.height, self.width), f"{self.seed}:{sample.id}"
        return Job(sample.image, sample.mask, self.views, *size, crop_seed, reading=self.reading)


def cache_key(samples: Sequence[Sample], preparation: Preparation) -> str:
    """Return a hash (24 hexadecimal digits) of the preparation and the files.

    It does not depend on where the files are.
    """
    table = asdict(preparation)
    del table["reading"]
    return files_key([KEY_VERSION, table, *preparation.reading.key()], samples)


@dataclass(frozen=True)
class Index:
    """Index of a cache: its preparation, samples, stats and problems, without the pixels."""

    key: str
    kind: Kind
    preparation: Preparation
    samples: tuple[Sample, ...]
    stats: tuple[ImageStats, ...] = ()
    problems: tuple[Problem, ...] = ()
    """Problems with the unusable pairs, which are not in the cache."""

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(sample.id for sample in self.samples)

    @property
    def pairs(self) -> list[tuple[Sample, ImageStats]]:
        """Each sample with its stats."""
        return list(zip(self.samples, self.stats, strict=True))

    def files(self, folder: Path) -> PixelFiles:
        """Return the .npy files of the cache in `folder` and the shapes of their arrays.

        A `memmap` cache has, for each view, one file of images and one file of masks. A `files` cache has one file
        per image, with one row per view. Each row is the flattened image followed by its mask.
        """
        height, width, views = self.preparation.height, self.preparation.width, self.preparation.views
        if self.kind == "files":
            return [(folder / f"{i:06d}.npy", (len(views), height * width * 4)) for i in range(len(self))]
        files: PixelFiles = []
        for view in views if self.kind == "memmap" else ():
            prefix = "centre_" if view == "centre crop" and len(views) > 1 else ""
            files.append((folder / f"{prefix}images.npy", (len(self), height, width, 3)))
            files.append((folder / f"{prefix}masks.npy", (len(self), height, width)))
        return files

    def write(self, path: Path) -> None:
        """Write the index as two lines of JSON: the SHA-256 of the content, and the content."""
        table = {"version": INDEX_VERSION, **asdict(self)}
        table["facts"] = table.pop("stats")
        content = json.dumps(table, default=str)
        text = json.dumps({"sha256": sha256_text(content)}) + "\n" + content + "\n"
        path.write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Return the index of the cache in `folder`.

        Raises CacheError if the index is missing, damaged or of another version, or if a file of the cache has the
        wrong length.
        """
        path = folder / INDEX
        try:
            head, content, end = path.read_text(encoding="utf-8").split("\n")
            checksum = json.loads(head)["sha256"]
        except FileNotFoundError as error:
            raise CacheError(f"{folder} is not a cache: {INDEX} is missing") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CacheError(f"{path} is damaged: {error}") from error
        if end or sha256_text(content) != checksum:
            raise CacheError(f"{path} was changed after it was written")
        table = json.loads(content)
        if table["version"] != INDEX_VERSION:
            raise CacheError(f"{path} has format {table['version']}, but this hpsearch reads {INDEX_VERSION}")
        index = from_json(cls, {**table, "stats": table["facts"]})
        for file, shape in index.files(folder):
            n_bytes = len(npy_header(shape)) + math.prod(shape)
            if (length := file_length(file)) != n_bytes:
                raise CacheError(f"{file} has {length} bytes, but its index says {n_bytes}")
        return index


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of each channel, for pixel values scaled to 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Cache:
    """Cached images and masks of the pool or the test split, at one size.

    In the pool, training images come before validation images. Each split is sorted by id.
    """

    def __init__(self, folder: Path, index: Index) -> None:
        self.path = folder
        self.index = index
        self.key, self.kind = index.key, index.kind
        self.ids = index.ids
        self.size = index.preparation.height, index.preparation.width
        """Height and width of the cached images."""
        self.has_held_out_view = len(index.preparation.views) > 1
        """Whether images have a second view for evaluation, because training images are cropped at random."""
        self._files = [path for path, _ in index.files(folder)]
        self._views: list[Pixels] = []
        """All images and masks of each view. Empty for the kinds `files` and `none`."""
        if self.kind == "memmap":
            arrays = [np.asarray(np.load(path, "r", allow_pickle=False)) for path in self._files]
            self._views = list(zip(arrays[::2], arrays[1::2], strict=True))
        elif self.kind != "files":
            # Keep the subprocess alive between reads, because it loads torch when it starts.
            self._decoders = Decoders()
            weakref.finalize(self, self._decoders.close)
        if self.kind == "memory":
            self._views = self._decode(np.arange(len(self)))
            self._decoders.close()

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, indices: NDArray[np.int64], *, held_out: bool = False) -> Pixels:
        """Return copies of images (B, H, W, 3) uint8 and masks (B, H, W) uint8 of 0 and 1, in the order of `indices`.

        Set `held_out` to read images for evaluation. It matters only if training images are cropped at random. In
        that case, held-out images are cropped at the centre.
        """
        indices, view = np.asarray(indices, np.int64), -1 if held_out else 0
        if self._views:
            images, masks = self._views[view]
            return images[indices], masks[indices]
        if self.kind != "files":
            return self._decode(indices)[view]
        images, masks = _empty(len(indices), self.size)
        for row, i in enumerate(indices.tolist()):
            pixels = np.load(self._files[i], allow_pickle=False)[view]
            images[row].flat, masks[row].flat = np.split(pixels, [images[row].size])
        return images, masks

    def normalization(self, indices: NDArray[np.int64], color: Color) -> Normalization:
        """Return the mean and standard deviation over all pixels of the images `indices`, from the sums in the index.

        The standard deviation is at least 1/255, to avoid a division by 0.
        """
        # The int64 sums are exact: a squared value is below 2^16, so they overflow only above 10^14 pixels.
        moments = np.array([self.index.stats[i].moments for i in indices.tolist()], np.int64).sum(0)
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

    def damaged(self) -> list[Sample]:
        """Return the samples whose cached pixels do not match the CRC-32 in the index."""
        both = (False, True) if self.has_held_out_view else (False,)
        crcs = (crc_of([self.read(np.array([i]), held_out=each) for each in both]) for i in range(len(self)))
        return [sample for (sample, stats), crc in zip(self.index.pairs, crcs, strict=True) if crc != stats.crc]

    def _decode(self, indices: NDArray[np.int64]) -> list[Pixels]:
        """Decode the images `indices` and return all views. Raise CacheError if a file does not match the index."""
        preparation = self.index.preparation
        views = [_empty(len(indices), self.size) for _ in preparation.views]
        jobs = [replace(preparation.job(self.index.samples[i]), measure=False) for i in indices.tolist()]
        changed = ""
        for row, (result, pixels) in enumerate(self._decoders.decode(jobs)):
            if isinstance(result, DecodeError):
                changed = result.text
            elif result.crc != self.index.stats[indices[row]].crc:
                changed = f"{jobs[row].image} or its mask has changed"
            else:
                for (images, masks), (image, mask) in zip(views, pixels, strict=True):
                    images[row], masks[row] = image, mask
        if changed:
            raise CacheError(f"{changed}; restart the command, because the data changed while it was running")
        return views


def open_cache(path: Path) -> Cache:
    """Open the cache in the folder `path`. Raise CacheError, naming the file, if it is incomplete or has changed."""
    return Cache(path, Index.read(path))


def npy_header(shape: tuple[int, ...]) -> bytes:
    """Return the header of a .npy file of uint8. Its length does not change with the length of the first axis."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue()


def _empty(n: int, size: tuple[int, int]) -> Pixels:
    return np.empty((n, *size, 3), np.uint8), np.empty((n, *size), np.uint8)
