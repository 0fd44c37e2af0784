"""A cache key changes with everything that changes the pixels, and with nothing else."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from hpsearch.config.data import DataConfig
from hpsearch.data.cache import Preparation, cache_key
from hpsearch.data.dataset import Sample
from hpsearch.data.layouts import find_samples

RESIZE = Preparation(24, 40, ("resize",))


@pytest.fixture
def pool(tiny_archive: Path) -> tuple[Sample, ...]:
    return find_samples(DataConfig(root=str(tiny_archive))).split("train", "val")


@pytest.fixture
def samples(tiny_archive: Path, tmp_path: Path) -> tuple[Sample, ...]:
    """A dataset that a test may change."""
    shutil.copytree(tiny_archive, tmp_path / "data")
    return find_samples(DataConfig(root=str(tmp_path / "data"))).split("train", "val")


def test_place_and_time_do_not_change_a_key(pool: tuple[Sample, ...], samples: tuple[Sample, ...]) -> None:
    os.utime(samples[0].image, (1, 1))
    assert cache_key(samples, RESIZE) == cache_key(pool, RESIZE)


@pytest.mark.parametrize(
    "other",
    [
        replace(RESIZE, height=25),
        replace(RESIZE, width=25),
        replace(RESIZE, views=("centre crop",)),
        replace(RESIZE, seed=1),
    ],
)
def test_the_preparation_changes_a_key(pool: tuple[Sample, ...], other: Preparation) -> None:
    assert cache_key(pool, other) != cache_key(pool, RESIZE)


@pytest.mark.parametrize("changes", [{"id": "other"}, {"split": "val"}])
def test_id_and_split_change_a_key(pool: tuple[Sample, ...], changes: dict[str, str]) -> None:
    assert cache_key([replace(pool[0], **changes), *pool[1:]], RESIZE) != cache_key(pool, RESIZE)  # type: ignore[arg-type]


@pytest.mark.parametrize("which", ["image", "mask"])
@pytest.mark.parametrize("change", ["first byte", "last byte", "length", "gone"])
def test_every_file_changes_a_key(samples: tuple[Sample, ...], which: str, change: str) -> None:
    before = cache_key(samples, RESIZE)
    path: Path = getattr(samples[4], which)
    data = bytearray(path.read_bytes())
    if change == "gone":
        path.unlink()
    elif change == "length":
        path.write_bytes(data + b"\0")
    else:
        data[0 if change == "first byte" else -1] ^= 1
        path.write_bytes(data)
    assert cache_key(samples, RESIZE) != before


def test_an_image_more_or_less_changes_a_key(pool: tuple[Sample, ...]) -> None:
    assert len({cache_key(pool[:n], RESIZE) for n in range(len(pool) + 1)}) == len(pool) + 1


def test_the_key_of_a_plain_dataset_is_that_of_version_0_1(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"image")
    (tmp_path / "a.png").write_bytes(b"mask")
    sample = Sample("a", tmp_path / "a.jpg", tmp_path / "a.png", "train")
    assert cache_key([sample], RESIZE) == "1ff9ad428d4a3d0227c6a3f0"
