"""Build a cache on all cores. It appears when it is complete, and concurrent builders build it only once."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
from filelock import FileLock, Timeout

from hpsearch.data.cache import (
    INDEX,
    Index,
    Kind,
    Preparation,
    image_file,
    memmap_files,
    npy_header,
    open_cache,
    read_index,
)
from hpsearch.data.dataset import Problem, Sample
from hpsearch.data.decode_pool import DecodeError, Decoders, ImageStats, Pixels
from hpsearch.data.keys import cache_key
from hpsearch.errors import CacheError, DatasetError
from hpsearch.paths import atomic_write, free_bytes, storage_error

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Progress callback, called with (done, total)."""
SPARE_BYTES = 64 * 2**20
"""Disk space that a cache leaves free."""


def build_cache(
    samples: Sequence[Sample],
    preparation: Preparation,
    kind: Literal["auto", "memmap", "files", "memory", "none"],
    cache_root: Path,
    *,
    decoders: Decoders | None = None,
    progress: Progress | None = None,
) -> Path:
    """Return the folder of the cache of these samples below `cache_root`. It is built if it is missing.

    Unusable pairs are left out and listed in the index. Raises DatasetError if no pair is usable, CacheError if the
    disk has too little space, and StorageError if it cannot be written.
    """
    key = cache_key(samples, preparation)
    n_bytes = len(samples) * preparation.image_bytes
    folder = cache_root
    try:
        chosen = _choose_kind(key, n_bytes, cache_root) if kind == "auto" else kind
        folder = cache_root / f"{key}-{chosen}"
        if _is_ready(folder, samples):
            # Checked without the lock, because a shared cache may be in a folder that this user cannot write to.
            return folder
        cache_root.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            if not _is_ready(folder, samples) and not _mend(folder, samples):
                _remove_leftovers(folder)
                if chosen in ("memmap", "files"):
                    _require_space(n_bytes, cache_root)
                with nullcontext(decoders) if decoders is not None else Decoders() as decoding:
                    _build(samples, preparation, chosen, key, folder, decoding, progress)
    except OSError as error:
        raise storage_error(folder, error) from error
    return folder


def is_damaged(folder: Path) -> bool:
    """Return whether pixels of the cache differ from the decoded ones. Reads all of it, as training does anyway."""
    try:
        cache = open_cache(folder) if Index.read(folder).kind in ("memmap", "files") else None
        return cache is not None and bool(cache.damaged())
    except CacheError:
        return True


def discard_cache(folder: Path) -> None:
    """Remove a cache, so that the next use builds it again."""
    try:
        with _locked(folder):
            shutil.rmtree(folder)
    except OSError as error:
        raise storage_error(folder, error) from error


def _choose_kind(key: str, n_bytes: int, cache_root: Path) -> Kind:
    """Return the kind that exists already, or else the fastest one that fits.

    `memmap` is preferred: the system keeps it in memory while there is room, and all processes share it. `files` is
    never faster. `memory` is decoded again by each process.
    """
    existing: tuple[Kind, ...] = ("memmap", "files")
    for each in existing:
        if (cache_root / f"{key}-{each}" / INDEX).is_file():
            return each
    if free_bytes(cache_root) >= n_bytes + SPARE_BYTES:
        return "memmap"
    kind: Kind = "memory" if psutil.virtual_memory().available >= 2 * n_bytes else "none"
    logger.warning(
        "no room for %.1f GiB of decoded images on the disk of %s: data.cache = %s", n_bytes / 2**30, cache_root, kind
    )
    return kind


def _require_space(n_bytes: int, cache_root: Path) -> None:
    free = free_bytes(cache_root)
    if free < n_bytes + SPARE_BYTES:
        raise CacheError(
            f"the decoded images need {n_bytes / 2**20:.0f} MiB, {cache_root} has {free / 2**20:.0f} MiB left: make "
            "room, name another disk as data.cache_dir, or set data.cache to memory or none"
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of the cache in `folder`, after waiting for another process that builds it."""
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0.5)
    except Timeout:
        logger.info("another process builds the cache %s: waiting for it", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _is_ready(folder: Path, samples: Sequence[Sample]) -> bool:
    """Return whether `folder` has a complete cache whose index has the current paths of the files."""
    try:
        return set(read_index(folder).samples) <= set(samples)
    except CacheError:
        return False


def _mend(folder: Path, samples: Sequence[Sample]) -> bool:
    """Update the paths of moved files in the index. Remove a damaged cache and return False."""
    if not folder.exists():
        return False
    try:
        index = read_index(folder)
    except CacheError as error:
        logger.warning("%s; the cache is built again", error)
        shutil.rmtree(folder)
        return False
    here = {sample.id: sample for sample in samples}
    with atomic_write(folder / INDEX) as temporary:
        replace(index, samples=tuple(here[sample.id] for sample in index.samples)).write(temporary)
    return True


def _remove_leftovers(folder: Path) -> None:
    """Remove unfinished folders of killed builders beside `folder`, whose lock is held."""
    for left in folder.parent.glob(".*.tmp"):
        name = left.name[1:].rsplit(".", 2)[0]
        if name == folder.name:
            shutil.rmtree(left)
            continue
        lock = FileLock(left.with_name(f".{name}.lock"))
        try:
            # Only a live builder holds its lock.
            with lock.acquire(timeout=0):
                shutil.rmtree(left, ignore_errors=True)
        except Timeout:
            pass


def _build(
    samples: Sequence[Sample],
    preparation: Preparation,
    kind: Kind,
    key: str,
    folder: Path,
    decoders: Decoders,
    progress: Progress | None,
) -> None:
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        with _WRITERS[kind](temporary, preparation, len(samples)) as writer:
            stats, problems = _decode(samples, preparation, writer, decoders, progress)
            if not stats:
                first = problems[min(problems)].text if problems else "there are no samples"
                raise DatasetError(f"none of the {len(samples)} images can be used: {first}")
            good = sorted(stats)
            writer.finish(good)
        Index(
            key=key,
            kind=kind,
            preparation=preparation,
            samples=tuple(samples[i] for i in good),
            stats=tuple(stats[i] for i in good),
            problems=tuple(problems[i] for i in sorted(problems)),
        ).write(temporary / INDEX)
        _sync(temporary / INDEX)
        _sync(temporary)
        temporary.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _decode(
    samples: Sequence[Sample],
    preparation: Preparation,
    writer: _Writer,
    decoders: Decoders,
    progress: Progress | None,
) -> tuple[dict[int, ImageStats], dict[int, Problem]]:
    """Decode and write all samples. Return the stats of usable pairs and the problems of others, by their numbers."""
    stats: dict[int, ImageStats] = {}
    problems: dict[int, Problem] = {}
    for number, result, pixels in decoders.decode([preparation.job(sample) for sample in samples]):
        if isinstance(result, DecodeError):
            problems[number] = samples[number].problem(result.kind, result.text)
        else:
            writer.put(number, pixels)
            stats[number] = result
        if progress is not None:
            progress(len(stats) + len(problems), len(samples))
    return stats, problems


class _Writer(AbstractContextManager["_Writer"]):
    """Base class; writes no pixels, as for the kinds of cache that have no files."""

    def __init__(self, folder: Path, preparation: Preparation, n: int) -> None:
        self._folder = folder

    def __exit__(self, *_: object) -> None:
        pass

    def put(self, number: int, pixels: Sequence[Pixels]) -> None:
        """Write the views of one image. Images come in any order."""

    def finish(self, good: Sequence[int]) -> None:
        """Keep only the images with these numbers, renumber them from 0, and complete the files."""


class _MemmapWriter(_Writer):
    """Writes all images to one file and all masks to another."""

    def __init__(self, folder: Path, preparation: Preparation, n: int) -> None:
        super().__init__(folder, preparation, n)
        self._layout = memmap_files(folder, preparation, n)
        # Ordinary writes, because a full disk ends the process that writes to a mapped file.
        self._files = [path.open("w+b") for path, _ in self._layout]

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    def put(self, number: int, pixels: Sequence[Pixels]) -> None:
        arrays = [array for pair in pixels for array in pair]
        for file, (_, shape), array in zip(self._files, self._layout, arrays, strict=True):
            file.seek(len(npy_header(shape)) + number * array.nbytes)
            file.write(array.data)

    def finish(self, good: Sequence[int]) -> None:
        for file, (_, shape) in zip(self._files, self._layout, strict=True):
            header = npy_header((len(good), *shape[1:]))
            n_bytes = int(np.prod(shape[1:]))
            for to, number in enumerate(good):
                if to != number:
                    file.seek(len(header) + number * n_bytes)
                    values = file.read(n_bytes)
                    file.seek(len(header) + to * n_bytes)
                    file.write(values)
            file.seek(0)
            file.write(header)
            file.truncate(len(header) + len(good) * n_bytes)
            file.flush()
            os.fsync(file.fileno())


class _FilesWriter(_Writer):
    """Writes one file per image."""

    def put(self, number: int, pixels: Sequence[Pixels]) -> None:
        views = [np.concatenate([image.ravel(), mask.ravel()]) for image, mask in pixels]
        np.save(image_file(self._folder, number), np.stack(views))

    def finish(self, good: Sequence[int]) -> None:
        for to, number in enumerate(good):
            image_file(self._folder, number).replace(image_file(self._folder, to))
            _sync(image_file(self._folder, to))


_WRITERS: dict[Kind, type[_Writer]] = {
    "memmap": _MemmapWriter,
    "files": _FilesWriter,
    "memory": _Writer,
    "none": _Writer,
}


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    if sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
