"""Define the training loops with which the benchmarks compare hpsearch: plain PyTorch, MONAI and Lightning."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from hpsearch.config.data import DataConfig
from hpsearch.config.model import UNetConfig
from hpsearch.data.layouts import find_samples
from hpsearch.models.unet import BatchNorm, UNet, UpSampling

Pair = tuple[Path, Path]
"""Files of an image and its mask."""
MEAN, STD = (0.7, 0.6, 0.55), (0.15, 0.15, 0.16)
"""Of images / 255, by channel; about those of ISIC-2017."""


def plain_unet(config: UNetConfig, in_channels: int = 3, *, seed: int = 0) -> UNet:
    """The UNet of torch's own layers: the same function, parameters and first weights."""
    model = UNet(config, in_channels, seed=seed)
    for module in model.modules():
        # Both add nothing to their base but a faster forward pass.
        if type(module) is UpSampling:
            module.__class__ = nn.ConvTranspose2d
        elif type(module) is BatchNorm:
            module.__class__ = nn.BatchNorm2d
    return model


def find_pairs(data: str | Path, split: str, n_images: int | None = None) -> list[Pair]:
    """The first `n_images` images of a split in the archive layout, and their masks."""
    samples = find_samples(DataConfig(root=str(data))).split(split)[:n_images]  # type: ignore[arg-type]
    return [(sample.image, sample.mask) for sample in samples]


class JpegDataset:
    """Decodes, resizes, flips and normalises one pair at a time, as a tutorial would."""

    def __init__(self, pairs: list[Pair], size: int, *, flips: bool = True) -> None:
        self._pairs = pairs
        self._image_size = v2.Resize([size, size], antialias=True)
        self._mask_size = v2.Resize([size, size], interpolation=v2.InterpolationMode.NEAREST)
        self._normalize = v2.Normalize(list(MEAN), list(STD))
        self._flips = flips

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image_path, mask_path = self._pairs[index]
        image = self._image_size(decode_image(str(image_path), ImageReadMode.RGB))
        mask = self._mask_size(decode_image(str(mask_path), ImageReadMode.GRAY))
        image = self._normalize(image.float() / 255)
        mask = (mask > 127).float()
        if self._flips and torch.rand(()) < 0.5:
            image, mask = image.flip(-1), mask.flip(-1)
        return image, mask


def train_epoch(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    optimizer: torch.optim.Optimizer,
    *,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    device: str = "cpu",
    layout: torch.memory_format = torch.contiguous_format,
    bf16: bool = False,
) -> tuple[float, int]:
    """One epoch of the loop of the tutorials, with binary cross-entropy: the mean loss of a step, and images."""
    loss_function = nn.BCEWithLogitsLoss()
    model.train()
    losses, n_images = [], 0
    for images, masks in batches:
        images, masks = images.to(device, memory_format=layout), masks.to(device)
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
            loss = loss_function(model(images), masks)
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(loss.item())
        n_images += len(images)
    return sum(losses) / len(losses), n_images


def monai_pairs(pairs: list[Pair], size: int, n_threads: int) -> Any:
    """MONAI's CacheDataset of decoded, resized and normalised pairs: dictionaries with image and mask."""
    from monai.data import CacheDataset, set_track_meta
    from monai.transforms import (
        AsDiscreted,
        Compose,
        LoadImaged,
        NormalizeIntensityd,
        Resized,
        ScaleIntensityd,
    )

    set_track_meta(False)
    keys = ["image", "mask"]
    transforms = Compose(
        [
            LoadImaged(keys=keys, ensure_channel_first=True),
            Resized(keys=keys, spatial_size=(size, size), mode=["area", "nearest"]),
            ScaleIntensityd(keys="mask"),
            AsDiscreted(keys="mask", threshold=0.5),
            # The same numbers for all images, as the other sides have them, so that scores can be compared.
            NormalizeIntensityd(
                keys="image",
                subtrahend=[255 * value for value in MEAN],
                divisor=[255 * value for value in STD],
                channel_wise=True,
            ),
        ]
    )
    items = [{"image": str(image), "mask": str(mask)} for image, mask in pairs]
    return CacheDataset(items, transforms, cache_rate=1.0, num_workers=n_threads, progress=False)


def monai_flips() -> Any:
    """MONAI's random mirroring of a pair."""
    from monai.transforms import RandFlipd

    return RandFlipd(keys=["image", "mask"], prob=0.5, spatial_axis=0)
