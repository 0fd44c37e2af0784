"""Read the decoded images of one pool or test split. Four kinds of cache share one interface.

    memmap   images.npy and masks.npy, mapped into the memory of all processes that read them
    files    one .npy file per image
    memory   decoded into the memory of each process that opens the cache; only the index is on disk
    none     decoded at each reading, for comparison and where neither disk nor memory has room

A cache is a folder with an index.json, written by build.py. It holds RGB; batches are converted to grayscale.
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
"""Version of the index. Caches of another version are built again."""
KEY_VERSION = 1
"""Version of the pixels that files and preparation give. A study cannot continue with another version."""
Kind = Literal["memmap", "files", "memory", "none"]
INDEX = "index.json"
PixelFiles = list[tuple[Path, tuple[int, ...]]]
"""Files of pixels, and the shapes of their arrays of uint8."""


@dataclass(frozen=True)
class Preparation:
    """Steps that bring each image to its cached form."""

    height: int
    width: int
    views: tuple[View, ...]
    """Views that are kept: training reads the first, evaluation of held-out images the last."""
    seed: int = 0
    """Determines the position of the random crop, together with the id of the image."""
    reading: Reading = PLAIN_READING

    def job(self, sample: Sample) -> Job:
        """Return the job that decodes `sample`."""
        size, crop_seed = (self.height, self.width), f"{self.seed}:{sample.id}"
        return Job(sample.image, sample.mask, self.views, *size, crop_seed, reading=self.reading)


def cache_key(samples: Sequence[Sample], preparation: Preparation) -> str:
    """Return 24 hexadecimal digits that depend on the preparation and the files, but not on where the files are."""
    table = asdict(preparation)
    del table["reading"]
    return files_key([KEY_VERSION, table, *preparation.reading.key()], samples)


@dataclass(frozen=True)
class Index:
    """Everything about a cache except the pixels."""

    key: str
    kind: Kind
    preparation: Preparation
    samples: tuple[Sample, ...]
    stats: tuple[ImageStats, ...]
    problems: tuple[Problem, ...]
    """Pairs that are unusable and not in the cache."""

    @property
    def pairs(self) -> list[tuple[Sample, ImageStats]]:
        """Each sample with its stats."""
        return list(zip(self.samples, self.stats, strict=True))

    def files(self, folder: Path) -> PixelFiles:
        """Return the files of pixels of a cache in `folder`, and the shapes of their arrays."""
        return pixel_files(folder, self.kind, self.preparation, len(self.samples))

    def write(self, path: Path) -> None:
        """Write the index as two lines: the SHA-256 of the content, and the content."""
        table = {"version": INDEX_VERSION, **asdict(self)}
        table["facts"] = table.pop("stats")
        content = json.dumps(table, default=str)
        text = json.dumps({"sha256": sha256_text(content)}) + "\n" + content + "\n"
        path.write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Return the index of the cache in `folder`. CacheError if there is none or a file was cut or changed."""
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
        index = from_json(cls, {**table, "stats": table["facts"]})
        for file, shape in index.files(folder):
            n_bytes = len(npy_header(shape)) + math.prod(shape)
            if (length := file_length(file)) != n_bytes:
                raise CacheError(f"{file} is {length} bytes, the index says {n_bytes}")
        return index


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of images / 255, one value per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Cache:
    """The images of a pool (train before val, each sorted by id) or of the test split, at one size."""

    def __init__(self, folder: Path, index: Index) -> None:
        self.path = folder
        self.index = index
        self.key, self.kind = index.key, index.kind
        self.ids = tuple(sample.id for sample in index.samples)
        self.splits = tuple(sample.split for sample in index.samples)
        self.sha256 = tuple(stats.image_sha256 for stats in index.stats)
        """SHA-256 of each image file's content, in hexadecimal."""
        self.size = index.preparation.height, index.preparation.width
        """Height and width of the cached images."""
        self.has_held_out_view = len(index.preparation.views) > 1
        """Whether `read` returns different pixels with `held_out`, because training images are cropped at random."""
        self._files = [path for path, _ in index.files(folder)]
        self._views: list[Pixels] = []
        """All images and masks of each view, for the kinds `memmap` and `memory`."""
        if self.kind == "memmap":
            arrays = [np.asarray(np.load(path, "r", allow_pickle=False)) for path in self._files]
            self._views = list(zip(arrays[::2], arrays[1::2], strict=True))
        elif self.kind != "files":
            # The subprocess stays alive between readings.
            self._decoders = Decoders()
            weakref.finalize(self, self._decoders.close)
        if self.kind == "memory":
            self._views = self._decode(np.arange(len(self)))
            self._decoders.close()

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, indices: NDArray[np.int64], *, held_out: bool = False) -> Pixels:
        """Return images (B, H, W, 3) uint8 and masks (B, H, W) uint8 of 0 and 1 as copies, in the given order.

        With `held_out` the images are those that are scored. They differ from the training images only where these
        are cropped at random: they are then cropped at the centre.
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
        """Return mean and standard deviation over all pixels of these images, from sums in the index.

        A deviation below one of 255 levels is returned as one level, because images are divided by it.
        """
        if len(indices) == 0:
            raise ValueError("there are no images to normalise by")
        # Exact: a square is below 2^16, so it would take 10^14 pixels to overflow.
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

    def damaged(self) -> list[str]:
        """Return the ids whose cached pixels differ from those that were written."""
        both = (False, True) if self.has_held_out_view else (False,)
        crcs = (crc_of([self.read(np.array([i]), held_out=each) for each in both]) for i in range(len(self)))
        return [id for id, stats, crc in zip(self.ids, self.index.stats, crcs, strict=True) if crc != stats.crc]

    def _decode(self, indices: NDArray[np.int64]) -> list[Pixels]:
        """Return all views of these images. CacheError if a file has changed since the index was written."""
        preparation = self.index.preparation
        views = [_empty(len(indices), self.size) for _ in preparation.views]
        jobs = [replace(preparation.job(self.index.samples[i]), measure=False) for i in indices.tolist()]
        changed = ""
        for row, result, pixels in self._decoders.decode(jobs):
            if isinstance(result, DecodeError):
                changed = result.text
            elif result.crc != self.index.stats[indices[row]].crc:
                changed = f"{jobs[row].image} or its mask is not what it was"
            else:
                for (images, masks), (image, mask) in zip(views, pixels, strict=True):
                    images[row], masks[row] = image, mask
        if changed:
            raise CacheError(f"{changed}; the data changed while it was in use: start again")
        return views


def open_cache(path: Path) -> Cache:
    """Open the cache in the folder `path`. Raise CacheError, naming the file, if it is incomplete or was changed."""
    return Cache(path, Index.read(path))


def pixel_files(folder: Path, kind: Kind, preparation: Preparation, n: int) -> PixelFiles:
    """Return the files of pixels of a cache of n images, and the shapes of their arrays.

    `memmap` has a file of images and one of masks for each view. `files` has a file for each image; its row for each
    view is the image followed by its mask.
    """
    height, width, views = preparation.height, preparation.width, preparation.views
    if kind == "files":
        return [(folder / f"{i:06d}.npy", (len(views), height * width * 4)) for i in range(n)]
    files: PixelFiles = []
    for view in views if kind == "memmap" else ():
        prefix = "centre_" if view == "centre crop" and len(views) > 1 else ""
        files += [(folder / f"{prefix}images.npy", (n, height, width, 3))]
        files += [(folder / f"{prefix}masks.npy", (n, height, width))]
    return files


def npy_header(shape: tuple[int, ...]) -> bytes:
    """Return the header of a .npy file of uint8. Its length does not depend on the length of the first axis."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue()


def _empty(n: int, size: tuple[int, int]) -> Pixels:
    return np.empty((n, *size, 3), np.uint8), np.empty((n, *size), np.uint8)
