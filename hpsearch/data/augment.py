"""Change training batches at random. A batch is changed as a whole, on its device, images and masks together.

`draw_changes` draws the changes of a whole epoch beforehand on the CPU. No batch waits for it, and only the noise of
single pixels depends on the device. Images stay bytes (B, H, W, 3) while pixels are only moved. Other changes are
computed on float32 planes (B, 3, H, W), whose inner dimension is long.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hpsearch.config.data import AugmentConfig
from hpsearch.errors import CacheError

_KINDS = (
    *("hflip", "vflip", "brightness", "contrast", "saturation", "hue"),
    *("rotate", "scale", "top", "left", "blur", "noise"),
)
# BT.601 weights as torchvision rounds them, because its colour changes are the reference.
_GRAY = (0.2989, 0.587, 0.114)


@dataclass(frozen=True)
class Changes:
    """Changes of n images, each an (n,) tensor, None if the change is switched off."""

    hflip: Tensor | None = None
    """bool: whether it is mirrored left to right."""
    vflip: Tensor | None = None
    """bool: whether it is mirrored top to bottom."""
    brightness: Tensor | None = None
    """Factor on all channels."""
    contrast: Tensor | None = None
    """Factor on the distance from the image's mean gray."""
    saturation: Tensor | None = None
    """Factor on the distance from each pixel's gray."""
    hue: Tensor | None = None
    """Shift as a share of the colour circle."""
    rotate: Tensor | None = None
    """Radians, anticlockwise as displayed."""
    scale: Tensor | None = None
    """Zoom factor, above 1 to enlarge."""
    top: Tensor | None = None
    """int64: first row of the crop."""
    left: Tensor | None = None
    """int64: first column of the crop."""
    blur: Tensor | None = None
    """Standard deviation in pixels."""
    noise: Tensor | None = None
    """Standard deviation for images from 0 to 1."""
    blur_radius: int = 0
    """Radius in pixels of the widest blur."""
    noise_seed: int = 0
    """Seed of the noise of the batch that begins with the first image."""

    def __getitem__(self, rows: slice) -> Changes:
        """Return the changes of a slice of the images."""
        part = self._map(lambda value: value[rows])
        return replace(part, noise_seed=self.noise_seed + (rows.start or 0))

    def to(self, device: torch.device) -> Changes:
        """Return the changes on another device."""
        return self._map(lambda value: value.to(device, non_blocking=True))

    @property
    def changes_values(self) -> bool:
        """Whether pixel values change and pixels are not only moved."""
        kinds = (self.brightness, self.contrast, self.saturation, self.hue, self.blur, self.noise)
        return any(kind is not None for kind in kinds)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Changes:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {name: function(v) for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **changed)


def draw_changes(
    config: AugmentConfig,
    n_images: int,
    generator: np.random.Generator,
    *,
    from_size: tuple[int, int],
    to_size: tuple[int, int],
) -> Changes:
    """Draw the changes of `n_images` images from `from_size` to `to_size` (height, width).

    Each kind of change uses the same random numbers whether or not others are switched on. Raises CacheError if the
    sizes differ and `config.crop` is off, or if the images are smaller than the crop.
    """
    spare = [have - want for have, want in zip(from_size, to_size, strict=True)]
    if (min(spare) < 0) if config.crop else any(spare):
        wanted = f"{'crops of ' if config.crop else ''}{to_size[0]}x{to_size[1]}"
        raise CacheError(f"the cached images are {from_size[0]}x{from_size[1]}, wanted are {wanted}")
    uniform = dict(zip(_KINDS, generator.random((len(_KINDS), n_images)), strict=True))
    noise_seed = int(generator.integers(2**31))

    def happens(name: str) -> Tensor | None:
        probability = getattr(config, name)
        return torch.from_numpy(uniform[name] < probability) if probability else None

    def between(name: str, low: float, high: float) -> Tensor | None:
        values = low + (high - low) * uniform[name]
        return torch.from_numpy(values.astype(np.float32)) if low < high else None

    def around(name: str, centre: float, unit: float = 1) -> Tensor | None:
        spread = getattr(config, name) * unit
        return between(name, centre - spread, centre + spread)

    def start(name: str, spare: int) -> Tensor | None:
        return torch.from_numpy((uniform[name] * (spare + 1)).astype(np.int64)) if config.crop else None

    return Changes(
        hflip=happens("hflip"),
        vflip=happens("vflip"),
        brightness=around("brightness", 1),
        contrast=around("contrast", 1),
        saturation=around("saturation", 1),
        hue=around("hue", 0),
        rotate=around("rotate", 0, math.pi / 180),
        scale=around("scale", 1),
        top=start("top", spare[0]),
        left=start("left", spare[1]),
        blur=between("blur", 0, config.blur),
        noise=between("noise", 0, config.noise),
        blur_radius=math.ceil(3 * config.blur),
        noise_seed=noise_seed,
    )


def augment_batch(images: Tensor, masks: Tensor, changes: Changes, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Change images (B, H, W, 3) uint8 and masks (B, H, W) uint8 and return them at `size` (height, width).

    If pixels are only moved, the images are returned as (B, H, W, 3) uint8, otherwise as (B, 3, H, W) float32 from 0
    to 255. The masks are 0 and 1.
    """
    if changes.rotate is not None or changes.scale is not None:
        planes, masks = _warp(images, masks, changes, size)
    else:
        if changes.top is not None and changes.left is not None:
            images = crop(images, changes.top, changes.left, size)
            masks = crop(masks, changes.top, changes.left, size)
        for flags, axis in ((changes.hflip, 2), (changes.vflip, 1)):
            if flags is not None:
                images, masks = _flip(images, flags, axis), _flip(masks, flags, axis)
        if not changes.changes_values:
            return images, masks
        planes = as_planes(images)
    planes = jitter_color_(planes, changes)
    if changes.blur is not None:
        planes = blur(planes, changes.blur, changes.blur_radius)
    if changes.noise is not None:
        add_noise_(planes, changes.noise, changes.noise_seed)
    return planes, masks


def crop(batch: Tensor, top: Tensor, left: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a window of `size` (height, width) of each image of (B, H, W, ...), at its own `top` and `left`."""
    if batch.device.type == "cpu":
        # Copying whole rows in a loop over images is 20 times faster than the index below at 256x256.
        out = batch.new_empty((len(batch), *size, *batch.shape[3:]))
        for target, source, row, column in zip(out, batch, top.tolist(), left.tolist(), strict=True):
            target.copy_(source[row : row + size[0], column : column + size[1]])
        return out
    return crop_by_index(batch, top, left, size)


def crop_by_index(batch: Tensor, top: Tensor, left: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the same as `crop` by one index into the view of all windows: one kernel on a GPU, without a wait."""
    windows = batch.unfold(1, size[0], 1).unfold(2, size[1], 1)
    # (B, rows, columns, ..., height, width) to (B, rows, columns, height, width, ...)
    windows = windows.movedim((-2, -1), (3, 4))
    return windows[torch.arange(len(batch), device=batch.device), top, left]


def jitter_color_(planes: Tensor, changes: Changes, mean_gray: Tensor | None = None) -> Tensor:
    """Change brightness, contrast, saturation and hue of (B, 3, H, W) float32 from 0 to 255 in place, each clamped.

    The four are those of `torchvision.transforms.v2.functional` on floats, with one factor per image. `mean_gray`
    (B,) is the mean of `gray` after the change of brightness, for planes that are only part of an image.
    """
    if changes.brightness is not None:
        planes.mul_(_each(changes.brightness)).clamp_(0, 255)
    if changes.contrast is not None:
        mean = gray(planes).mean((2, 3), keepdim=True) if mean_gray is None else _each(mean_gray)
        _blend_(planes, mean, changes.contrast)
    if changes.saturation is not None:
        _blend_(planes, gray(planes), changes.saturation)
    if changes.hue is not None:
        planes = _shift_hue(planes, changes.hue)
    return planes


def blur(planes: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Return (B, 3, H, W) blurred by Gaussians of `sigma` (B,) pixels, cut off at `radius`, mirrored at borders."""
    radius = min(radius, planes.shape[2] - 1, planes.shape[3] - 1)
    offsets = torch.arange(-radius, radius + 1, device=planes.device)
    # At the smallest sigma the neighbours' weights vanish, and the image is unchanged.
    weights = torch.exp(-0.5 * (offsets / sigma.clamp_min(0.05)[:, None]) ** 2)
    weights = weights / weights.sum(1, keepdim=True)
    for axis, padding in ((2, (0, 0, radius, radius)), (3, (radius, radius, 0, 0))):
        padded = F.pad(planes, padding, mode="reflect")
        length = planes.shape[axis]
        # Sums of shifted images, because a GPU rounds convolutions to TF32.
        planes = padded.narrow(axis, radius, length) * _each(weights[:, radius])
        for distance in range(1, radius + 1):
            pair = padded.narrow(axis, radius - distance, length) + padded.narrow(axis, radius + distance, length)
            planes.addcmul_(pair, _each(weights[:, radius + distance]))
    return planes


def as_planes(images: Tensor) -> Tensor:
    """Return (B, H, W, 3) uint8 as contiguous (B, 3, H, W) float32."""
    return images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)


def _flip(batch: Tensor, flags: Tensor, axis: int) -> Tensor:
    """Mirror images along `axis` where the flag is set. Copying whole images is 4 times faster than `where`."""
    both = torch.cat((batch, batch.flip(axis)))
    choice = torch.arange(len(batch), device=batch.device) + len(batch) * flags
    return both.index_select(0, choice)


def _warp(images: Tensor, masks: Tensor, changes: Changes, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Rotate, zoom, flip and crop at once: bilinear for images, nearest for masks, mirrored beyond the border."""
    height, width = images.shape[1:3]
    columns, rows = source_positions(changes, (height, width), size, images.device)
    # grid_sample puts -1 and 1 at the outer edges.
    grid = torch.stack((columns * (2 / width) - 1, rows * (2 / height) - 1), dim=-1)
    planes = F.grid_sample(as_planes(images), grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    truth = masks.to(torch.float32).unsqueeze(1)
    truth = F.grid_sample(truth, grid, mode="nearest", padding_mode="reflection", align_corners=False)
    return planes, truth.squeeze(1).to(torch.uint8)


def source_positions(
    changes: Changes,
    from_size: tuple[int, int],
    size: tuple[int, int],
    device: torch.device,
    window: tuple[slice, slice] = (slice(None), slice(None)),
) -> tuple[Tensor, Tensor]:
    """Return the source of each output pixel: x and y, each (B, h, w), in pixels from the image's corner.

    A pixel at (x, y) from the centre of the output comes from R(angle) (x, y) / zoom from the centre of the crop.
    `window` selects rows and columns of the output. The computation is elementwise, because a GPU rounds matrix
    products to TF32.
    """
    height, width = from_size
    given = (changes.rotate, changes.scale, changes.hflip, changes.vflip, changes.left)
    one = torch.ones(next((len(value) for value in given if value is not None), 1), device=device)
    angle = torch.zeros_like(one) if changes.rotate is None else changes.rotate
    zoom = one if changes.scale is None else changes.scale
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    centre_x = one * (width / 2) if changes.left is None else changes.left + size[1] / 2
    centre_y = one * (height / 2) if changes.top is None else changes.top + size[0] / 2
    x = (torch.arange(size[1], device=device) + 0.5 - size[1] / 2)[window[1]]
    y = (torch.arange(size[0], device=device) + 0.5 - size[0] / 2)[window[0]]
    x = x * (one if changes.hflip is None else 1 - 2 * changes.hflip.float())[:, None]
    y = y * (one if changes.vflip is None else 1 - 2 * changes.vflip.float())[:, None]

    def along(first: Tensor, second: Tensor, centre: Tensor) -> Tensor:
        return (first[:, None] * x)[:, None, :] + (second[:, None] * y)[:, :, None] + centre[:, None, None]

    return along(cos, -sin, centre_x), along(sin, cos, centre_y)


def _each(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def gray(planes: Tensor) -> Tensor:
    """Return the gray (B, 1, H, W) of (B, 3, H, W) with the weights of torchvision's colour changes."""
    red, green, blue = planes.unbind(1)
    return (red * _GRAY[0]).add_(green, alpha=_GRAY[1]).add_(blue, alpha=_GRAY[2]).unsqueeze(1)


def _blend_(planes: Tensor, other: Tensor, factor: Tensor) -> None:
    """Set planes to factor x planes + (1 - factor) x other, clamped."""
    planes.mul_(_each(factor)).add_(other * _each(1 - factor)).clamp_(0, 255)


def _shift_hue(planes: Tensor, shift: Tensor) -> Tensor:
    """Return (B, 3, H, W) with the hue shifted by `shift` turns at constant value and saturation (HSV).

    The conversion from HSV is f(n) = v - v s max(0, min(k, 4 - k, 1)) with k = (n + 6 h) mod 6 and n = 5, 3, 1 for
    red, green, blue.
    """
    red, green, blue = planes.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    # 0 where the channel is the largest, else 1. lerp is exact at both and several times faster than `where`.
    not_red, not_green = (value - red).sign_(), (value - green).sign_()
    largest_green = (blue - red).add_(chroma, alpha=2)
    largest_blue = (red - green).add_(chroma, alpha=4)
    sextant = torch.lerp(green - blue, torch.lerp(largest_green, largest_blue, not_green), not_red)
    # Without colour the hue has no effect.
    sextant.div_(chroma.clamp_min(1e-6)).add_(6 * shift.view(-1, 1, 1))
    turned = torch.empty_like(planes)
    for channel, offset in enumerate((5, 3, 1)):
        k = (sextant + offset).div_(6)
        k = k.sub_(k.floor()).mul_(6)
        torch.addcmul(value, chroma, torch.minimum(k, 4 - k).clamp_(0, 1), value=-1, out=turned[:, channel])
    return turned


def add_noise_(planes: Tensor, sigma: Tensor, seed: int) -> None:
    """Add Gaussian noise of `sigma` (B,) x 255 in place, clamped. It is drawn on the device, which avoids a copy."""
    generator = torch.Generator(planes.device).manual_seed(seed)
    noise = torch.randn(planes.shape, device=planes.device, generator=generator)
    planes.addcmul_(noise, _each(255 * sigma)).clamp_(0, 255)
