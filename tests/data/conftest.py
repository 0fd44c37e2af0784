"""Tiny synthetic datasets in every layout, and a cache of one, for all tests that need images.

`tiny_archive` and `tiny_cache` are made once a session and must not be changed; `write_dataset` writes a new dataset
for one test, from `tiny_pairs()` or any pairs of one's own, which the test may damage. `one_decoder` spares a test
the seconds that the decoding subprocess takes to start: all tests that ask for it share one.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from hpsearch.config.data import DataConfig
from hpsearch.data import build, cache, integrity, prepare, survey
from hpsearch.data.cache import Cache, open_cache
from hpsearch.data.dataset import Dataset, Layout, Split
from hpsearch.data.decode_pool import Decoders
from hpsearch.data.layouts import find_samples
from hpsearch.data.prepare import prepare_pool

ARCHIVE_NAMES = {"train": "Training", "val": "Validation", "test": "Test_v2"}
FOLDER_NAMES = {"train": "train", "val": "validation", "test": "test"}


@dataclass(frozen=True)
class Pair:
    """An image (H, W, 3) uint8 and its mask (H, W) uint8 of 0 and 255."""

    id: str
    split: Split
    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]


def tiny_pairs(n_train: int = 8, n_val: int = 3, n_test: int = 4, *, seed: int = 0) -> list[Pair]:
    """Dark discs on noisy skin, 40 to 90 pixels a side, no two alike; ids are ISIC_0000000 and up over all splits."""
    rng = np.random.default_rng(seed)
    splits: list[Split] = ["train"] * n_train + ["val"] * n_val + ["test"] * n_test
    return [draw_pair(f"ISIC_{i:07d}", split, rng) for i, split in enumerate(splits)]


def draw_pair(id: str, split: Split, rng: np.random.Generator, *, size: tuple[int, int] | None = None) -> Pair:
    """One such pair, of `size` (height, width) if given."""
    height, width = size or (int(rng.integers(40, 90)), int(rng.integers(40, 90)))
    rows, columns = np.mgrid[:height, :width]
    center = rng.uniform(0.35, 0.65, 2) * (height, width)
    inside = np.hypot(rows - center[0], columns - center[1]) < rng.uniform(0.15, 0.3) * min(height, width)
    skin = rng.uniform(150, 230, 3)
    image = np.where(inside[..., None], skin * 0.5, skin) + rng.normal(0, 6, (height, width, 1))
    return Pair(id, split, image.clip(0, 255).astype(np.uint8), np.where(inside, 255, 0).astype(np.uint8))


def write_pairs(root: Path, layout: Layout, pairs: Iterable[Pair], *, size: int = 32) -> DataConfig:
    """Write `pairs` below `root` in `layout`, images as PNG so that no pixel changes; the settings that find them.

    `folders`: names have nothing in common with the archive's but the id, and the test split is given as a list.
    """
    pairs = list(pairs)
    for pair in pairs:
        image_path, mask_path = pair_paths(root, layout, pair.id, pair.split)
        for path, pixels in ((image_path, pair.image), (mask_path, pair.mask)):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    if layout != "folders":
        return DataConfig(root=str(root), size=size)
    test_list = root / "test.txt"
    test_list.write_text("".join(f"{pair.id}\n" for pair in pairs if pair.split == "test"))
    return DataConfig(images=str(root / "photos"), masks=str(root / "outlines"), test_list=str(test_list), size=size)


def pair_paths(root: Path, layout: Layout, id: str, split: Split) -> tuple[Path, Path]:
    """Where `write_pairs` puts an image and its mask."""
    if layout == "archive":
        name = f"ISIC-2017_{ARCHIVE_NAMES[split]}"
        return root / f"{name}_Data" / f"{id}.png", root / f"{name}_Part1_GroundTruth" / f"{id}_segmentation.png"
    if layout == "splits":
        folder = root / FOLDER_NAMES[split]
        return folder / "images" / f"{id}.png", folder / "masks" / f"{id}.png"
    return root / "photos" / f"{id}.png", root / "outlines" / f"{id}_outline.png"


def write_oriented(path: Path, upright: NDArray[np.generic], orientation: int, *, deep: bool = False) -> None:
    """Write pixels (H, W) or (H, W, channels) stored so that this EXIF orientation turns them upright again.

    `deep`: as PNG of three channels of 12 bits, which hold the same eight above four others.
    """
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    if deep:
        chunk = (b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
        path.write_bytes(encode_png(stored.astype(np.uint16) * 16 + 15, 16, 2, [chunk]))
    else:
        Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, quality=98, subsampling=0)


def encode_png(
    samples: NDArray[np.generic], depth: int, color: int, chunks: Iterable[tuple[bytes, bytes]] = ()
) -> bytes:
    """A PNG of any sort, with these samples (H, W) or (H, W, channels) as they are; `chunks` before the pixels.

    `color` is the colour type: 0 gray, 2 RGB, 3 palette, 4 gray and alpha, 6 RGBA. With less than 8 bits the width
    must fill whole bytes.
    """
    height, width = samples.shape[:2]
    rows = samples.reshape(height, -1)
    if depth < 8:
        per_byte = 8 // depth
        weights = 2 ** (depth * np.arange(per_byte)[::-1])
        rows = (rows.reshape(height, -1, per_byte) * weights).sum(-1)
    lines = rows.astype(">u2" if depth == 16 else np.uint8)
    content = b"".join(b"\0" + line.tobytes() for line in lines)
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(content)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, part) for kind, part in parts)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_bomb(side: int) -> bytes:
    """A PNG whose header says that it has `side` x `side` pixels."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", b"")


def touch(root: Path, *names: str) -> None:
    """Files whose names are all that matters."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(os.fsencode(name))


def found(dataset: Dataset) -> dict[str, list[str]]:
    return {split: [sample.id for sample in dataset.split(split)] for split in ("train", "val", "test")}  # type: ignore[arg-type]


def kinds(dataset: Dataset) -> set[tuple[str, str]]:
    return {(problem.kind, problem.id) for problem in dataset.problems}


def own(folder: Path, **settings: str) -> Dataset:
    return find_samples(DataConfig(images=str(folder / "images"), masks=str(folder / "masks"), **settings))  # type: ignore[arg-type]


WriteDataset = Callable[..., DataConfig]


@pytest.fixture
def write_dataset(tmp_path: Path) -> WriteDataset:
    """`write_dataset(layout="archive", pairs=None, size=32)`: a new dataset in tmp_path/ISIC-2017; its settings."""

    def write(
        layout: Literal["archive", "splits", "folders"] = "archive",
        pairs: Iterable[Pair] | None = None,
        *,
        size: int = 32,
    ) -> DataConfig:
        return write_pairs(tmp_path / "ISIC-2017", layout, tiny_pairs() if pairs is None else pairs, size=size)

    return write


class SharedDecoders(Decoders):
    """Decodes in the subprocess of another, which it leaves running."""

    def __init__(self, shared: Decoders) -> None:
        super().__init__()
        self.decode = shared.decode  # type: ignore[method-assign]


@pytest.fixture(scope="session")
def decoding_process() -> Iterator[Decoders]:
    with Decoders(2) as decoders:
        yield decoders


@pytest.fixture
def one_decoder(decoding_process: Decoders, monkeypatch: pytest.MonkeyPatch) -> Decoders:
    """Whatever decodes during this test does so in one subprocess of the whole session."""
    share_decoder(decoding_process, monkeypatch)
    return decoding_process


def share_decoder(shared: Decoders, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (build, cache, integrity, prepare, survey):
        monkeypatch.setattr(module, "Decoders", lambda: SharedDecoders(shared))


@pytest.fixture(scope="session")
def tiny_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `tiny_pairs()` in the archive's layout; not to be changed."""
    root = tmp_path_factory.mktemp("tiny") / "ISIC-2017"
    write_pairs(root, "archive", tiny_pairs())
    return root


@pytest.fixture(scope="session")
def tiny_cache(tiny_archive: Path, decoding_process: Decoders, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """The pool of `tiny_archive` (8 training and 3 validation images) at 32x32, memory-mapped."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        share_decoder(decoding_process, monkeypatch)
        prepared = prepare_pool(DataConfig(root=str(tiny_archive), size=32), tmp_path_factory.mktemp("cache"))
    return open_cache(prepared.cache_path)
