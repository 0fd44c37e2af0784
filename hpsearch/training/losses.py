"""Losses on logits: binary cross-entropy, 1 - Dice, 1 - Jaccard, and sums of them.

Every loss is a mean over images of a loss per image. So a batch may be split into parts and the parts' losses
weighted by their sizes; and a small lesion counts as much as a large one, as it does in the scores.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hpsearch.config.train import TrainConfig

Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits (B, 1, H, W) of any float type, masks (B, 1, H, W) of 0 and 1) -> scalar float32."""


def loss_function(config: TrainConfig) -> Loss:
    """The sum of the configuration's loss terms, computed in float32 whatever autocast does."""
    terms, smooth = config.loss_terms, config.smooth

    def loss(logits: Tensor, masks: Tensor) -> Tensor:
        # Autocast would leave sigmoid in bf16, which has 3 digits; its sums over an image would be worthless.
        with torch.autocast(logits.device.type, enabled=False):
            logits, masks = logits.float(), masks.float()
            total = logits.new_zeros(())
            if "bce" in terms:
                total = total + F.binary_cross_entropy_with_logits(logits, masks)
            if "dice" in terms or "jaccard" in terms:
                both, pred, mask = _soft_counts(logits, masks)
                if "dice" in terms:
                    total = total + dice_loss(both, pred, mask, smooth)
                if "jaccard" in terms:
                    total = total + jaccard_loss(both, pred, mask, smooth)
            return total

    return loss


def dice_loss(both: Tensor, pred: Tensor, mask: Tensor, smooth: float) -> Tensor:
    """Mean over images of 1 - (2 both + smooth) / (pred + mask + smooth), each (B,) in pixels.

    Milletari et al. 2016 with sums of probabilities instead of their squares. With smooth = 0 an image with an empty
    mask always costs 1 and has no gradient.
    """
    return 1 - ((2 * both + smooth) / (pred + mask + smooth).clamp_min(_TINY)).mean()


def jaccard_loss(both: Tensor, pred: Tensor, mask: Tensor, smooth: float) -> Tensor:
    """Mean over images of 1 - (both + smooth) / (pred + mask - both + smooth), each (B,) in pixels.

    Rahman and Wang 2016. With smooth = 0 an image with an empty mask always costs 1 and has no gradient.
    """
    return 1 - ((both + smooth) / (pred + mask - both + smooth).clamp_min(_TINY)).mean()


_TINY = 1e-7
"""Pixels; keeps 0 / 0 away where smooth = 0 and probabilities underflow."""


def _soft_counts(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Expected pixels of each image in prediction and mask, in the prediction, in the mask; each (B,)."""
    probabilities, masks = logits.sigmoid().flatten(1), masks.flatten(1)
    return (probabilities * masks).sum(1), probabilities.sum(1), masks.sum(1)
