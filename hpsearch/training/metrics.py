"""Scores of each image, computed from its four pixel counts in NumPy arrays or torch tensors.

Does not import torch, because the report and the coordinator run without it and compute scores from stored counts.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

A = TypeVar("A", np.ndarray[Any, Any], "Tensor")


class PixelCounts(NamedTuple, Generic[A]):
    """Numbers of true and false positive and negative pixels of each image, each (B,) int64. Lesion is positive."""

    tp: A
    fp: A
    fn: A
    tn: A

    @classmethod
    def from_columns(cls, counts: A) -> "PixelCounts[A]":
        """Split an array (..., 4) with the columns tp, fp, fn, tn into the four counts."""
        return cls(counts[..., 0], counts[..., 1], counts[..., 2], counts[..., 3])


def count_pixels(preds: A, masks: A) -> PixelCounts[A]:
    """Return the pixel counts of each image. Predictions and masks are (B, ...), boolean or with values 0 and 1.

    Sums are in int64, because fp16 overflows above 65504 pixels and bf16 counts exactly only up to 256.
    """
    pred = preds.reshape(preds.shape[0], -1) > 0
    mask = masks.reshape(masks.shape[0], -1) > 0
    # The sum of booleans is int64 in NumPy and in torch.
    n_both, n_pred, n_mask = (pred & mask).sum(1), pred.sum(1), mask.sum(1)
    return PixelCounts(n_both, n_pred - n_both, n_mask - n_both, mask.shape[1] - n_pred - n_mask + n_both)


def dice(counts: PixelCounts[A]) -> A:
    """Return 2 tp / (2 tp + fp + fn) for each image, (B,); 1 where mask and prediction are both empty."""
    return _ratio(2 * counts.tp, 2 * counts.tp + counts.fp + counts.fn)


def jaccard(counts: PixelCounts[A]) -> A:
    """Return the intersection over union of each image, (B,); 1 where mask and prediction are both empty."""
    return _ratio(counts.tp, counts.tp + counts.fp + counts.fn)


def accuracy(counts: PixelCounts[A]) -> A:
    """Return the fraction of correct pixels, (B,). For small lesions even an empty prediction scores high."""
    return _ratio(counts.tp + counts.tn, counts.tp + counts.fp + counts.fn + counts.tn)


def sensitivity(counts: PixelCounts[A]) -> A:
    """Return the fraction of lesion pixels that are predicted as lesion, (B,); 1 where the mask is empty."""
    return _ratio(counts.tp, counts.tp + counts.fn)


def specificity(counts: PixelCounts[A]) -> A:
    """Return the fraction of background pixels predicted as background, (B,); 1 where the mask has no background."""
    return _ratio(counts.tn, counts.tn + counts.fp)


SCORES: Mapping[str, Callable[[PixelCounts[Any]], Any]] = MappingProxyType(
    {f.__name__: f for f in (dice, jaccard, accuracy, sensitivity, specificity)}
)
"""Score functions by name."""


def _ratio(part: A, whole: A) -> A:
    # Where `whole` is 0, `part` is 0 too, and the ratio becomes (0 + 1) / (0 + 1).
    empty: A = whole == 0
    ratio: A = (part + empty) / (whole + empty)
    return ratio
