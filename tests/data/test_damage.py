"""Every kind of damage: reported completely by the check, refused by a study, left out alone when that is wanted."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpsearch.data.integrity import check
from hpsearch.data.layouts import find_samples
from hpsearch.data.prepare import prepare_pool
from hpsearch.errors import DatasetError

from .conftest import WriteDataset, pair_paths, png_bomb

pytestmark = pytest.mark.usefixtures("one_decoder")

DAMAGED = ((2, "train"), (9, "val"))
"""Number and split of the images that each test damages."""


def absurd(image: Path, mask: Path) -> None:
    image.write_bytes(png_bomb(100_000))


def as_bmp(image: Path, mask: Path) -> None:
    Image.open(image).save(image.with_suffix(".bmp"))
    image.unlink()


def blurred(image: Path, mask: Path) -> None:
    pixels = np.array(Image.open(mask))
    pixels[0] = np.arange(pixels.shape[1], dtype=np.uint8)
    Image.fromarray(pixels).save(mask)


def flip_a_bit(path: Path) -> None:
    """In the compressed pixels, which libpng's decoder does not survive."""
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 20] ^= 4
    path.write_bytes(content)


def unreadable(image: Path, mask: Path) -> None:
    # A regular file that can be opened, and answers every reading of its first byte with an error.
    image.unlink()
    image.symlink_to("/proc/self/mem")


def dangling(image: Path, mask: Path) -> None:
    for path in (image, mask):
        path.unlink()
        path.symlink_to("nowhere.png")


DAMAGE: dict[str, tuple[str, Callable[[Path, Path], object]]] = {
    "no mask": ("missing mask", lambda image, mask: mask.unlink()),
    "no image": ("missing image", lambda image, mask: image.unlink()),
    "two images": (
        "two files of one name",
        lambda image, mask: Image.open(image).convert("RGB").save(image.with_suffix(".jpg")),
    ),
    "BMP": ("unknown format", as_bmp),
    "input/output error": ("unreadable file", unreadable),
    "empty image": ("undecodable file", lambda image, mask: image.write_bytes(b"")),
    "image cut short": ("undecodable file", lambda image, mask: image.write_bytes(image.read_bytes()[:-40])),
    "text named as an image": ("undecodable file", lambda image, mask: image.write_text("404 not found")),
    "mask cut short": ("undecodable file", lambda image, mask: mask.write_bytes(mask.read_bytes()[:-40])),
    "flipped bit in an image": ("undecodable file", lambda image, mask: flip_a_bit(image)),
    "flipped bit in a mask": ("undecodable file", lambda image, mask: flip_a_bit(mask)),
    "bomb": ("absurd size", absurd),
    "mask of another size": (
        "sizes differ",
        lambda image, mask: Image.open(mask).resize((20, 21), Image.Resampling.NEAREST).save(mask),
    ),
    "smooth mask": ("mask of many values", blurred),
    "links to nothing": ("dangling link", dangling),
    "second mask": ("several masks", lambda image, mask: shutil.copy(mask, mask.with_stem(f"{mask.stem}_1"))),
}


@pytest.mark.parametrize("name", list(DAMAGE))
def test_damage_is_reported_completely_refused_or_left_out(
    name: str, write_dataset: WriteDataset, tmp_path: Path
) -> None:
    if name == "input/output error" and sys.platform != "linux":
        pytest.skip("needs /proc")
    kind, damage = DAMAGE[name]
    config = write_dataset(size=16)
    ids = [f"ISIC_{number:07d}" for number, _ in DAMAGED]
    for id, (_, split) in zip(ids, DAMAGED, strict=True):
        damage(*pair_paths(Path(config.root), "archive", id, split))  # type: ignore[arg-type]

    report = check(find_samples(config))
    assert [(problem.kind, problem.id) for problem in report.errors] == [(kind, id) for id in ids]
    assert all(id in problem.text for id, problem in zip(ids, report.errors, strict=True))

    with pytest.raises(DatasetError, match=rf"2 images cannot be used: {kind} \(2\)") as refused:
        prepare_pool(config, tmp_path / "cache")
    assert all(id in str(refused.value) for id in ids)

    left = prepare_pool(replace(config, exclude_bad=True), tmp_path / "cache")
    assert sorted(left.excluded) == ids
    assert not set(ids) & set(left.index.ids)
    assert len(left.index) == 9
