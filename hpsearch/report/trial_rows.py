"""Read from the record what the figures of one trial show, as typed rows. Knows no drawing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hpsearch.data.cache import Cache, Index
from hpsearch.errors import ZIP_ERRORS, CacheError, RecordError
from hpsearch.paths import FinalPaths
from hpsearch.store.fits import FitRecord
from hpsearch.store.record import StudyRecord

CURVES = ("loss", "dice", "jaccard", "accuracy")
"""Scores of every epoch, on training and on held-out images."""


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One score of one fit after one epoch."""

    fit: str
    """`fold 1`, or `network 1` if nothing is held out."""
    score: str
    """One of CURVES."""
    epoch: int
    """From 1."""
    train: float
    held_out: float | None
    """None if nothing is held out."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One image that the network had not seen, with its prediction."""

    rank: Literal["best", "median", "worst"]
    image_id: str
    score: float
    image: npt.NDArray[np.uint8]
    """(H, W, 3)."""
    mask: npt.NDArray[np.bool_]
    """Ground truth, (H, W)."""
    pred: npt.NDArray[np.bool_]
    """(H, W)."""


def trial_curves(record: StudyRecord, number: int) -> list[CurvePoint]:
    """Return every epoch of every fold of a trial, finished or not."""
    return _curves((f"fold {fold + 1}", record.fit(number, fold)) for fold in range(record.n_folds))


def second_curves(record: StudyRecord, number: int) -> list[CurvePoint]:
    """Return every epoch of every replicate fit of a trial."""
    return _curves((f"fold {fold + 1}", record.replicate_fit(number, fold)) for fold in range(record.n_folds))


def final_curves(final: FinalPaths, n_seeds: int) -> list[CurvePoint]:
    """Return every epoch of the retrained networks."""
    return _curves((f"network {index + 1}", FitRecord(final.seed(index))) for index in range(n_seeds))


def trial_cases(record: StudyRecord, number: int, *, n_each: int = 2) -> list[Case]:
    """Return the best, median and worst held-out images among the examples that a trial's finished folds kept.

    Empty if there are none. Raises CacheError if the decoded images are gone or damaged.
    """
    fits = [record.fit(number, fold) for fold in record.finished_folds(number)]
    scores = record.out_of_fold(number)
    return _cases(fits, scores[~np.isnan(scores)], cached(record, record.data_key()), n_each)


def final_cases(record: StudyRecord, final: FinalPaths, test_key: str, *, n_each: int = 2) -> list[Case]:
    """Return the best, median and worst test images of the first retrained network."""
    fit = FitRecord(final.seed(0))
    examples = _read_examples(fit)
    scores = examples["scores"].astype(np.float64) if examples else np.zeros(0)
    return _cases([fit], scores, cached(record, test_key), n_each)


def cached(record: StudyRecord, key: str) -> Cache:
    """Open the cache of decoded images with that key. Raises CacheError if it is gone or damaged."""
    settings = record.config.data
    root = Path(settings.cache_dir) if settings.cache_dir else record.paths.project.cache
    for folder in sorted(root.glob(f"{key}-*")):
        index = Index.read(folder)
        # A cache in memory would decode the whole pool for a few images.
        return Cache(folder, replace(index, kind="none") if index.kind == "memory" else index)
    raise CacheError(f"{root} no longer holds the decoded images {key}")


def _curves(fits: Iterable[tuple[str, FitRecord]]) -> list[CurvePoint]:
    return [
        CurvePoint(
            fit=name,
            score=score,
            epoch=row.epoch,
            train=getattr(row.train, score),
            held_out=getattr(row.held_out, score) if row.held_out is not None else None,
        )
        for name, fit in fits
        for row in fit.epochs()
        for score in CURVES
    ]


def _cases(fits: Sequence[FitRecord], all_scores: npt.NDArray[np.float64], cache: Cache, n_each: int) -> list[Case]:
    """Return `n_each` cases of each rank, or fewer if there are too few examples; no image twice."""
    tables = [examples for fit in fits if (examples := _read_examples(fit)) is not None]
    if not tables:
        return []
    indices = np.concatenate([table["indices"] for table in tables])
    scores = np.concatenate([table["scores"] for table in tables]).astype(np.float64)
    probabilities = np.concatenate([table["probabilities"] for table in tables])
    orders: dict[Literal["best", "median", "worst"], npt.NDArray[np.int64]] = {
        "best": np.argsort(-scores, kind="stable"),
        "worst": np.argsort(scores, kind="stable"),
        "median": np.argsort(np.abs(scores - np.median(all_scores)), kind="stable"),
    }
    chosen: dict[int, Literal["best", "median", "worst"]] = {}
    for _ in range(n_each):
        for rank, order in orders.items():
            if free := [int(i) for i in order if int(i) not in chosen]:
                chosen[free[0]] = rank
    in_order = sorted(chosen, key=lambda i: (("best", "median", "worst").index(chosen[i]), -scores[i]))
    images, masks = cache.read(indices[in_order], held_out=True)
    # If the cached images are larger, their centre is scored.
    height, width = probabilities.shape[1:3]
    top, left = max(0, (images.shape[1] - height) // 2), max(0, (images.shape[2] - width) // 2)
    images, masks = (each[:, top : top + height, left : left + width] for each in (images, masks))
    if images.shape[1:3] != probabilities.shape[1:3]:
        raise CacheError(
            f"{cache.path} holds images of {images.shape[1:3]}, the examples are {probabilities.shape[1:3]}"
        )
    return [
        Case(
            rank=chosen[i],
            image_id=cache.ids[int(indices[i])],
            score=float(scores[i]),
            image=image,
            mask=mask > 0,
            pred=probabilities[i] > 127,
        )
        for i, image, mask in zip(in_order, images, masks, strict=True)
    ]


def _read_examples(fit: FitRecord) -> dict[str, npt.NDArray[Any]] | None:
    """Read indices (m,), scores (m,), probabilities (m, H, W) from examples.npz; None if there are none."""
    path = fit.paths.examples
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as table:
            return {name: table[name] for name in ("indices", "scores", "probabilities")}
    except (*ZIP_ERRORS, KeyError) as error:
        raise RecordError(f"{path} is damaged: {error}") from error
