"""Reads from the record what the figures of one trial show, as plain typed rows. Knows no drawing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hpsearch.data.cache import Cache, Index, NoCache, open_cache
from hpsearch.errors import ZIP_ERRORS, CacheError, RecordError
from hpsearch.paths import FinalPaths
from hpsearch.store.record import FitRecord, StudyRecord

CURVES = ("loss", "dice", "jaccard", "accuracy")
"""What every epoch is scored by, in training and held out."""


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One score of one fit after one epoch."""

    fit: str
    """`fold 0`, or `seed 0` where nothing is held out."""
    score: str
    """One of CURVES."""
    epoch: int
    """From 1."""
    train: float
    held_out: float | None
    """None where nothing is held out."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One image that a network had not seen, with what it made of it."""

    rank: Literal["best", "median", "worst"]
    image_id: str
    score: float
    image: npt.NDArray[np.uint8]
    """(H, W, 3)."""
    mask: npt.NDArray[np.bool_]
    """The truth, (H, W)."""
    pred: npt.NDArray[np.bool_]
    """(H, W)."""


def trial_curves(record: StudyRecord, number: int) -> list[CurvePoint]:
    """Every epoch of every fold of a trial, finished or not."""
    return _curves((f"fold {fold}", record.fit(number, fold)) for fold in range(record.n_folds))


def second_curves(record: StudyRecord, number: int) -> list[CurvePoint]:
    """Every epoch of every second fit of a trial."""
    return _curves((f"fold {fold}", record.second_fit(number, fold)) for fold in range(record.n_folds))


def final_curves(final: FinalPaths, n_seeds: int) -> list[CurvePoint]:
    """Every epoch of the retrained networks."""
    return _curves((f"seed {index}", FitRecord(final.seed(index))) for index in range(n_seeds))


def trial_cases(record: StudyRecord, number: int, *, n_each: int = 2) -> list[Case]:
    """The best, median and worst held-out images among the examples that a trial's finished folds kept.

    Empty where there are none. CacheError if the decoded images are gone or damaged.
    """
    fits = [record.fit(number, fold) for fold in record.finished_folds(number)]
    scores = record.out_of_fold(number)
    return _cases(fits, scores[~np.isnan(scores)], cached(record, record.data_key()), n_each)


def final_cases(record: StudyRecord, final: FinalPaths, test_key: str, *, n_each: int = 2) -> list[Case]:
    """The same for the test images that the first retrained network was scored on."""
    fit = FitRecord(final.seed(0))
    examples = _read_examples(fit)
    scores = examples["scores"].astype(np.float64) if examples else np.zeros(0)
    return _cases([fit], scores, cached(record, test_key), n_each)


def cached(record: StudyRecord, key: str) -> Cache:
    """The decoded images of that key. CacheError if they are gone or damaged."""
    settings = record.config.data
    root = Path(settings.cache_dir) if settings.cache_dir else record.paths.project.cache
    for folder in sorted(root.glob(f"{key}-*")):
        index = Index.read(folder)
        # That kind would decode the whole pool for a handful of images.
        return NoCache(folder, index) if index.kind == "memory" else open_cache(folder)
    raise CacheError(f"{root} no longer holds the decoded images {key}")


def _curves(fits: Iterable[tuple[str, FitRecord]]) -> list[CurvePoint]:
    return [
        CurvePoint(
            fit=name,
            score=score,
            epoch=row["epoch"],
            train=row["train"][score],
            held_out=row["held_out"][score] if row["held_out"] is not None else None,
        )
        for name, fit in fits
        for row in fit.epochs()
        for score in CURVES
    ]


def _cases(fits: Sequence[FitRecord], all_scores: npt.NDArray[np.float64], cache: Cache, n_each: int) -> list[Case]:
    """`n_each` of each rank; fewer where there are not so many examples, none twice."""
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
    # From a cache of larger images, what is scored is their centre.
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
    """indices (m,), scores (m,), probabilities (m, H, W) of examples.npz; None where there are none."""
    path = fit.paths.examples
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as table:
            return {name: table[name] for name in ("indices", "scores", "probabilities")}
    except (*ZIP_ERRORS, KeyError) as error:
        raise RecordError(f"{path} is damaged: {error}") from error
