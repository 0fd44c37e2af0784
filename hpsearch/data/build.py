"""Build caches of decoded images, using all cores.

A cache folder gets its final name only when it is complete. A lock ensures that only one process builds it.
"""

import logging
import shutil
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

import psutil
from filelock import FileLock, Timeout

from hpsearch.data.cache import INDEX, Cache, Index, Kind, PixelFiles, Preparation, cache_key, npy_header
from hpsearch.data.dataset import Problem, Sample
from hpsearch.data.decode_pool import DecodeError, Decoders, ImageStats, Pixels, Progress
from hpsearch.errors import CacheError, DatasetError
from hpsearch.paths import atomic_write, free_bytes, refusals_named

logger = logging.getLogger(__name__)

SPARE_BYTES = 64 * 2**20
"""Disk space that must remain free after a cache is written, in bytes."""


def build_cache(
    samples: Sequence[Sample],
    preparation: Preparation,
    kind: Literal["auto", "memmap", "files", "memory", "none"],
    cache_root: Path,
    *,
    decoders: Decoders | None = None,
    progress: Progress | None = None,
) -> Path:
    """Return the folder of an intact cache of `samples` in `cache_root`, building the cache if it is missing.

    cache.py describes each `kind`; `auto` selects one by the free disk space and memory. `decoders` is an existing
    subprocess to decode with. A damaged cache is rebuilt. Unusable pairs are left out and listed in the index.

    Raises DatasetError if no pair is usable, CacheError if the disk has too little space, and StorageError if the
    cache cannot be written.
    """
    key = cache_key(samples, preparation)
    n_bytes = len(samples) * len(preparation.views) * preparation.height * preparation.width * 4
    chosen = _choose_kind(key, n_bytes, cache_root) if kind == "auto" else kind
    folder = cache_root / f"{key}-{chosen}"
    with refusals_named(folder):
        if _is_ready(folder, samples):
            # Check without the lock, because a shared cache may be in a folder that this user cannot write to.
            return folder
        cache_root.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(cache_root)
        # Wait for any other process that is building the same cache.
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not _is_ready(folder, samples, repair=True):
                if chosen in ("memmap", "files") and (free := free_bytes(cache_root)) < n_bytes + SPARE_BYTES:
                    raise CacheError(
                        f"the decoded images need {n_bytes / 2**20:.0f} MiB, {cache_root} has {free / 2**20:.0f} MiB"
                        " free: free some space, change data.cache_dir, or set data.cache to memory or none"
                    )
                with nullcontext(decoders) if decoders is not None else Decoders() as decoding:
                    _build(Index(key, chosen, preparation, tuple(samples)), folder, decoding, progress)
    return folder


def _choose_kind(key: str, n_bytes: int, cache_root: Path) -> Kind:
    """Return the kind of the existing cache with this key, or the fastest kind that fits.

    `memmap` is preferred, because the operating system keeps its pages in memory and all processes share them.
    `files` is never faster, so no new cache is of this kind. `memory` needs no disk space, but each process decodes
    the images again.
    """
    is_written = {kind: (cache_root / f"{key}-{kind}" / INDEX).is_file() for kind in ("memmap", "files")}
    if is_written["files"] and not is_written["memmap"]:
        return "files"
    if is_written["memmap"] or free_bytes(cache_root) >= n_bytes + SPARE_BYTES:
        return "memmap"
    kind: Kind = "memory" if psutil.virtual_memory().available >= 2 * n_bytes else "none"
    logger.warning(
        "no disk space for %.1f GiB of decoded images in %s: data.cache = %s", n_bytes / 2**30, cache_root, kind
    )
    return kind


def _is_ready(folder: Path, samples: Sequence[Sample], *, repair: bool = False) -> bool:
    """Return whether `folder` contains an intact cache whose index lists the current paths of the files.

    The check reads all pixels. With `repair`, the paths of moved files are updated and a damaged cache is removed.
    """
    if not folder.exists():
        return False
    try:
        index = Index.read(folder)
        if index.kind in ("memmap", "files") and (damaged := Cache(folder, index).damaged()):
            raise CacheError(f"{folder} is damaged at {damaged[0].id}")
    except CacheError as error:
        if repair:
            logger.warning("%s; rebuilding the cache", error)
            shutil.rmtree(folder)
        return False
    if set(index.samples) <= set(samples):
        return True
    if repair:
        here = {sample.id: sample for sample in samples}
        with atomic_write(folder / INDEX) as temporary:
            replace(index, samples=tuple(here[sample.id] for sample in index.samples)).write(temporary)
    return repair


def _remove_leftovers(cache_root: Path) -> None:
    """Remove the unfinished folders of killed processes. A process that is still building holds the folder's lock."""
    for left in cache_root.glob(".*.tmp/"):
        with suppress(Timeout), FileLock(left.with_suffix(".lock"), timeout=0):
            shutil.rmtree(left, ignore_errors=True)


def _build(plan: Index, folder: Path, decoders: Decoders, progress: Progress | None) -> None:
    """Decode the samples of `plan`, write the cache to a hidden folder, and rename that to `folder`."""
    good: list[tuple[Sample, ImageStats]] = []
    problems: list[Problem] = []
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        files = plan.files(temporary)
        answers = decoders.decode([plan.preparation.job(sample) for sample in plan.samples], progress)
        for sample, (result, pixels) in zip(plan.samples, answers, strict=True):
            if isinstance(result, DecodeError):
                problems.append(sample.problem(result.kind, result.text))
            else:
                _write_pixels(files, plan.kind, len(good), pixels)
                good.append((sample, result))
        if not good:
            raise DatasetError(f"none of the {len(plan)} images can be used: {problems[0].text}")
        samples, stats = zip(*good, strict=True)
        index = replace(plan, samples=samples, stats=stats, problems=tuple(problems))
        if plan.kind == "memmap":
            # Correct the number of images. The length of the header does not change.
            for path, shape in index.files(temporary):
                with path.open("r+b") as file:
                    file.write(npy_header(shape))
        index.write(temporary / INDEX)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_pixels(files: PixelFiles, kind: Kind, number: int, pixels: Sequence[Pixels]) -> None:
    """Append all views of an image to the shared files (`memmap`), or write them to a separate file (`files`)."""
    arrays = [array.data for pair in pixels for array in pair]
    if kind == "files":
        files, arrays = files[number : number + 1], [memoryview(b"".join(arrays))]
    for (path, shape), array in zip(files, arrays, strict=False):
        # Use ordinary writes, because a process that writes to a mapped file is killed when the disk is full.
        with path.open("ab") as file:
            if file.tell() == 0:
                file.write(npy_header(shape))
            file.write(array)
