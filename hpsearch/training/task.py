"""Inputs that determine the result of a fit, and the hash that identifies its checkpoints."""

import dataclasses
import hashlib
from typing import Any

import numpy as np

from hpsearch.config import StudyConfig, digest
from hpsearch.config.data import AugmentConfig
from hpsearch.config.train import TrainConfig
from hpsearch.data.batches import n_train_batches
from hpsearch.data.cache import Normalization
from hpsearch.models.network import output_margin, uses_batch_statistics, why_impossible
from hpsearch.training.evaluation import Indices

HASHED = (
    "batch_size", "epochs", "loss", "lr", "momentum", "optimizer", "schedule", "smooth", "weight_decay", "blur",
    "brightness", "contrast", "crop", "hflip", "hue", "noise", "rotate", "saturation", "scale", "vflip",
)  # fmt: skip
"""Settings of training and augmentation that every digest includes. Settings added later are included only if they
differ from their default, so that the checkpoints of existing studies stay valid."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitTask:
    """Inputs that determine the result of a fit, except the images and the rounding of the device."""

    config: StudyConfig
    train_indices: Indices
    held_out_indices: Indices
    """Indices of the images that are scored after each epoch; may be empty."""
    normalization: Normalization
    seed: int
    micro_batch: int | None = None
    """Largest number of images whose gradients are computed at once, to save memory; None for whole batches. It is
    set only for networks without batch statistics, whose results it changes only by rounding."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images that the network sees."""
        return self.config.data.height, self.config.data.width

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps in one epoch."""
        return n_train_batches(len(self.train_indices), self.config.train.batch_size)

    @property
    def images_per_step(self) -> int:
        """Number of images in each batch."""
        return min(self.config.train.batch_size, len(self.train_indices))

    @property
    def margin(self) -> int:
        """Margin of the network in pixels (`output_margin`); 0 if its logits are interpolated to the image size."""
        return output_margin(self.config.unet) if self.config.sees_windows else 0

    def why_impossible(self) -> str | None:
        """Return the reason why the network cannot be trained with this image and batch size, or None if it can."""
        n_images, config = self.images_per_step, self.config
        reason = why_impossible(config.unet, config.data.n_channels, *self.size, batch_size=n_images)
        return reason and f"with {n_images} image{'s' if n_images > 1 else ''} at once: {reason}"

    def digest(self, data_key: str) -> str:
        """Return the hash that checkpoints store, so that a fit never resumes from another fit's checkpoint.

        `data_key` is the key of the image cache.
        """
        config = self.config
        table: dict[str, Any] = {
            "data": data_key,
            "model_config": config.unet.to_dict(),
            "in_channels": config.data.n_channels,
            "train_indices": _hash(self.train_indices),
            "held_out_indices": _hash(self.held_out_indices),
            "train": _hashed(config.train),
            "augment": _hashed(config.augment),
            "normalization": dataclasses.asdict(self.normalization),
            "size": self.size,
            "eval_size": config.eval_size,
            "metric": config.study.metric,
            "seed": self.seed,
        }
        if uses_batch_statistics(config.unet):
            # Version 0.1 could split the batches of these networks, which changed the result. This key changes
            # the hash, so the checkpoints of such fits are refused.
            table["micro_batch"] = None
        if self.margin:
            table["stretch"] = False
        return digest(table)


def _hash(indices: Indices) -> str:
    return hashlib.sha256(np.ascontiguousarray(indices, np.int64).tobytes()).hexdigest()


def _hashed(settings: TrainConfig | AugmentConfig) -> dict[str, Any]:
    """Return the settings that a digest includes. `amp` and `compile` are left out.

    Those two settings change how a fit is computed, but not what is computed.
    """
    return {
        field.name: value
        for field in dataclasses.fields(settings)
        if (value := getattr(settings, field.name)) != field.default or field.name in HASHED
        if field.name not in ("amp", "compile")
    }
