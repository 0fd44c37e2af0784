"""Overlap of prediction and mask, which the Dice and the Jaccard loss share."""

from torch import Tensor

_TINY = 1e-7
"""In pixels; prevents 0 / 0 where smooth = 0 and probabilities underflow."""


def expected_pixels(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the expected pixels of each image in prediction and mask, in the prediction, in the mask; each (B,)."""
    probabilities, masks = logits.sigmoid().flatten(1), masks.flatten(1)
    return (probabilities * masks).sum(1), probabilities.sum(1), masks.sum(1)


def ratio(part: Tensor, whole: Tensor, smooth: float) -> Tensor:
    """Return (part + smooth) / (whole + smooth) of each image, (B,)."""
    return (part + smooth) / (whole + smooth).clamp_min(_TINY)
