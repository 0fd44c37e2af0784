"""Compute the scores of the ISIC-2017 challenge (Part 1), and write masks for submission.

The scores agree with the challenge's own package, `isic-challenge-scoring`. Mask and prediction are grayscale images
of the same size, and a pixel above 128 is lesion. The score of a submission is the mean of the scores of its images.
A score whose denominator is 0 is set to 1. The threshold Jaccard of an image is its Jaccard if this is at least 0.65,
else 0.
"""

import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from hpsearch.errors import DatasetError
from hpsearch.paths import atomic_write
from hpsearch.training import metrics
from hpsearch.training.metrics import PixelCounts, count_pixels

Mask = NDArray[np.bool_]

COLUMNS = ("accuracy", "sensitivity", "specificity", "jaccard", "threshold_jaccard", "dice")
"""Names of the challenge's scores, in the challenge's order."""
LESION_ABOVE = 128
"""Threshold of the pixel values of a mask. A pixel above it is lesion."""
JACCARD_THRESHOLD = 0.65
"""Threshold of the threshold Jaccard. An image with a lower Jaccard scores 0."""

_SUFFIX = "_segmentation"


def score_folder(preds: Path, masks: Path) -> pd.DataFrame:
    """Score the PNG files of one folder against the true masks (PNG) of another.

    A prediction belongs to the mask with the same stem, apart from the suffix `_segmentation`. As in the challenge, a
    prediction without a mask is ignored. Returns one row per mask, sorted by id, with the columns COLUMNS. Only one
    pair of images is in memory at a time.

    Raises DatasetError if a mask does not have exactly one prediction, if a file is not a grayscale PNG, or if the
    sizes of a mask and its prediction differ. The message names the files.
    """
    predicted, truths = _files_by_id(preds), _files_by_id(masks)
    if not truths:
        raise DatasetError(f"{masks} contains no PNG masks")
    counts = []
    for image_id, mask_files in truths.items():
        files = predicted.get(image_id, [])
        if len(files) != 1 or len(mask_files) != 1:
            found = ", ".join(path.name for path in files) or "none"
            names = ", ".join(path.name for path in mask_files)
            raise DatasetError(f"{names} in {masks} must have exactly one prediction in {preds}; found: {found}")
        counts.append(count_mask(read_mask(files[0]), read_mask(mask_files[0]), name=image_id))
    return score_table(list(truths), np.array(counts, np.int64))


def count_mask(pred: Mask, mask: Mask, *, name: str) -> NDArray[np.int64]:
    """Return [tp, fp, fn, tn] for two boolean masks (H, W) of one image. Raise DatasetError if their sizes differ."""
    if pred.shape != mask.shape:
        sizes = [" x ".join(str(side) for side in array.shape) for array in (pred, mask)]
        raise DatasetError(f"the prediction for {name} is {sizes[0]} pixels, its mask {sizes[1]}")
    return np.concatenate(count_pixels(pred[None], mask[None])).astype(np.int64)


def score_table(ids: Iterable[str], counts: NDArray[np.int64]) -> pd.DataFrame:
    """Compute the challenge's scores from pixel counts (n, 4) with the columns tp, fp, fn, tn.

    The table has one row per image, indexed by `image`, and the columns COLUMNS.
    """
    pixels = PixelCounts.from_columns(np.asarray(counts, np.int64))
    jaccard = metrics.jaccard(pixels)
    columns: dict[str, Any] = {name: score(pixels) for name, score in metrics.SCORES.items()}
    columns["threshold_jaccard"] = np.where(jaccard >= JACCARD_THRESHOLD, jaccard, 0.0)
    return pd.DataFrame(columns, index=pd.Index(list(ids), name="image"), columns=list(COLUMNS))


def read_mask(path: Path) -> Mask:
    """Read a grayscale PNG with at most 8 bits as a boolean mask (H, W), True for lesion.

    Raises DatasetError if the file cannot be decoded, or if it has colours, a palette, transparency or 16 bits.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise DatasetError(f"{path} cannot be decoded: {error}") from error
    if image.mode not in ("1", "L"):
        raise DatasetError(f"{path} is not a grayscale PNG of at most 8 bits, but of mode {image.mode}")
    return np.asarray(np.asarray(image.convert("L")) > LESION_ABOVE)


def write_mask(path: Path, mask: Mask, *, sync: bool = True) -> None:
    """Write a boolean mask (H, W) as an 8-bit grayscale PNG with 255 for lesion and 0 for background."""
    with atomic_write(path, sync=sync) as temporary:
        Image.fromarray(np.multiply(mask, 255, dtype=np.uint8)).save(temporary, "PNG")


def mask_name(image_id: str) -> str:
    """Return the file name of a submitted mask, for example `ISIC_0000000_segmentation.png`."""
    return f"{image_id}{_SUFFIX}.png"


def write_submission(path: Path, masks: Iterable[Path]) -> None:
    """Write a zip file of predicted masks for the challenge. `masks` are PNG files, named as by `mask_name`."""
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for mask in masks:
            # The default date of ZipInfo is constant. PNG is already compressed, so the zip file stores it as is.
            archive.writestr(zipfile.ZipInfo(mask.name), mask.read_bytes())


def _files_by_id(folder: Path) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.png")):
        files.setdefault(path.stem.removesuffix(_SUFFIX), []).append(path)
    return dict(sorted(files.items()))
