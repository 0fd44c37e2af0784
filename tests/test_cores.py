from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from hpsearch import cores

BOUND_TO = 8


def available(folder: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> int:
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(cores, "CGROUP", folder)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(BOUND_TO)), raising=False)
    return cores.available_cores()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, BOUND_TO),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "5000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, BOUND_TO),
        ({"cpu.max": "6400000 100000\n"}, BOUND_TO),
        ({"cpu.max": "damaged"}, BOUND_TO),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, BOUND_TO),
    ],
)
def test_a_container_may_allow_fewer_cores_than_there_are(
    tmp_path: Path, files: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert available(tmp_path, files, monkeypatch) == expected


def test_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "CGROUP", tmp_path)
    if hasattr(os, "sched_getaffinity"):
        assert cores.available_cores() == len(psutil.Process().cpu_affinity())
    else:
        assert cores.available_cores() >= 1
