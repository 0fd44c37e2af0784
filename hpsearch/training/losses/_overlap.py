"""Overlap of prediction and mask, used by the Dice and Jaccard losses."""

from torch import Tensor

_TINY = 1e-7
"""Smallest denominator, in pixels. It prevents 0 / 0 if `smooth` is 0 and all probabilities underflow."""


def expected_pixels(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the expected number of pixels per image in the intersection, the prediction and the mask, each (B,)."""
    probabilities, masks = logits.sigmoid().flatten(1), masks.flatten(1)
    return (probabilities * masks).sum(1), probabilities.sum(1), masks.sum(1)


def ratio(part: Tensor, whole: Tensor, smooth: float) -> Tensor:
    """Return (part + smooth) / (whole + smooth) for each image, (B,)."""
    return (part + smooth) / (whole + smooth).clamp_min(_TINY)
