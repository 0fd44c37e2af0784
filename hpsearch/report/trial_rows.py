"""Read the data for the figures of a trial from the study folder: epochs, scores and example images."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from hpsearch.data.cache import Cache, Index
from hpsearch.errors import ZIP_ERRORS, CacheError, RecordError
from hpsearch.paths import FinalPaths
from hpsearch.store.fits import FitRecord
from hpsearch.store.record import StudyRecord
from hpsearch.training.metrics import SCORES, PixelCounts

logger = logging.getLogger(__name__)

CURVES = ("loss", "dice", "jaccard", "accuracy")
"""Names of the scores that are plotted against the epoch, for training and held-out images."""
Rank = Literal["best", "median", "worst"]


@dataclass(frozen=True, eq=False)
class Case:
    """A held-out or test image with its mask and prediction."""

    rank: Rank
    image_id: str
    score: float
    image: npt.NDArray[np.uint8]
    """RGB image, (H, W, 3)."""
    mask: npt.NDArray[np.bool_]
    """Ground truth, (H, W)."""
    pred: npt.NDArray[np.bool_]
    """Predicted mask, (H, W)."""


def image_scores(counts: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.float64]]:
    """Return the scores of n images by name, each (n,). The columns of `counts` (n, 4) are tp, fp, fn and tn."""
    columns = PixelCounts.from_columns(counts)
    return {name: np.asarray(score(columns), np.float64) for name, score in SCORES.items()}


def scores_by_fold(fits: Sequence[Sequence[FitRecord]]) -> dict[str, list[npt.NDArray[np.float64]]]:
    """Return the scores of the held-out images by name: a list with one array of image scores per fold.

    `fits` contains the first fits of all folds, and optionally the refits of all folds. Both are then averaged.
    """
    tables = [[image_scores(fit.counts()) for fit in of_fold] for of_fold in zip(*fits, strict=True)]
    return {name: [np.mean([each[name] for each in of_fold], axis=0) for of_fold in tables] for name in SCORES}


def trial_cases(record: StudyRecord, number: int, *, n_each: int = 2) -> list[Case]:
    """Return the best, median and worst of the example images that were stored for a trial's finished folds.

    Return an empty list if there are no examples, or if the image cache is missing or damaged.
    """
    fits = [record.fit(number, fold) for fold in record.finished_folds(number)]
    scores = record.out_of_fold(number)
    try:
        return _cases(fits, scores[~np.isnan(scores)], cached(record, record.data_key()), n_each)
    except CacheError as error:
        # Users may delete the image cache to save space.
        logger.info("trial %04d of %s: no panels: %s", number, record.name, error)
        return []


def final_cases(record: StudyRecord, final: FinalPaths, test_key: str) -> list[Case]:
    """Return the best, median and worst of the test images stored as examples for the first retrained network."""
    return _cases([FitRecord(final.seed(0))], None, cached(record, test_key))


def cached(record: StudyRecord, key: str) -> Cache:
    """Open the image cache with the given key. Raises CacheError if it is missing or damaged."""
    settings = record.config.data
    root = Path(settings.cache_dir) if settings.cache_dir else record.paths.project.cache
    for folder in sorted(root.glob(f"{key}-*")):
        index = Index.read(folder)
        # A cache of kind "memory" would decode the whole pool, but only a few images are needed.
        return Cache(folder, replace(index, kind="none") if index.kind == "memory" else index)
    raise CacheError(f"{root} no longer contains the decoded images {key}")


def _cases(
    fits: Sequence[FitRecord], all_scores: npt.NDArray[np.float64] | None, cache: Cache, n_each: int = 2
) -> list[Case]:
    """Return `n_each` best, median and worst cases, or fewer if there are too few examples. No image occurs twice.

    The median cases are closest to the median of `all_scores`, which defaults to the scores of the examples.
    """
    tables = [_read_examples(fit) for fit in fits if fit.paths.examples.is_file()]
    if not tables:
        return []
    indices, scores, probabilities = (np.concatenate(parts) for parts in zip(*tables, strict=True))
    scores = scores.astype(np.float64)
    median = np.median(scores if all_scores is None else all_scores)
    orders: dict[Rank, Any] = {"best": -scores, "worst": scores, "median": np.abs(scores - median)}
    chosen: dict[int, Rank] = {}
    for rank, order in [*orders.items()] * n_each:
        free = (int(i) for i in np.argsort(order, kind="stable") if int(i) not in chosen)
        if (first := next(free, None)) is not None:
            chosen[first] = rank
    in_order = sorted(chosen, key=lambda i: (get_args(Rank).index(chosen[i]), -scores[i]))
    pictures = cache.read(indices[in_order], held_out=True)
    # If the cached images are larger than the predictions, only their centre is scored.
    height, width = probabilities.shape[1:3]
    top, left = (max(0, (pictures[0].shape[i] - probabilities.shape[i]) // 2) for i in (1, 2))
    images, masks = (each[:, top : top + height, left : left + width] for each in pictures)
    if images.shape[1:3] != probabilities.shape[1:3]:
        raise CacheError(
            f"{cache.path} contains images of {images.shape[1:3]}, the examples are {probabilities.shape[1:3]}"
        )
    return [
        Case(chosen[i], cache.ids[int(indices[i])], float(scores[i]), image, mask > 0, probabilities[i] > 127)
        for i, image, mask in zip(in_order, images, masks, strict=True)
    ]


def _read_examples(fit: FitRecord) -> list[npt.NDArray[Any]]:
    """Read indices (m,), scores (m,) and probabilities (m, H, W) from examples.npz."""
    path = fit.paths.examples
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as table:
            return [table[name] for name in ("indices", "scores", "probabilities")]
    except (*ZIP_ERRORS, KeyError) as error:
        raise RecordError(f"{path} is damaged: {error}") from error
