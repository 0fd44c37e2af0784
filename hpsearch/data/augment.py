"""Change training batches at random: a batch as a whole, on its device, masks with their images.

What happens to which image is drawn beforehand (`draw_changes`), on the CPU and for a whole epoch, so that no batch
waits for it and nothing depends on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from hpsearch.data.config import AugmentConfig
from hpsearch.errors import CacheError

_GRAY = (
    0.2989,
    0.587,
    0.114,
)  # torchvision's rounding of the BT.601 weights, since its colour changes are the reference


@dataclass(frozen=True)
class Changes:
    """What happens to each of n images, each an (n,) tensor; None where a change is switched off."""

    hflip: Tensor | None = None
    """bool: mirrored left to right."""
    vflip: Tensor | None = None
    """bool: mirrored top to bottom."""
    brightness: Tensor | None = None
    """Factor on all channels."""
    contrast: Tensor | None = None
    """Factor on the distance from the image's mean grey."""
    saturation: Tensor | None = None
    """Factor on the distance from each pixel's grey."""
    hue: Tensor | None = None
    """Shift in turns of the colour circle."""

    def __getitem__(self, rows: slice) -> Changes:
        """The changes of some of the images."""
        return self._map(lambda value: value[rows])

    def to(self, device: torch.device) -> Changes:
        """The same changes on another device."""
        return self._map(lambda value: value.to(device, non_blocking=True))

    def _map(self, function: Callable[[Tensor], Tensor]) -> Changes:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Changes(**{name: None if value is None else function(value) for name, value in values.items()})


def draw_changes(
    config: AugmentConfig,
    n_images: int,
    generator: np.random.Generator,
    *,
    from_size: tuple[int, int],
    to_size: tuple[int, int],
) -> Changes:
    """Draw what happens to `n_images` images of `from_size` that shall come out at `to_size` (height, width).

    Each kind of change takes the same random numbers whether or not the others are switched on. Raises CacheError
    when the sizes differ and `config.crop` is off, or when there is nothing to crop from.
    """
    if from_size != to_size:
        raise CacheError(f"the cached images are {from_size[0]}x{from_size[1]}, wanted are {to_size[0]}x{to_size[1]}")
    names = ("hflip", "vflip", "brightness", "contrast", "saturation", "hue")
    uniform = dict(zip(names, generator.random((len(names), n_images)), strict=True))

    def happens(name: str) -> Tensor | None:
        probability = getattr(config, name)
        return torch.from_numpy(uniform[name] < probability) if probability else None

    def around(name: str, centre: float) -> Tensor | None:
        spread = getattr(config, name)
        values = centre + spread * (2 * uniform[name] - 1)
        return torch.from_numpy(values.astype(np.float32)) if spread else None

    return Changes(
        hflip=happens("hflip"),
        vflip=happens("vflip"),
        brightness=around("brightness", 1),
        contrast=around("contrast", 1),
        saturation=around("saturation", 1),
        hue=around("hue", 0),
    )


def augment_batch(images: Tensor, masks: Tensor, changes: Changes) -> tuple[Tensor, Tensor]:
    """Images (B, H, W, 3) uint8 and masks (B, H, W) uint8, changed.

    The images come out as uint8 where bytes were only moved, else as float32 from 0 to 255; the masks stay 0 and 1.
    """
    for flags, axis in ((changes.hflip, 2), (changes.vflip, 1)):
        if flags is not None:
            images, masks = _flip(images, flags, axis), _flip(masks, flags, axis)
    if any(change is not None for change in (changes.brightness, changes.contrast, changes.saturation, changes.hue)):
        images = jitter_color(images.to(torch.float32) / 255, changes) * 255
    return images, masks


def jitter_color(images: Tensor, changes: Changes) -> Tensor:
    """Brightness, contrast, saturation, then hue of (B, H, W, 3) float32 from 0 to 1, each clamped to 0..1.

    The four are those of `torchvision.transforms.v2.functional`, with a factor of its own for every image.
    """
    if changes.brightness is not None:
        images = (images * _each(changes.brightness)).clamp_(0, 1)
    if changes.contrast is not None:
        mean = _gray(images).mean((1, 2), keepdim=True)
        images = _blend(images, mean, changes.contrast)
    if changes.saturation is not None:
        images = _blend(images, _gray(images), changes.saturation)
    if changes.hue is not None:
        images = _shift_hue(images, changes.hue)
    return images


def _flip(batch: Tensor, flags: Tensor, axis: int) -> Tensor:
    """Mirror along `axis` where the flag is set. Whole images are copied: 4 times faster than a choice per pixel."""
    both = torch.cat((batch, batch.flip(axis)))
    choice = torch.arange(len(batch), device=batch.device) + len(batch) * flags
    return both.index_select(0, choice)


def _each(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _gray(images: Tensor) -> Tensor:
    """Grey of (B, H, W, 3) as (B, H, W, 1)."""
    red, green, blue = images.unbind(-1)
    return (red * _GRAY[0] + green * _GRAY[1] + blue * _GRAY[2]).unsqueeze(-1)


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """factor x images + (1 - factor) x other, clamped."""
    return torch.lerp(other, images, _each(factor)).clamp_(0, 1)


def _shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of (B, H, W, 3) by `shift` turns; value and saturation stay (HSV).

    Back from HSV by f(n) = v - v s max(0, min(k, 4 - k, 1)), k = (n + 6 h) mod 6, n = 5, 3, 1 for red, green, blue.
    """
    red, green, blue = images.unbind(-1)
    value = images.amax(-1)
    chroma = value - images.amin(-1)
    safe = torch.where(chroma > 0, chroma, 1.0)
    sextant = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sextant = sextant + 6 * shift.view(-1, 1, 1)
    channels = []
    for offset in (5, 3, 1):
        k = (sextant + offset) % 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
    return torch.stack(channels, dim=-1)
