"""Binary cross-entropy, the mean over pixels."""

import torch.nn.functional as F
from torch import Tensor

from hpsearch.config.train import TrainConfig


def loss(logits: Tensor, masks: Tensor, config: TrainConfig) -> Tensor:
    """Return the mean over images and pixels of the binary cross-entropy."""
    return F.binary_cross_entropy_with_logits(logits, masks)
