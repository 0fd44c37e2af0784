"""Losses on logits, one per module, selected by name: `train.loss = "bce+dice"` sums those of `bce.py` and `dice.py`.

A module has one function, `loss(logits, masks, config)`. It takes logits (B, 1, H, W) and masks (B, 1, H, W) of 0 and
1, both float32, and returns a scalar: the mean over images of a loss per image. A batch may therefore be split into
parts whose losses are weighted by the sizes of the parts. A small lesion counts as much as a large one, as in the
scores.
"""

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

from hpsearch.config.train import TrainConfig

Loss = Callable[[Tensor, Tensor], Tensor]
"""Function of logits (B, 1, H, W) of any float type and masks (B, 1, H, W) of 0 and 1 that returns a float32
scalar."""


def loss_function(config: TrainConfig) -> Loss:
    """Return the sum of the losses in `config.loss`, computed in float32 even under autocast."""
    terms = [import_module(f"{__name__}.{name}").loss for name in sorted(config.loss_terms)]

    def total_loss(logits: Tensor, masks: Tensor) -> Tensor:
        # Autocast would compute the sigmoid in bf16, whose 3 digits are too few for sums over an image.
        with torch.autocast(logits.device.type, enabled=False):
            logits, masks = logits.float(), masks.float()
            total = logits.new_zeros(())
            for term in terms:
                total = total + term(logits, masks, config)
            return total

    return total_loss
