"""Training settings. Does not import torch, so that commands start fast."""

from dataclasses import dataclass
from typing import Annotated, Literal

from hpsearch.config.values import ModuleName, check_at_least, require

_LOSS = ModuleName("training/losses", is_sum=True)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Training settings: epochs, loss, optimizer and precision of a fit."""

    epochs: int = 20
    """Number of passes over the training images."""
    batch_size: int = 16
    """Number of images per optimizer step."""
    lr: float = 0.01
    """Initial learning rate."""
    loss: Annotated[str, _LOSS] = "bce+dice"
    """Loss, or a sum of losses joined by `+`. Each one is the name of a module in `hpsearch/training/losses/`. The
    built-in configurations `report-fig*` use `bce`."""
    smooth: float = 1.0
    """Term that is added to numerator and denominator of the Dice and Jaccard losses, in pixels."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Optimizer. `sgd`: SGD with momentum. `adamw`: AdamW, which needs a learning rate near 0.001."""
    momentum: float = 0.9
    """Momentum of SGD. The built-in configurations `report-fig*` use 0."""
    weight_decay: float = 0.0
    """Weight decay of either optimizer."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Schedule of the learning rate over all steps of a fit; `cosine` ends at 0."""
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """Precision of autocast. `auto`: bf16 where the hardware supports it, fp16 on older GPUs, otherwise off."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether to use torch.compile. `auto`: only if it saves time over the whole fit."""

    def __post_init__(self) -> None:
        check_at_least("train", self, 1, "epochs", "batch_size")
        check_at_least("train", self, 0, "smooth", "weight_decay")
        require(self.lr > 0, f"train.lr must be above 0, got {self.lr}")
        require(0 <= self.momentum < 1, f"train.momentum must lie in [0, 1), got {self.momentum}")
        for term in self.loss_terms:
            _LOSS.check("train.loss", term)
        require(len(set(self.loss_terms)) == len(self.loss_terms), f"train.loss = {self.loss!r} lists a loss twice")

    @property
    def loss_terms(self) -> tuple[str, ...]:
        """Names of the losses to sum; `iou` is an alias of `jaccard`."""
        terms = [term.strip() for term in self.loss.split("+")]
        return tuple("jaccard" if term == "iou" else term for term in terms)
