"""The official scores against the challenge's own package, and the submission that it reads."""

from __future__ import annotations

import io
import os
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from isic_challenge_scoring.segmentation import SegmentationScore
from numpy.typing import NDArray
from PIL import Image

from hpsearch.errors import DatasetError
from hpsearch.inference.scoring import (
    COLUMNS,
    count_mask,
    mask_name,
    read_mask,
    score_folder,
    score_table,
    write_mask,
    write_submission,
)

Gray = NDArray[np.uint8]
# The reference calls a form of `Series.rename` that pandas 3.1 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:The inplace keyword in Series.rename")


def save(folder: Path, name: str, pixels: Gray) -> None:
    folder.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(folder / name)


def one_pair(rng: np.random.Generator, kind: int) -> tuple[Gray, Gray]:
    """Prediction and mask, uint8 (H, W): random ones and those that scoring stumbles over."""
    shape = tuple(rng.integers(1, 40, 2))
    empty, full = np.zeros(shape, np.uint8), np.full(shape, 255, np.uint8)
    random = [rng.choice([0, 255], shape, p=[1 - p, p]).astype(np.uint8) for p in rng.uniform(0, 1, 2)]
    pixel = empty.copy()
    pixel[rng.integers(shape[0]), rng.integers(shape[1])] = 255
    edge = rng.choice([127, 128, 129], shape).astype(np.uint8)
    anything = rng.integers(0, 256, shape).astype(np.uint8)
    # 13 of 20 pixels: a Jaccard of exactly 0.65; and 12 of 20, just below.
    row = np.zeros((1, 20), np.uint8)
    at, below = row.copy(), row.copy()
    at[0, :13], below[0, :12] = 255, 255
    nearly = random[0].copy()
    nearly[0, 0] ^= 255
    pairs = [
        (random[0], random[1]),
        (nearly, random[0]),
        (empty, empty),
        (full, full),
        (empty, full),
        (full, empty),
        (pixel, empty),
        (empty, pixel),
        (pixel, pixel),
        (pixel, full),
        (edge, random[0]),
        (random[0], edge),
        (anything, edge),
        (at, np.full_like(row, 255)),
        (below, np.full_like(row, 255)),
    ]
    return pairs[kind % len(pairs)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """300 pairs as PNG files: predictions and masks."""
    root, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    preds, masks = root / "preds", root / "masks"
    for number in range(300):
        pred, mask = one_pair(rng, number)
        save(preds, mask_name(f"ISIC_{number:07d}"), pred)
        save(masks, mask_name(f"ISIC_{number:07d}"), mask)
    return preds, masks


def test_means_equal_the_challenges_own(folders: tuple[Path, Path]) -> None:
    preds, masks = folders
    reference = SegmentationScore.from_dir(masks, preds).macro_average
    ours = score_folder(preds, masks).mean().to_dict()
    assert list(ours) == list(reference.index) == list(COLUMNS)
    assert np.allclose(list(ours.values()), reference.to_numpy(), rtol=0, atol=1e-12)


def test_every_image_scores_as_in_the_challenge(folders: tuple[Path, Path], tmp_path: Path) -> None:
    preds, masks = folders
    table = score_folder(preds, masks)
    assert len(table) == 300
    only = tmp_path / "mask"
    only.mkdir()
    # The reference gives means only, so it is asked about two images of every kind one at a time.
    for image_id in table.index[:30]:
        link = only / mask_name(image_id)
        link.symlink_to(masks / link.name)
        reference = SegmentationScore.from_dir(only, preds).macro_average
        assert np.allclose(table.loc[image_id, list(COLUMNS)], reference, rtol=0, atol=1e-12), image_id
        link.unlink()


def test_only_values_above_128_are_lesion(tmp_path: Path) -> None:
    save(tmp_path, "a.png", np.array([[0, 127, 128, 129, 255]], np.uint8))
    assert read_mask(tmp_path / "a.png").tolist() == [[False, False, False, True, True]]


def test_a_jaccard_of_exactly_065_counts() -> None:
    table = score_table(["at", "below"], np.array([[13, 7, 0, 80], [12, 8, 0, 80]]))
    assert table["threshold_jaccard"].tolist() == [0.65, 0.0]
    assert table["jaccard"].tolist() == [0.65, 0.6]


def test_empty_mask_and_empty_prediction_score_one() -> None:
    table = score_table(["empty"], count_mask(np.zeros((3, 4), bool), np.zeros((3, 4), bool), name="empty")[None])
    assert table.loc["empty"].tolist() == [1.0] * 6


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_png_gives_back_the_mask(
    tmp_path_factory: pytest.TempPathFactory, height: int, width: int, seed: int
) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < 0.5
    path = tmp_path_factory.mktemp("png") / "mask.png"
    write_mask(path, mask)
    assert np.array_equal(read_mask(path), mask)
    assert set(np.unique(np.asarray(Image.open(path)))) <= {0, 255}


def test_the_challenge_scores_our_zip_as_we_do(folders: tuple[Path, Path], tmp_path: Path) -> None:
    preds, masks = folders
    (tmp_path / "ours").mkdir()
    for path in preds.iterdir():
        write_mask(tmp_path / "ours" / path.name, read_mask(path))
    write_submission(tmp_path / "submission.zip", (tmp_path / "ours").iterdir())
    with zipfile.ZipFile(tmp_path / "truth.zip", "w") as archive:
        for path in masks.iterdir():
            archive.write(path, path.name)
    reference = SegmentationScore.from_zip_file(tmp_path / "truth.zip", tmp_path / "submission.zip").macro_average
    assert np.allclose(list(score_folder(preds, masks).mean()), reference.to_numpy(), rtol=0, atol=1e-12)


def test_submission_has_the_challenges_names_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    masks = [tmp_path / mask_name(f"ISIC_000000{number}") for number in (1, 2)]
    write_mask(masks[0], np.eye(5, dtype=bool))
    write_mask(masks[1], np.zeros((3, 7), bool))
    write_submission(tmp_path / "a.zip", masks)
    write_submission(tmp_path / "b.zip", iter(masks))
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.namelist() == ["ISIC_0000001_segmentation.png", "ISIC_0000002_segmentation.png"]
        image = Image.open(io.BytesIO(archive.read("ISIC_0000002_segmentation.png")))
        assert (image.mode, image.size) == ("L", (7, 3))


def test_a_missing_prediction_is_named(tmp_path: Path) -> None:
    mask = np.full((4, 4), 255, np.uint8)
    save(tmp_path / "masks", "ISIC_0000007_segmentation.png", mask)
    save(tmp_path / "preds", "ISIC_0000008_segmentation.png", mask)
    with pytest.raises(DatasetError, match=r"ISIC_0000007_segmentation\.png .* found: none"):
        score_folder(tmp_path / "preds", tmp_path / "masks")


def test_two_predictions_for_one_mask_are_named(tmp_path: Path) -> None:
    mask = np.full((4, 4), 255, np.uint8)
    save(tmp_path / "masks", "ISIC_0000007_segmentation.png", mask)
    save(tmp_path / "preds", "ISIC_0000007_segmentation.png", mask)
    save(tmp_path / "preds", "ISIC_0000007.png", mask)
    with pytest.raises(DatasetError, match=r"ISIC_0000007\.png, ISIC_0000007_segmentation\.png"):
        score_folder(tmp_path / "preds", tmp_path / "masks")


def test_predictions_without_a_mask_are_passed_over(tmp_path: Path) -> None:
    mask = np.full((4, 4), 255, np.uint8)
    save(tmp_path / "masks", "ISIC_0000007_segmentation.png", mask)
    save(tmp_path / "preds", "ISIC_0000007.png", mask)
    save(tmp_path / "preds", "ISIC_0000008.png", mask)
    assert score_folder(tmp_path / "preds", tmp_path / "masks").index.tolist() == ["ISIC_0000007"]


def test_a_folder_without_masks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="contains no PNG masks"):
        score_folder(tmp_path, tmp_path)


def test_sizes_that_differ_are_named(tmp_path: Path) -> None:
    save(tmp_path / "masks", "ISIC_0000007_segmentation.png", np.zeros((4, 5), np.uint8))
    save(tmp_path / "preds", "ISIC_0000007_segmentation.png", np.zeros((5, 4), np.uint8))
    with pytest.raises(DatasetError, match="ISIC_0000007 is 5 x 4 pixels, its mask 4 x 5"):
        score_folder(tmp_path / "preds", tmp_path / "masks")


@pytest.mark.parametrize("mode", ["RGB", "LA", "P", "I;16"])
def test_files_that_the_challenge_refuses_are_refused(tmp_path: Path, mode: str) -> None:
    gray = Image.fromarray(np.eye(4, dtype=np.uint8) * 255)
    image = Image.fromarray(np.eye(4, dtype=np.uint16) * 60000) if mode == "I;16" else gray.convert(mode)
    image.save(tmp_path / "a.png")
    with pytest.raises(DatasetError, match=r"a\.png is not a grayscale PNG"):
        read_mask(tmp_path / "a.png")


def test_one_bit_masks_are_read(tmp_path: Path) -> None:
    Image.fromarray(np.eye(9, dtype=bool)).save(tmp_path / "a.png")
    assert np.array_equal(read_mask(tmp_path / "a.png"), np.eye(9, dtype=bool))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    write_mask(tmp_path / "torn.png", np.random.default_rng(0).random((64, 64)) < 0.5)
    whole = (tmp_path / "torn.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_bytes(b"not a picture at all, but long enough for a header")
    with pytest.raises(DatasetError, match=r"torn\.png cannot be decoded"):
        read_mask(tmp_path / "torn.png")
    with pytest.raises(DatasetError, match=r"text\.png cannot be decoded"):
        read_mask(tmp_path / "text.png")


def test_the_largest_image_needs_few_bytes_a_pixel() -> None:
    pred, mask = np.zeros((4499, 6748), bool), np.ones((4499, 6748), bool)
    tracemalloc.start()
    try:
        counts = count_mask(pred, mask, name="largest")
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert counts.tolist() == [0, 0, 4499 * 6748, 0]
    assert peak_bytes < 4 * pred.size


def test_native_masks_score_one_against_themselves() -> None:
    root = os.environ.get("HPSEARCH_ISIC_ROOT")
    if root is None:
        pytest.skip("HPSEARCH_ISIC_ROOT is not set")
    masks = Path(root) / "ISIC-2017_Validation_Part1_GroundTruth"
    table = score_folder(masks, masks)
    assert len(table) == 150
    assert (table == 1).all(axis=None)
