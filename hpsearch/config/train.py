"""Settings of one fit. Imports no torch: the coordinator reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hpsearch.errors import ConfigError

LOSSES = ("bce", "dice", "jaccard")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How one configuration is trained once."""

    epochs: int = 20
    """Passes over the training images."""
    batch_size: int = 16
    """Images a step."""
    lr: float = 0.01
    """Learning rate at the start."""
    loss: str = "bce+dice"
    """`bce` (the report's), `dice`, `jaccard`, or a sum such as `bce+dice`."""
    smooth: float = 1.0
    """Smoothing term of the Dice and Jaccard losses, in pixels."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW, which wants a learning rate near 0.001."""
    momentum: float = 0.9
    """Momentum of SGD; the report has none."""
    weight_decay: float = 0.0
    """What both optimizers shrink the weights by."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate over the steps of the whole fit; cosine ends at 0."""
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """Autocast precision; `auto`: bf16 where the device computes in it, fp16 on older GPUs, else off."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; `auto`: where it pays within the fit."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ConfigError(f"train.lr must be above 0, got {self.lr}")
        for name in ("smooth", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"train.{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"train.momentum must lie in [0, 1), got {self.momentum}")
        terms = self.loss_terms
        if not terms or len(set(terms)) < len(terms) or not set(terms) <= set(LOSSES):
            raise ConfigError(f"train.loss is {' | '.join(LOSSES)} or a sum such as 'bce+dice', got {self.loss!r}")

    @property
    def loss_terms(self) -> tuple[str, ...]:
        """The losses that are summed; `iou` is another name of `jaccard`."""
        terms = [term.strip() for term in self.loss.split("+")]
        return tuple("jaccard" if term == "iou" else term for term in terms)
