"""Builds a cache in a subprocess that uses all cores: whole or not at all, and once however many ask for it."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import IO, Literal

import numpy as np
import psutil
from filelock import FileLock, Timeout

from hpsearch.data.cache import (
    INDEX,
    Index,
    Kind,
    Preparation,
    cache_key,
    check_files,
    image_file,
    memmap_files,
    npy_header,
    open_cache,
)
from hpsearch.data.decode_pool import Damage, Decoders, Facts, Pixels
from hpsearch.data.layouts import Problem, Sample
from hpsearch.errors import CacheError, DatasetError
from hpsearch.paths import atomic_write, free_bytes, storage_error

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Is told (done, total)."""
SPARE_BYTES = 64 * 2**20
"""Room on the disk that a cache leaves to others."""


def build_cache(
    samples: Sequence[Sample],
    preparation: Preparation,
    kind: Literal["auto", "memmap", "files", "memory", "none"],
    cache_root: Path,
    *,
    decoders: Decoders | None = None,
    progress: Progress | None = None,
) -> Path:
    """The folder of the cache of these samples below `cache_root`; it is built if it is not there.

    Pairs that cannot be used are left out and listed in the index. Raises DatasetError if none can be used,
    CacheError if there is no room, StorageError if the disk refuses.
    """
    key = cache_key(samples, preparation)
    n_bytes = len(samples) * preparation.image_bytes
    folder = cache_root
    try:
        chosen = _choose_kind(key, n_bytes, cache_root) if kind == "auto" else kind
        folder = cache_root / f"{key}-{chosen}"
        if _is_ready(folder, samples):
            # Without the lock: a cache that is shared may lie where this user cannot write.
            return folder
        cache_root.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if not _is_ready(folder, samples) and not _mend(folder, samples):
                _remove_left_behind(folder)
                if chosen in ("memmap", "files"):
                    _require_space(n_bytes, cache_root)
                with nullcontext(decoders) if decoders is not None else Decoders() as decoding:
                    _build(samples, preparation, chosen, key, folder, decoding, progress)
    except OSError as error:
        raise storage_error(folder, error) from error
    return folder


def is_damaged(folder: Path) -> bool:
    """Whether pixels in the cache are not those that were decoded: all of it is read, which training does anyway."""
    try:
        cache = open_cache(folder) if Index.read(folder).kind in ("memmap", "files") else None
        return cache is not None and bool(cache.damaged())
    except CacheError:
        return True


def discard_cache(folder: Path) -> None:
    """Remove a cache, so that the next who asks for it builds it."""
    try:
        with _alone(folder):
            shutil.rmtree(folder)
    except OSError as error:
        raise storage_error(folder, error) from error


def _choose_kind(key: str, n_bytes: int, cache_root: Path) -> Kind:
    """The kind that is there already, or the fastest that there is room for.

    `memmap` comes first: read again it costs no more than memory, which the system lends to it as long as it has
    some, and all processes share it. `files` is never faster. `memory` is decoded by each process anew.
    """
    for kind in ("memmap", "files"):
        if (cache_root / f"{key}-{kind}" / INDEX).is_file():
            return kind
    if free_bytes(cache_root) >= n_bytes + SPARE_BYTES:
        return "memmap"
    kind = "memory" if psutil.virtual_memory().available >= 2 * n_bytes else "none"
    logger.warning(
        "no room for %.1f GiB of decoded images on the disk of %s: data.cache = %s", n_bytes / 2**30, cache_root, kind
    )
    return kind  # type: ignore[return-value]


def _require_space(n_bytes: int, cache_root: Path) -> None:
    free = free_bytes(cache_root)
    if free < n_bytes + SPARE_BYTES:
        raise CacheError(
            f"the decoded images need {n_bytes / 2**20:.0f} MiB, {cache_root} has {free / 2**20:.0f} MiB left: make "
            "room, name another disk as data.cache_dir, or set data.cache to memory or none"
        )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the lock of the cache in `folder`; another process that builds it is waited for."""
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
    """Whether `folder` holds a sound cache that knows where the files lie."""
    try:
        index = Index.read(folder)
        check_files(folder, index)
    except CacheError:
        return False
    return set(index.samples) <= set(samples)


def _mend(folder: Path, samples: Sequence[Sample]) -> bool:
    """Tell a cache whose files were moved where they lie now; remove one that is damaged and return False."""
    if not folder.exists():
        return False
    try:
        index = Index.read(folder)
        check_files(folder, index)
    except CacheError as error:
        logger.warning("%s; the cache is built again", error)
        shutil.rmtree(folder)
        return False
    here = {sample.id: sample for sample in samples}
    with atomic_write(folder / INDEX) as temporary:
        replace(index, samples=tuple(here[sample.id] for sample in index.samples)).write(temporary)
    return True


def _remove_left_behind(folder: Path) -> None:
    """Remove what builders that were killed left beside `folder`, whose lock is held."""
    for left in folder.parent.glob(".*.tmp"):
        name = left.name[1:].rsplit(".", 2)[0]
        if name == folder.name:
            shutil.rmtree(left)
            continue
        lock = FileLock(left.with_name(f".{name}.lock"))
        try:
            # Only a builder that lives holds its lock.
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
        facts: dict[int, Facts] = {}
        problems: dict[int, Problem] = {}
        jobs = [preparation.job(sample) for sample in samples]
        with _WRITERS[kind](temporary, preparation, len(samples)) as writer:
            for number, result, pixels in decoders.decode(jobs):
                sample = samples[number]
                if isinstance(result, Damage):
                    files = (sample.image, sample.mask)
                    problems[number] = Problem(result.kind, sample.id, files, result.text, sample.split)
                else:
                    writer.put(number, pixels)
                    facts[number] = result
                if progress is not None:
                    progress(len(facts) + len(problems), len(samples))
            if not facts:
                first = problems[min(problems)].text if problems else "there are no samples"
                raise DatasetError(f"none of the {len(samples)} images can be used: {first}")
            good = sorted(facts)
            writer.finish(good)
        Index(
            key=key,
            kind=kind,
            preparation=preparation,
            samples=tuple(samples[i] for i in good),
            facts=tuple(facts[i] for i in good),
            problems=tuple(problems[i] for i in sorted(problems)),
        ).write(temporary / INDEX)
        _sync(temporary / INDEX)
        _sync(temporary)
        temporary.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _MemmapWriter:
    """Puts images of any order into their places in the files."""

    def __init__(self, folder: Path, preparation: Preparation, n: int) -> None:
        self._layout = memmap_files(folder, preparation, n)
        self._stack = ExitStack()
        self._files: list[IO[bytes]] = []

    def __enter__(self) -> _MemmapWriter:
        # Ordinary writes: a full disk is then an error and not the end of the process, as in a mapped file.
        self._files = [self._stack.enter_context(path.open("w+b")) for path, _ in self._layout]
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def put(self, number: int, pixels: Sequence[Pixels]) -> None:
        arrays = [array for pair in pixels for array in pair]
        for file, (_, shape), array in zip(self._files, self._layout, arrays, strict=True):
            file.seek(len(npy_header(shape)) + number * array.nbytes)
            file.write(array.data)

    def finish(self, good: Sequence[int]) -> None:
        """Move the images of these numbers together and write what makes the files whole."""
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


class _FilesWriter:
    """Writes one file per image."""

    def __init__(self, folder: Path, preparation: Preparation, n: int) -> None:
        self._folder = folder

    def __enter__(self) -> _FilesWriter:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def put(self, number: int, pixels: Sequence[Pixels]) -> None:
        views = [np.concatenate([image.ravel(), mask.ravel()]) for image, mask in pixels]
        np.save(image_file(self._folder, number), np.stack(views))

    def finish(self, good: Sequence[int]) -> None:
        for to, number in enumerate(good):
            image_file(self._folder, number).replace(image_file(self._folder, to))
            _sync(image_file(self._folder, to))


class _NoWriter:
    """For the kinds that keep nothing on the disk."""

    def __init__(self, folder: Path, preparation: Preparation, n: int) -> None:
        pass

    def __enter__(self) -> _NoWriter:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def put(self, number: int, pixels: Sequence[Pixels]) -> None:
        pass

    def finish(self, good: Sequence[int]) -> None:
        pass


_WRITERS: dict[Kind, type[_MemmapWriter] | type[_FilesWriter] | type[_NoWriter]] = {
    "memmap": _MemmapWriter,
    "files": _FilesWriter,
    "memory": _NoWriter,
    "none": _NoWriter,
}


def _sync(path: Path) -> None:
    """Have the disk hold what was written to a file or folder."""
    if sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
