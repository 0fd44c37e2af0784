"""Compare the kinds of cache on a dataset: build time, time per epoch, memory and disk space."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil

from hpsearch.config.data import DataConfig
from hpsearch.data.cache import Kind, open_cache
from hpsearch.data.prepare import locate, prepare_pool

KINDS: tuple[Kind, ...] = ("none", "memmap", "files", "memory")


@dataclass(frozen=True)
class CacheRow:
    """Measurements of one kind of cache. The reference is `none`, which decodes the images at each read."""

    kind: Kind
    build_s: float
    """Time to check, decode and write the images and to open the cache, in seconds."""
    epoch_s: float
    """Time to read all images once in random batches, in seconds. It is the faster of two epochs."""
    memory_bytes: int
    """Additional private memory of the process and its subprocesses with the cache open, without mapped files."""
    disk_bytes: int
    speedup: float
    """Ratio of the epoch time of `none` to `epoch_s`."""


def compare_caches(
    config: DataConfig, cache_root: Path, *, batch_size: int = 16, progress: Callable[[Kind], None] | None = None
) -> list[CacheRow]:
    """Build and read each kind of cache for the pool of `config`, in temporary folders below `cache_root`.

    `progress` is called with each kind before it is measured. The row of `none` comes last. Raises the same errors as
    `prepare_pool`.
    """
    rows: list[CacheRow] = []
    cache_root.mkdir(parents=True, exist_ok=True)
    if config.root == "sample" and not config.images:
        # Draw the sample dataset first, so that the time to draw it is not measured.
        config = replace(config, root=str(locate(config, cache_root).root))
    for kind in KINDS:
        if progress is not None:
            progress(kind)
        with tempfile.TemporaryDirectory(dir=cache_root, prefix="compare-") as name:
            start, memory = time.monotonic(), _own_memory_bytes()
            path = prepare_pool(replace(config, cache=kind), Path(name)).cache_path
            # Opening a cache of kind `memory` decodes its images.
            cache = open_cache(path)
            build_s = time.monotonic() - start
            order = np.random.default_rng(0).permutation(len(cache))
            epochs = []
            for _ in range(2):
                start = time.monotonic()
                for batch in np.split(order, range(batch_size, len(order), batch_size)):
                    cache.read(batch)
                epochs.append(time.monotonic() - start)
            memory = max(0, _own_memory_bytes() - memory)
            disk_bytes = sum(file.stat().st_size for file in path.iterdir())
            del cache
        speedup = rows[0].epoch_s / min(epochs) if rows else 1
        rows.append(CacheRow(kind, build_s, min(epochs), memory, disk_bytes, speedup))
    return [*rows[1:], rows[0]]


def _own_memory_bytes() -> int:
    """Return the private memory (unique set size) of this process and its subprocesses in bytes."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(process.memory_full_info().uss for process in processes)
