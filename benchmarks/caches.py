"""Compare the kinds of cache on a dataset: build time, time per epoch, memory and disk space.

    python benchmarks/caches.py --data ISIC-2017 --size 256

The row of `none`, which decodes the images at each read, comes last. The other rows are compared with it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import psutil
from setting import describe_machine

from hpsearch.config.data import DataConfig
from hpsearch.data.cache import Kind, open_cache
from hpsearch.data.prepare import locate, prepare_pool

BATCH_SIZE = 16


@dataclass(frozen=True)
class CacheRow:
    """Measurements of one kind of cache."""

    kind: Kind
    build_s: float
    """Time to check, decode and write the images and to open the cache, in seconds."""
    epoch_s: float
    """Time to read all images once in random batches, in seconds. It is the faster of two epochs."""
    memory_bytes: int
    """Additional private memory of the process and its subprocesses with the cache open, without mapped files."""
    disk_bytes: int


def main() -> None:
    """Build and read each kind of cache in a temporary folder, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="sample", help="folder of the dataset, or sample")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--quick", action="store_true", help="20 images at 64x64")
    arguments = parser.parse_args()
    config = DataConfig(root=arguments.data, size=arguments.size)
    if arguments.quick:
        config = DataConfig(root=arguments.data, size=64, n_search_train=16, n_search_validation=4)
    print(describe_machine(("numpy", "torch")))
    print(f"{'cache':8}{'build':>10}{'epoch':>11}{'memory':>12}{'disk':>12}{'speed-up over decoding':>25}")
    with tempfile.TemporaryDirectory() as name:
        # Draw the sample dataset first, so that the time to draw it is not measured.
        config = replace(config, root=str(locate(config, Path(name)).root))
        rows = [measure(replace(config, cache=kind), kind, Path(name, kind)) for kind in get_args(Kind)]
    decoding = rows[-1]
    for row in rows:
        memory, disk = (f"{n_bytes / 2**20:8.0f} MiB" for n_bytes in (row.memory_bytes, row.disk_bytes))
        speedup = decoding.epoch_s / row.epoch_s
        print(f"{row.kind:8}{row.build_s:8.1f} s{row.epoch_s:9.3f} s{memory}{disk}{speedup:24.0f}x")


def measure(config: DataConfig, kind: Kind, folder: Path) -> CacheRow:
    """Build the cache of `config`, which is of the kind `kind`, in `folder` and read it."""
    start, memory_bytes = time.monotonic(), _own_memory_bytes()
    path = prepare_pool(config, folder).cache_path
    # Opening a cache of kind `memory` decodes its images.
    cache = open_cache(path)
    build_s = time.monotonic() - start
    order = np.random.default_rng(0).permutation(len(cache))
    epochs = []
    for _ in range(2):
        start = time.monotonic()
        for batch in np.split(order, range(BATCH_SIZE, len(order), BATCH_SIZE)):
            cache.read(batch)
        epochs.append(time.monotonic() - start)
    memory_bytes = max(0, _own_memory_bytes() - memory_bytes)
    disk_bytes = sum(file.stat().st_size for file in path.iterdir())
    return CacheRow(kind, build_s, min(epochs), memory_bytes, disk_bytes)


def _own_memory_bytes() -> int:
    """Return the private memory (unique set size) of this process and its subprocesses in bytes."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(process.memory_full_info().uss for process in processes)


if __name__ == "__main__":
    main()
