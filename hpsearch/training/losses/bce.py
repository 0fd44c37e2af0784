"""Binary cross-entropy, averaged over pixels."""

import torch.nn.functional as F
from torch import Tensor

from hpsearch.config.train import TrainConfig


def loss(logits: Tensor, masks: Tensor, config: TrainConfig) -> Tensor:
    """Return the binary cross-entropy, averaged over images and pixels."""
    return F.binary_cross_entropy_with_logits(logits, masks)
