"""Jaccard loss of Rahman and Wang 2016."""

from torch import Tensor

from hpsearch.config.train import TrainConfig
from hpsearch.training.losses._overlap import expected_pixels, ratio


def loss(logits: Tensor, masks: Tensor, config: TrainConfig) -> Tensor:
    """Return the mean over images of 1 - (both + smooth) / (pred + mask - both + smooth).

    `both`, `pred` and `mask` are the expected numbers of pixels in the intersection, the prediction and the mask. If
    `smooth` is 0, an image with an empty mask always has loss 1 and no gradient.
    """
    both, pred, mask = expected_pixels(logits, masks)
    return 1 - ratio(both, pred + mask - both, config.smooth).mean()
