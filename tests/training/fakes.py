"""A cache in memory and a tiny fit, shared by the tests of training."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hpsearch.config import StudyConfig
from hpsearch.config.data import AugmentConfig, DataConfig
from hpsearch.config.model import UNetConfig
from hpsearch.config.search import StudySettings
from hpsearch.config.train import TrainConfig
from hpsearch.data.batches import DeviceData
from hpsearch.data.cache import Normalization
from hpsearch.training import loop
from hpsearch.training.progress import Progress
from hpsearch.training.runtime import Runtime
from hpsearch.training.task import FitTask

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


def make_task(
    *,
    model_config: UNetConfig,
    in_channels: int,
    size: tuple[int, int],
    train: TrainConfig,
    augment: AugmentConfig,
    metric: Any,
    eval_size: tuple[int, int] | None = None,
    stretch: bool = True,
    **others: Any,
) -> FitTask:
    """The task of a fit of these settings; without `stretch` images are taken to be windows."""
    data = DataConfig(
        size=size, color="rgb" if in_channels == 3 else "grayscale", match="resize" if stretch else "crop"
    )
    study = StudySettings(metric=metric, eval_size=eval_size or 0)
    config = StudyConfig(data=data, unet=model_config, train=train, augment=augment, study=study)
    return FitTask(config=config, **others)


def fit(*, data: DeviceData, runtime: Runtime, **arguments: Any) -> Progress:
    """Fit with the settings of `fit_arguments` and the options of the loop."""
    options = {name: arguments.pop(name) for name in ("paths", "keep_best", "on_epoch") if name in arguments}
    return loop.fit(make_task(**arguments), data, runtime, **options)
