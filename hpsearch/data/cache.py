"""Read the decoded images of one pool or test split. Four kinds of cache share one interface.

    memmap   images.npy and masks.npy, mapped into the memory of all processes that read them
    files    one .npy file per image
    memory   decoded into the memory of each process that opens the cache; only the index is on disk
    none     decoded at each reading, for comparison and where neither disk nor memory has room

A cache is a folder with an index.json, written by build.py. It holds RGB; batches are converted to grayscale.
"""

from __future__ import annotations

import io
import json
import math
import weakref
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from hpsearch.config.data import GRAY_WEIGHTS, Color
from hpsearch.data.dataset import Problem, Sample, Split, file_length
from hpsearch.data.decode_pool import DecodeError, Decoders, ImageStats, Job, Pixels, View
from hpsearch.data.reading import PLAIN_READING, Reading, as_tuples
from hpsearch.errors import CacheError
from hpsearch.paths import sha256_text

INDEX_VERSION = 2
"""Changes with the content of an index. Caches of another version are built again."""
Kind = Literal["memmap", "files", "memory", "none"]
INDEX = "index.json"


@dataclass(frozen=True)
class Preparation:
    """Steps that bring each image to its cached form."""

    height: int
    width: int
    views: tuple[View, ...]
    """Views that are kept: training reads the first, evaluation of held-out images the last."""
    seed: int = 0
    """With the id, the seed of the random crop's position."""
    reading: Reading = PLAIN_READING

    @property
    def image_bytes(self) -> int:
        """Memory of one image and its mask, all views."""
        return len(self.views) * self.height * self.width * 4

    def job(self, sample: Sample) -> Job:
        """Return the job that decodes `sample`."""
        size, crop_seed = (self.height, self.width), f"{self.seed}:{sample.id}"
        return Job(sample.image, sample.mask, self.views, *size, crop_seed, reading=self.reading)


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

    def write(self, path: Path) -> None:
        """Write the index as two lines: the SHA-256 of the content, and the content."""
        table = {"version": INDEX_VERSION, **asdict(self)}
        table["facts"] = table.pop("stats")
        content = json.dumps(table, default=str)
        text = json.dumps({"sha256": sha256_text(content)}) + "\n" + content + "\n"
        path.write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Return the index of the cache in `folder`. CacheError if there is none or it was changed."""
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
        preparation = as_tuples(table["preparation"])
        return cls(
            key=table["key"],
            kind=table["kind"],
            preparation=Preparation(**{**preparation, "reading": Reading.from_table(preparation["reading"])}),
            samples=tuple(Sample(s["id"], Path(s["image"]), Path(s["mask"]), s["split"]) for s in table["samples"]),
            stats=tuple(ImageStats(**as_tuples(stats)) for stats in table["facts"]),
            problems=tuple(Problem(**{**p, "files": tuple(map(Path, p["files"]))}) for p in table["problems"]),
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
        """SHA-256 of each image file's content, in hexadecimal."""
        return tuple(stats.image_sha256 for stats in self.index.stats)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the cached images."""
        return self.index.preparation.height, self.index.preparation.width

    def __len__(self) -> int:
        return len(self.index.samples)

    @property
    def has_held_out_view(self) -> bool:
        """Whether `read` returns other pixels with `held_out`, because the images are cropped at random."""
        return len(self.index.preparation.views) > 1

    def read(self, indices: NDArray[np.int64], *, held_out: bool = False) -> Pixels:
        """Return images (B, H, W, 3) uint8 and masks (B, H, W) uint8 of 0 and 1 as copies, in the given order.

        With `held_out` the images are those that are scored. They differ from the training images only where these
        are cropped at random: they are then cropped at the centre.
        """
        return self._read(np.asarray(indices, np.int64), -1 if held_out else 0)

    @property
    def images(self) -> NDArray[np.uint8]:
        """All images (N, H, W, 3), read-only. The kinds `files` and `none` read them at each access."""
        return self._whole()[0]

    @property
    def masks(self) -> NDArray[np.uint8]:
        """All masks (N, H, W), read-only."""
        return self._whole()[1]

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
        n_views = len(self.index.preparation.views)
        wrong = []
        for i, (sample, stats) in enumerate(self.index.pairs):
            crc = 0
            for array in (array for view in range(n_views) for array in self._read(np.array([i]), view)):
                crc = zlib.crc32(array.data, crc)
            if crc != stats.crc:
                wrong.append(sample.id)
        return wrong

    @abstractmethod
    def _read(self, indices: NDArray[np.int64], view: int) -> Pixels:
        """Return the pixels of the view with this number."""

    def _whole(self) -> Pixels:
        return self._read(np.arange(len(self)), 0)


class ArrayCache(Cache):
    """All images in one array and all masks in another: mapped files (`memmap`), or memory filled on opening."""

    def __init__(self, folder: Path, index: Index) -> None:
        super().__init__(folder, index)
        if index.kind == "memmap":
            files = memmap_files(folder, index.preparation, len(self))
            arrays = [np.asarray(np.load(path, "r", allow_pickle=False)) for path, _ in files]
            self._views = list(zip(arrays[::2], arrays[1::2], strict=True))
        else:
            with Decoders() as decoders:
                self._views = _decode(decoders, index, np.arange(len(self)))

    def _read(self, indices: NDArray[np.int64], view: int) -> Pixels:
        images, masks = self._views[view]
        return images[indices], masks[indices]

    def _whole(self) -> Pixels:
        return self._views[0]


class FilesCache(Cache):
    """One .npy file per image: (views, H * W * 4) uint8, the image followed by its mask."""

    def __init__(self, folder: Path, index: Index) -> None:
        super().__init__(folder, index)
        self._files = [image_file(folder, i) for i in range(len(self))]
        shape = image_file_shape(index.preparation)
        self._starts = [len(npy_header(shape)) + view * shape[1] for view in range(shape[0])]

    def _read(self, indices: NDArray[np.int64], view: int) -> Pixels:
        images, masks = _empty(len(indices), self.size)
        for row, i in enumerate(indices.tolist()):
            # np.load takes twice as long, because it parses the header.
            with self._files[i].open("rb") as file:
                file.seek(self._starts[view])
                n_bytes = file.readinto(images[row].data) + file.readinto(masks[row].data)
            if n_bytes != images[row].size + masks[row].size:
                raise CacheError(f"{self._files[i]} was cut short while it was in use")
        return images, masks


class NoCache(Cache):
    """Images that are decoded each time they are read, in a subprocess that stays alive between readings."""

    def __init__(self, folder: Path, index: Index) -> None:
        super().__init__(folder, index)
        self._decoders = Decoders()
        weakref.finalize(self, self._decoders.close)

    def _read(self, indices: NDArray[np.int64], view: int) -> Pixels:
        return _decode(self._decoders, self.index, indices)[view]


_KINDS: Mapping[Kind, Callable[[Path, Index], Cache]] = {
    "memmap": ArrayCache,
    "files": FilesCache,
    "memory": ArrayCache,
    "none": NoCache,
}


def open_cache(path: Path) -> Cache:
    """Open the cache in the folder `path`. Raise CacheError, naming the file, if it is incomplete or was changed."""
    index = read_index(path)
    return _KINDS[index.kind](path, index)


def read_index(path: Path) -> Index:
    """Return the index of the cache in `path`. Raise CacheError if it or a file of the cache is incomplete."""
    index = Index.read(path)
    _check_files(path, index)
    return index


def _check_files(folder: Path, index: Index) -> None:
    """Raise CacheError, naming the file and both lengths, if a file is not as long as the index says."""
    preparation, n = index.preparation, len(index.samples)
    files: list[tuple[Path, tuple[int, ...]]] = []
    if index.kind == "memmap":
        files = memmap_files(folder, preparation, n)
    elif index.kind == "files":
        files = [(image_file(folder, i), image_file_shape(preparation)) for i in range(n)]
    for path, shape in files:
        n_bytes = len(npy_header(shape)) + math.prod(shape)
        if (length := file_length(path)) != n_bytes:
            raise CacheError(f"{path} is {length} bytes, the index says {n_bytes}")


def memmap_files(folder: Path, preparation: Preparation, n: int) -> list[tuple[Path, tuple[int, ...]]]:
    """Return the files of a memmap cache and their shapes: images and masks of each view."""
    shape = (n, preparation.height, preparation.width)
    files: list[tuple[Path, tuple[int, ...]]] = []
    for view in preparation.views:
        prefix = "centre_" if view == "centre crop" and len(preparation.views) > 1 else ""
        files += [(folder / f"{prefix}images.npy", (*shape, 3)), (folder / f"{prefix}masks.npy", shape)]
    return files


def image_file(folder: Path, number: int) -> Path:
    """Return the file of one image in a files cache."""
    return folder / f"{number:06d}.npy"


def image_file_shape(preparation: Preparation) -> tuple[int, int]:
    """Return the shape of the array in one file of a files cache."""
    return len(preparation.views), preparation.height * preparation.width * 4


def npy_header(shape: tuple[int, ...]) -> bytes:
    """Return the header of a .npy file of uint8. Its length does not depend on the length of the first axis."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue()


def _empty(n: int, size: tuple[int, int]) -> Pixels:
    return np.empty((n, *size, 3), np.uint8), np.empty((n, *size), np.uint8)


def _decode(decoders: Decoders, index: Index, indices: NDArray[np.int64]) -> list[Pixels]:
    """Return all views of these images. CacheError if a file has changed since the index was written."""
    preparation = index.preparation
    views = [_empty(len(indices), (preparation.height, preparation.width)) for _ in preparation.views]
    jobs = [replace(preparation.job(index.samples[i]), measure=False) for i in indices.tolist()]
    changed = ""
    for row, result, pixels in decoders.decode(jobs):
        if isinstance(result, DecodeError):
            changed = result.text
        elif result.crc != index.stats[indices[row]].crc:
            changed = f"{jobs[row].image} or its mask is not what it was"
        else:
            for (images, masks), (image, mask) in zip(views, pixels, strict=True):
                images[row], masks[row] = image, mask
    if changed:
        raise CacheError(f"{changed}; the data changed while it was in use: start again")
    return views
