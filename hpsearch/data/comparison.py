"""Compare the kinds of cache on a dataset: seconds to build, seconds per epoch, memory."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil

from hpsearch import subprocesses
from hpsearch.config.data import DataConfig
from hpsearch.data.cache import Kind, open_cache
from hpsearch.data.decode_pool import subprocess_environment
from hpsearch.data.prepare import locate, prepare_pool

KINDS: tuple[Kind, ...] = ("memmap", "files", "memory", "none")


@dataclass(frozen=True)
class CacheRow:
    """Measurements of one kind of cache. `none`, which decodes each time, is the reference."""

    kind: Kind
    build_s: float
    """Time until the first epoch can begin: checking, decoding, writing."""
    epoch_s: float
    """Time to read all images once in batches of a random order, the faster of two epochs."""
    memory_bytes: int
    """Private memory of the reading process and its subprocess, without mapped files."""
    disk_bytes: int
    speedup: float
    """Epochs that it reads in the time of one epoch of `none`."""


def compare_caches(
    config: DataConfig,
    cache_root: Path,
    *,
    batch_size: int = 16,
    kinds: Sequence[Kind] = KINDS,
    progress: Callable[[Kind], None] | None = None,
) -> list[CacheRow]:
    """Build and read each kind for the pool of `config`, in temporary folders below `cache_root`.

    `none` is always measured. Each kind is read in its own process, so that its memory can be measured. `progress`
    is called with each kind before its turn. Raises the errors of `prepare_pool`.
    """
    rows: dict[Kind, CacheRow] = {}
    cache_root.mkdir(parents=True, exist_ok=True)
    if config.root == "sample" and not config.images:
        # Drawn once, so that drawing is not measured.
        config = replace(config, root=str(locate(config, cache_root).root))
    for kind in dict.fromkeys(("none", *kinds)):
        if progress is not None:
            progress(kind)
        with tempfile.TemporaryDirectory(dir=cache_root, prefix="compare-") as name:
            start = time.monotonic()
            prepared = prepare_pool(replace(config, cache=kind), Path(name))
            build_s = time.monotonic() - start
            measured = _read_in_own_process(prepared.cache_path, batch_size)
            disk_bytes = sum(path.stat().st_size for path in prepared.cache_path.iterdir())
        decoded_s = rows["none"].epoch_s if rows else measured["epoch_s"]
        rows[kind] = CacheRow(
            kind=kind,
            # The kind `memory` is decoded when it is opened.
            build_s=build_s + measured["open_s"],
            epoch_s=measured["epoch_s"],
            memory_bytes=int(measured["memory_bytes"]),
            disk_bytes=disk_bytes,
            speedup=decoded_s / measured["epoch_s"],
        )
    return [rows[kind] for kind in kinds]


def measure_reading(path: Path, batch_size: int, *, n_epochs: int = 2) -> dict[str, float]:
    """Return seconds to open the cache at `path` and for the fastest of `n_epochs`, and private memory in bytes."""
    start = time.monotonic()
    cache = open_cache(path)
    open_s = time.monotonic() - start
    order = np.random.default_rng(0).permutation(len(cache))
    epochs, memory_bytes = [], 0
    for _ in range(n_epochs):
        start = time.monotonic()
        for first in range(0, len(order), batch_size):
            cache.read(order[first : first + batch_size])
        epochs.append(time.monotonic() - start)
        memory_bytes = max(memory_bytes, _own_memory_bytes())
    return {"open_s": open_s, "epoch_s": min(epochs), "memory_bytes": memory_bytes}


def _read_in_own_process(path: Path, batch_size: int) -> dict[str, float]:
    done = subprocess.run(
        subprocesses.command("hpsearch.data.comparison", str(path), str(batch_size)),
        env=subprocess_environment(),
        stdout=subprocess.PIPE,
        check=True,
    )
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def _own_memory_bytes() -> int:
    """Return the memory of this process and its subprocesses that is not backed by files."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    if platform.system() == "Linux":
        return sum(info.rss - info.shared for info in (process.memory_info() for process in processes))
    return sum(process.memory_full_info().uss for process in processes)


if __name__ == "__main__":
    print(json.dumps(measure_reading(Path(sys.argv[1]), int(sys.argv[2]))))
