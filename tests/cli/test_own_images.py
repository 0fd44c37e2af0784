from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpsearch.inference.scoring import read_mask
from tests.cli.test_main import exit_code
from tests.data.conftest import draw_pair

ENDINGS = (".jpg", ".JPEG", ".png", ".JPG", ".PNG")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Fifty images, 24 to 90 pixels a side, RGB and gray, under names of their own; masks of 0 and 1 or 255."""
    photos, outlines = tmp_path / "my photos", tmp_path / "Umrisse"
    rng = np.random.default_rng(5)
    for folder in (photos, outlines):
        folder.mkdir()
    for number in range(50):
        pair = draw_pair("", "train", rng, size=(int(rng.integers(24, 90)), int(rng.integers(24, 90))))
        stem = f"Läsion {number}.{'links' if number % 2 else 'rechts'}"
        image = Image.fromarray(pair.image)
        (image.convert("L") if number % 7 == 0 else image).save(photos / (stem + ENDINGS[number % 5]))
        Image.fromarray(pair.mask if number % 3 else pair.mask // 255).save(outlines / f"{stem} - Umriss.png")
    (photos / "Thumbs.db").write_bytes(b"not an image")
    return photos, outlines


@pytest.mark.slow
def test_study_and_final_of_fifty_own_images(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, outlines = folders
    own = ["--images", str(photos), "--masks", str(outlines), "--out", str(tmp_path)]
    assert exit_code("data", "check", *own) == 0
    said = capsys.readouterr().out
    assert "50 pairs can be used: 40 train, 0 val, 10 test" in said
    assert "set aside as the test split: 10 of these 50 images" in said

    settings = ["unet.base_channels=2", "unet.depth=1", "unet.stacking=1", "train.epochs=1", "study.confirm=0"]
    flags = [flag for setting in settings for flag in ("--set", setting)]
    command = ["--size", "24", "--trials", "2", "--folds", "2", "--threads", "1", "--tracking", "none"]
    assert exit_code("study", *own, *command, *flags) == 0
    assert exit_code("final", "--best", "--out", str(tmp_path), "--tracking", "none") == 0
    said = capsys.readouterr().out
    assert "retrained on 40 pool images, evaluated on 10 test images" in said

    (result,) = tmp_path.glob("studies/my photos/final/*/final.json")
    assert json.loads(result.read_text())["n_test"] == 10
    masks = sorted(result.parent.glob("masks/*.png"))
    assert len(masks) == 10
    for mask in masks:
        stem = mask.stem.removesuffix("_segmentation")
        assert read_mask(mask).shape == np.asarray(Image.open(outlines / f"{stem} - Umriss.png")).shape
