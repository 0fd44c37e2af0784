"""Augment training batches. A batch of images and masks is augmented as a whole on its device.

`draw_changes` draws the random numbers for a whole epoch in advance on the CPU, so batches do not wait for them. Only
the pixel noise is drawn on the device. If only flips and crops are used, images stay (B, H, W, 3) uint8. All other
changes are computed on (B, 3, H, W) float32, because elementwise operations are faster with a long inner dimension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hpsearch.config.data import GRAY_WEIGHTS, AugmentConfig
from hpsearch.errors import CacheError

_KINDS = (
    *("hflip", "vflip", "brightness", "contrast", "saturation", "hue"),
    *("rotate", "scale", "top", "left", "blur", "noise"),
)
# BT.601 weights, rounded as in torchvision, whose colour transforms are the reference.
_GRAY = (0.2989, 0.587, 0.114)


@dataclass(frozen=True)
class Changes:
    """Augmentation parameters for n images.

    hflip, vflip            bool, whether the image is flipped left to right (hflip) or top to bottom (vflip)
    brightness              factor applied to all channels
    contrast                factor applied to the difference from the image's mean gray
    saturation              factor applied to the difference from each pixel's gray
    hue                     shift of the hue as a fraction of the colour circle
    rotate                  angle in radians, counter-clockwise as displayed
    scale                   zoom factor; values above 1 enlarge the image
    top, left               first row and column of the crop, int64, on the CPU
    blur                    standard deviation in pixels
    noise                   standard deviation, relative to pixel values from 0 to 1
    """

    values: dict[str, Tensor]
    """Maps the name of each parameter to a tensor (n,). Parameters of disabled changes are absent."""
    blur_radius: int = 0
    """Radius of the blur kernel in pixels: three standard deviations of the strongest blur in the settings."""
    noise_seed: int = 0
    """Seed of the noise. `changes[a:b]` adds `a` to it, so that each batch gets different noise."""

    def __getitem__(self, rows: slice) -> Changes:
        """Return the parameters for a slice of the images."""
        values = {name: value[rows] for name, value in self.values.items()}
        return replace(self, values=values, noise_seed=self.noise_seed + (rows.start or 0))


def draw_changes(
    config: AugmentConfig,
    n_images: int,
    generator: np.random.Generator,
    *,
    from_size: tuple[int, int],
    to_size: tuple[int, int],
    device: torch.device | str = "cpu",
) -> Changes:
    """Draw the augmentation parameters for `n_images` images and move all but `top` and `left` to `device`.

    The images have the size `from_size` (height, width) before augmentation and `to_size` after it. Switching one
    kind of change on or off does not affect the random numbers of the others.

    Raises CacheError if the sizes differ and `config.crop` is off, or if the images are smaller than the crop.
    """
    spare = [have - want for have, want in zip(from_size, to_size, strict=True)]
    if (min(spare) < 0) if config.crop else any(spare):
        wanted = f"{'crops of ' if config.crop else ''}{to_size[0]}x{to_size[1]}"
        raise CacheError(f"the cached images are {from_size[0]}x{from_size[1]}, expected {wanted}")
    uniform = dict(zip(_KINDS, generator.random((len(_KINDS), n_images)), strict=True))
    noise_seed = int(generator.integers(2**31))
    factors = ("brightness", "contrast", "saturation", "scale")
    ranges = {name: (1 - getattr(config, name), 1 + getattr(config, name)) for name in factors}
    angle = math.radians(config.rotate)
    ranges |= {"hue": (-config.hue, config.hue), "rotate": (-angle, angle)}
    ranges |= {"blur": (0, config.blur), "noise": (0, config.noise)}
    values = {
        name: (low + (high - low) * uniform[name]).astype(np.float32)
        for name, (low, high) in ranges.items()
        if low < high
    }
    values |= {name: uniform[name] < share for name in ("hflip", "vflip") if (share := getattr(config, name))}
    if config.crop:
        starts = zip(("top", "left"), spare, strict=True)
        values |= {name: (uniform[name] * (n + 1)).astype(np.int64) for name, n in starts}
    tensors = {name: torch.from_numpy(value) for name, value in values.items()}
    tensors |= {k: v.to(device, non_blocking=True) for k, v in tensors.items() if k not in ("top", "left")}
    return Changes(tensors, blur_radius=math.ceil(3 * config.blur), noise_seed=noise_seed)


def augment_batch(images: Tensor, masks: Tensor, changes: Changes, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Augment images (B, H, W, 3) uint8 and masks (B, H, W) uint8 and return them at `size` (height, width).

    If `changes` has only flips and crops, the images are returned as (B, H, W, 3) uint8. Otherwise they are returned
    as (B, 3, H, W) float32 with values from 0 to 255. The masks are uint8 with values 0 and 1.
    """
    values = changes.values
    if values.keys() & {"rotate", "scale"}:
        planes, masks = _warp(images, masks, values, size)
    else:
        if "top" in values:
            images, masks = (crop(batch, values["top"], values["left"], size) for batch in (images, masks))
        for name, axis in (("hflip", 2), ("vflip", 1)):
            if name in values:
                images, masks = (_flip(batch, values[name], axis) for batch in (images, masks))
        if not values.keys() & {"brightness", "contrast", "saturation", "hue", "blur", "noise"}:
            return images, masks
        planes = _as_planes(images)
    planes = jitter_color_(planes, values)
    if "blur" in values:
        planes = blur(planes, values["blur"], changes.blur_radius)
    if "noise" in values:
        _add_noise_(planes, values["noise"], changes.noise_seed)
    return planes, masks


def crop(batch: Tensor, top: Tensor, left: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop each image of `batch` (B, H, W, ...) to `size`. `top` and `left` (B,) are the corners of the crops."""
    # On a CPU, slicing image by image is 20 times faster than one indexing operation on the batch.
    corners = zip(batch, top.tolist(), left.tolist(), strict=True)
    return torch.stack([image[row : row + size[0], column : column + size[1]] for image, row, column in corners])


def jitter_color_(planes: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    """Adjust brightness, contrast, saturation and hue of `planes` (B, 3, H, W) float32 with values from 0 to 255.

    `values` maps the names of the changes to one factor (B,) per image (see `Changes`). Apart from that, the
    operations are the same as in `torchvision.transforms.v2.functional` for floats. Values are clamped after each
    step. `planes` is modified in place. Use the returned tensor, because the hue shift returns a new one.
    """
    if "brightness" in values:
        planes.mul_(_each(values["brightness"])).clamp_(0, 255)
    if "contrast" in values:
        _blend_(planes, to_gray(planes, _GRAY).mean((2, 3), keepdim=True), values["contrast"])
    if "saturation" in values:
        _blend_(planes, to_gray(planes, _GRAY), values["saturation"])
    return _shift_hue(planes, values["hue"]) if "hue" in values else planes


def to_gray(images: Tensor, weights: tuple[float, float, float] = GRAY_WEIGHTS) -> Tensor:
    """Convert images (B, H, W, 3) uint8 or (B, 3, H, W) float32 to grayscale (B, 1, H, W) float32.

    `weights` are those of red, green and blue.
    """
    red, green, blue = images.unbind(-1 if images.dtype == torch.uint8 else 1)
    # Compute elementwise, because a matrix product is rounded to bf16 under autocast and to TF32 on a GPU.
    gray = red.to(torch.float32).mul(weights[0])
    return gray.add_(green, alpha=weights[1]).add_(blue, alpha=weights[2]).unsqueeze(1)


def blur(planes: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur `planes` (B, 3, H, W) with Gaussian kernels of `sigma` (B,) pixels, one per image.

    The kernels are truncated at `radius` pixels. Images are reflected at the borders.
    """
    radius = min(radius, planes.shape[2] - 1, planes.shape[3] - 1)
    offsets = torch.arange(-radius, radius + 1, device=planes.device)
    # Avoid a division by 0. At a sigma of 0.05 the neighbours' weights round to 0, so the image is unchanged.
    weights = torch.exp(-0.5 * (offsets / sigma.clamp_min(0.05)[:, None]) ** 2)
    weights = weights / weights.sum(1, keepdim=True)
    for axis, padding in ((2, (0, 0, radius, radius)), (3, (radius, radius, 0, 0))):
        padded = F.pad(planes, padding, mode="reflect")
        length = planes.shape[axis]
        # Sum shifted images instead of using a convolution, which a GPU rounds to TF32.
        planes = padded.narrow(axis, radius, length) * _each(weights[:, radius])
        for distance in range(1, radius + 1):
            pair = padded.narrow(axis, radius - distance, length) + padded.narrow(axis, radius + distance, length)
            planes.addcmul_(pair, _each(weights[:, radius + distance]))
    return planes


def _as_planes(images: Tensor) -> Tensor:
    """Convert (B, H, W, 3) uint8 to contiguous (B, 3, H, W) float32."""
    return images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)


def _flip(batch: Tensor, flags: Tensor, axis: int) -> Tensor:
    """Flip each image whose entry in `flags` (B,) is True along `axis`."""
    # Selecting whole images is 4 times faster than `torch.where`.
    both = torch.cat((batch, batch.flip(axis)))
    choice = torch.arange(len(batch), device=batch.device) + len(batch) * flags
    return both.index_select(0, choice)


def _warp(
    images: Tensor, masks: Tensor, values: Mapping[str, Tensor], size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Rotate, zoom, flip and crop images and masks in one resampling step.

    Images are sampled bilinearly, masks by nearest neighbour. Both are reflected beyond the border. An output pixel
    at offset (x, y) from the centre of the output is sampled at offset R(angle) (x, y) / zoom from the centre of the
    crop, where R(angle) is the rotation matrix. Positions are computed elementwise, because a GPU rounds matrix
    products to TF32.
    """
    height, width = images.shape[1:3]
    device = images.device
    one = torch.ones(len(images), device=device)
    angle, zoom = values.get("rotate", torch.zeros_like(one)), values.get("scale", one)
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    centre_x, centre_y = one * (width / 2), one * (height / 2)
    if "top" in values:
        left, top = (values[name].to(device, non_blocking=True) for name in ("left", "top"))
        centre_x, centre_y = left + size[1] / 2, top + size[0] / 2
    x = torch.arange(size[1], device=device) + 0.5 - size[1] / 2
    y = torch.arange(size[0], device=device) + 0.5 - size[0] / 2
    x = x * (1 - 2 * values["hflip"].float() if "hflip" in values else one)[:, None]
    y = y * (1 - 2 * values["vflip"].float() if "vflip" in values else one)[:, None]

    def along(first: Tensor, second: Tensor, centre: Tensor) -> Tensor:
        return (first[:, None] * x)[:, None, :] + (second[:, None] * y)[:, :, None] + centre[:, None, None]

    columns, rows = along(cos, -sin, centre_x), along(sin, cos, centre_y)
    # With align_corners=False, -1 and 1 are the outer edges of the image.
    grid = torch.stack((columns * (2 / width) - 1, rows * (2 / height) - 1), dim=-1)
    planes = F.grid_sample(_as_planes(images), grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    truth = masks.to(torch.float32).unsqueeze(1)
    truth = F.grid_sample(truth, grid, mode="nearest", padding_mode="reflection", align_corners=False)
    return planes, truth.squeeze(1).to(torch.uint8)


def _each(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _blend_(planes: Tensor, other: Tensor, factor: Tensor) -> None:
    """Set `planes` to factor * planes + (1 - factor) * other in place, clamped to 0..255."""
    planes.mul_(_each(factor)).add_(other * _each(1 - factor)).clamp_(0, 255)


def _shift_hue(planes: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue of `planes` (B, 3, H, W) by `shift` (B,) turns. Value and saturation (HSV) stay the same.

    HSV is converted to RGB by f(n) = v - v s max(0, min(k, 4 - k, 1)) with k = (n + 6 h) mod 6, where n is 5 for red,
    3 for green and 1 for blue.
    """
    red, green, blue = planes.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    # 0 where the channel is the largest, else 1. With these weights, lerp is exact and much faster than `where`.
    not_red, not_green = (value - red).sign_(), (value - green).sign_()
    largest_green = (blue - red).add_(chroma, alpha=2)
    largest_blue = (red - green).add_(chroma, alpha=4)
    sextant = torch.lerp(green - blue, torch.lerp(largest_green, largest_blue, not_green), not_red)
    # Avoid 0 / 0 for gray pixels. Their hue has no effect, because their chroma is 0.
    sextant.div_(chroma.clamp_min(1e-6)).add_(6 * shift.view(-1, 1, 1))
    turned = torch.empty_like(planes)
    for channel, offset in enumerate((5, 3, 1)):
        k = (sextant + offset).div_(6)
        k = k.sub_(k.floor()).mul_(6)
        torch.addcmul(value, chroma, torch.minimum(k, 4 - k).clamp_(0, 1), value=-1, out=turned[:, channel])
    return turned


def _add_noise_(planes: Tensor, sigma: Tensor, seed: int) -> None:
    """Add Gaussian noise with standard deviation 255 * `sigma` (B,) to `planes` in place, and clamp them to 0..255.

    The noise is drawn on the device, which avoids a copy.
    """
    generator = torch.Generator(planes.device).manual_seed(seed)
    noise = torch.randn(planes.shape, device=planes.device, generator=generator)
    planes.addcmul_(noise, _each(255 * sigma)).clamp_(0, 255)
