"""What one epoch of a fit gave: one line of epochs.jsonl. Imports no torch: the coordinator reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Scores:
    """Means over images: of the loss, and of three scores per image."""

    loss: float
    dice: float
    jaccard: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class EpochRow:
    """One epoch."""

    epoch: int
    """From 1."""
    time: float
    """Unix time at its end, in seconds."""
    train: Scores
    """Over the augmented batches as they were trained on."""
    held_out: Scores | None
    """After the epoch, at the evaluation size; None where nothing is held out."""
    lr: float
    """Learning rate of the epoch's last step."""
    train_s: float
    eval_s: float
    images_per_s: float
    """Training images a second, evaluation not counted."""
    peak_bytes: int
    """Most memory in use so far: allocated on a GPU, resident in the process on a CPU."""

    def to_dict(self) -> dict[str, Any]:
        """Plain types only; `from_dict` gives an equal row."""
        return asdict(self)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> EpochRow:
        held_out = table["held_out"]
        return cls(
            **{
                **table,
                "train": Scores(**table["train"]),
                "held_out": None if held_out is None else Scores(**held_out),
            }
        )
