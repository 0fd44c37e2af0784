"""Compare the kinds of cache on a dataset: seconds to build, seconds per epoch, memory."""

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
    """Measurements of one kind of cache. `none`, which decodes each time, is the reference."""

    kind: Kind
    build_s: float
    """Time until the first epoch can begin: checking, decoding, writing."""
    epoch_s: float
    """Time to read all images once in batches of a random order, the faster of two epochs."""
    memory_bytes: int
    """Private memory that an open cache adds to a process and its subprocesses, without mapped files."""
    disk_bytes: int
    speedup: float
    """Epochs that it reads in the time of one epoch of `none`."""


def compare_caches(
    config: DataConfig, cache_root: Path, *, batch_size: int = 16, progress: Callable[[Kind], None] | None = None
) -> list[CacheRow]:
    """Build and read each kind for the pool of `config`, in temporary folders below `cache_root`.

    `progress` is called with each kind before its turn. The row of `none` is the last. Raises the errors of
    `prepare_pool`.
    """
    rows: list[CacheRow] = []
    cache_root.mkdir(parents=True, exist_ok=True)
    if config.root == "sample" and not config.images:
        # Drawn once, so that drawing is not measured.
        config = replace(config, root=str(locate(config, cache_root).root))
    for kind in KINDS:
        if progress is not None:
            progress(kind)
        with tempfile.TemporaryDirectory(dir=cache_root, prefix="compare-") as name:
            start, memory = time.monotonic(), _own_memory_bytes()
            path = prepare_pool(replace(config, cache=kind), Path(name)).cache_path
            # The kind `memory` is decoded when it is opened.
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
    """Return the memory that belongs to this process and its subprocesses alone."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(process.memory_full_info().uss for process in processes)
