"""The kinds of cache are compared on the user's images, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpsearch.config.data import DataConfig
from hpsearch.data.comparison import compare_caches


@pytest.mark.slow
def test_all_kinds_are_measured(tiny_archive: Path, tmp_path: Path) -> None:
    told: list[str] = []
    rows = compare_caches(DataConfig(root=str(tiny_archive), size=32), tmp_path / "cache", progress=told.append)
    assert told == ["none", "memmap", "files", "memory"]
    assert [row.kind for row in rows] == ["memmap", "files", "memory", "none"]
    memmap, files, memory, none = rows
    assert none.speedup == 1
    assert min(memmap.speedup, files.speedup, memory.speedup) > 1
    # The masks and images, and an index.
    assert min(memmap.disk_bytes, files.disk_bytes) > 11 * 32 * 32 * 4 > max(memory.disk_bytes, none.disk_bytes) / 2
    assert all(row.build_s > 0 and row.epoch_s > 0 and row.memory_bytes >= 0 for row in rows)
    # Only `none` keeps a subprocess that decodes.
    assert none.memory_bytes > 2**20
    assert list((tmp_path / "cache").iterdir()) == []
