"""A cache in memory and a tiny fit, shared by the tests of training."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hpsearch.config.data import AugmentConfig
from hpsearch.config.model import UNetConfig
from hpsearch.config.train import TrainConfig
from hpsearch.data.batches import DeviceData
from hpsearch.data.cache import Normalization
from hpsearch.training.runtime import Runtime

NORMALIZATION = Normalization(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
FLOAT32 = Runtime(device=torch.device("cpu"), precision="float32", compile="off", threads=1)


class FakeCache:
    """Bright discs on a dark ground with noise, and their masks."""

    has_held_out_view = False

    def __init__(self, n: int = 20, size: tuple[int, int] = (16, 16), key: str = "fake") -> None:
        generator = np.random.default_rng(7)
        height, width = size
        y, x = np.mgrid[:height, :width] / np.array([height, width])[:, None, None]
        centres, radii = generator.uniform(0.35, 0.65, (n, 2)), generator.uniform(0.15, 0.35, n)
        self.masks = np.stack(
            [
                ((y - cy) ** 2 + (x - cx) ** 2 < r * r).astype(np.uint8)
                for (cy, cx), r in zip(centres, radii, strict=True)
            ]
        )
        noise = generator.integers(0, 120, (n, height, width, 3))
        self.images = (noise + 120 * self.masks[..., None]).astype(np.uint8)
        self.size, self.key, self.ids = size, key, tuple(f"image{i:02d}" for i in range(n))

    def __len__(self) -> int:
        return len(self.ids)

    def read(
        self, indices: npt.NDArray[np.int64], *, held_out: bool = False
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        return self.images[indices], self.masks[indices]


def make_data(cache: FakeCache | None = None, device: str = "cpu", **kwargs: Any) -> DeviceData:
    return DeviceData(cache or FakeCache(), device, **kwargs)  # type: ignore[arg-type]


def fit_arguments(**changes: Any) -> dict[str, Any]:
    """Arguments of a fit that takes about 0.1 s: 3 epochs of 3 steps on 16x16 images, 7 held out."""
    return {
        "model_config": UNetConfig(base_channels=2, depth=1, stacking=1),
        "in_channels": 3,
        "data": make_data(),
        "train_indices": np.arange(13),
        "held_out_indices": np.arange(13, 20),
        "train": TrainConfig(epochs=3, batch_size=4, lr=0.05, loss="bce+dice"),
        "augment": AugmentConfig(hflip=0.5, brightness=0.1),
        "normalization": NORMALIZATION,
        "size": (16, 16),
        "metric": "dice",
        "seed": 5,
        "runtime": FLOAT32,
        **changes,
    }
