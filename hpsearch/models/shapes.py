"""Calculation of the shapes, parameters and FLOPs of all UNet layers, and of the image sizes that are possible."""

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from hpsearch.config.model import UNetConfig

Kind = Literal["convolution", "pool", "up", "head", "interpolation"]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer of the UNet, counted as in the source report (see README.md).

    Normalisation and ReLU belong to their convolution. A concatenation belongs to the next convolution.
    """

    name: str
    """Name of the layer's module in `UNet`, as in the state dict."""
    kind: Kind
    in_channels: int
    channels: int
    height: int
    width: int
    n_taps: int
    """Number of weights of the convolution, without bias and normalisation."""
    n_parameters: int
    in_height: int
    in_width: int

    @property
    def n_inputs(self) -> int:
        """Number of input elements for one image."""
        return self.in_channels * self.in_height * self.in_width

    @property
    def n_outputs(self) -> int:
        """Number of output elements for one image."""
        return self.channels * self.height * self.width

    @property
    def is_empty(self) -> bool:
        """Whether the output has no pixels."""
        return self.height < 1 or self.width < 1

    @property
    def flops(self) -> int:
        """FLOPs for one image. A multiply-add counts as 2; bias, normalisation and ReLU are not counted."""
        n_pixels = self.in_height * self.in_width if self.kind == "up" else self.height * self.width
        return 2 * self.n_taps * n_pixels


def layers(config: UNetConfig, in_channels: int, height: int, width: int) -> list[Layer]:
    """Return all layers in the order of the forward pass, for one image of `height` x `width`.

    A network of depth 4 and stacking 2 has 27 layers. If the logits are smaller than the image, the interpolation is
    the 28th layer. Raises ValueError with the reason of `why_impossible` if the output of a layer has no pixels.
    """
    found = list(_all_layers(config, in_channels, height, width))
    if any(layer.is_empty for layer in found):
        raise ValueError(why_impossible(config, in_channels, height, width))
    return found


def why_impossible(
    config: UNetConfig, in_channels: int, height: int, width: int, *, batch_size: int | None = None
) -> str | None:
    """Return the reason why the network cannot be trained at this size, as one sentence, or None if it can.

    `batch_size` matters only for batch normalisation. If it is None, batches are assumed to have several images.
    """
    layer = _first_impossible(config, in_channels, height, width, batch_size)
    if layer is None:
        return None
    if layer.is_empty:
        smallest = bisect.bisect_left(
            range(1, 2**20), True, key=lambda side: not _first_impossible(config, in_channels, side, side, batch_size)
        )
        action, size = "halve", f"{layer.in_height}x{layer.in_width}"
        if layer.kind != "pool":
            action = f"apply a {config.kernel_size}x{config.kernel_size} convolution without padding to"
        return f"{layer.name} cannot {action} a map of {size}; images must be at least {smallest + 1}x{smallest + 1}"
    larger = "a larger image" if config.norm == "instance" else "a larger image or a larger batch"
    return (
        f"{layer.name} has a map of {layer.height}x{layer.width}, too small for {config.norm} normalisation "
        f"to compute a variance: choose a smaller depth, {larger}"
    )


def n_parameters(config: UNetConfig, in_channels: int) -> int:
    """Return the number of learned parameters, which does not depend on the image size."""
    side = 2**config.depth
    return sum(layer.n_parameters for layer in _all_layers(replace(config, padding="same"), in_channels, side, side))


def training_flops(config: UNetConfig, in_channels: int, height: int, width: int) -> int:
    """Return the FLOPs of the forward and backward pass of one image. A multiply-add counts as 2.

    Each layer costs three times its forward pass (output, gradient of the input, gradient of the weight). The first
    layer costs only twice its forward pass, because the gradient of the image is not needed. For 32 base channels,
    `valid` padding and RGB images of 572x572, the total is 226 GFLOP.
    """
    found = layers(config, in_channels, height, width)
    return 3 * sum(layer.flops for layer in found) - found[0].flops


def skip_offset(config: UNetConfig, stage: int) -> int:
    """Return how many pixels are cropped from the top and from the left of the skip connection of `stage`.

    With `same` padding it is 0. With `valid` padding it is the width of the border that the convolutions of the
    stages below have removed. For even sizes this gives the centre crop of Ronneberger et al. (2015).
    """
    lost = _border(config)
    for _ in range(config.depth - stage - 1):
        lost = 2 * lost + 2 * _border(config)
    return 2 * lost


def output_margin(config: UNetConfig) -> int:
    """Return the distance in pixels from the top and left edges of the image to the first logit.

    It is 92 for the network of Ronneberger et al. (2015).
    """
    return skip_offset(config, 0) + 2 * _border(config)


def output_size(config: UNetConfig, in_channels: int, size: tuple[int, int]) -> tuple[int, int]:
    """Return the height and width of the logits for an image of `size`, before interpolation.

    For the network of Ronneberger et al. (2015), they are 388x388 for images of 572x572.
    """
    head = next(layer for layer in layers(config, in_channels, *size) if layer.kind == "head")
    return head.height, head.width


def norm_groups(channels: int) -> int:
    """Return the number of groups for group normalisation.

    It is the largest divisor of `channels` that is at most 32 and leaves at least 4 channels per group, or 1 if there
    is none.
    """
    return max((n for n in range(1, min(32, channels // 4) + 1) if channels % n == 0), default=1)


def _first_impossible(
    config: UNetConfig, in_channels: int, height: int, width: int, batch_size: int | None
) -> Layer | None:
    """Return the first layer whose output has no pixels, else the first that cannot be normalised, else None."""
    found = list(_all_layers(config, in_channels, height, width))
    empty = [layer for layer in found if layer.is_empty]
    return next(iter(empty or [each for each in found if _n_per_statistic(config, each, batch_size) == 1]), None)


def _border(config: UNetConfig) -> int:
    """Return how many pixels a stacked convolution removes at each edge of its input."""
    return 0 if config.padding == "same" else config.stacking * (config.kernel_size // 2)


def _all_layers(config: UNetConfig, in_channels: int, height: int, width: int) -> Iterator[Layer]:
    lost = 0 if config.padding == "same" else config.kernel_size - 1
    channels, h, w = in_channels, height, width
    # Number of parameters per channel: the bias of the convolution, and the weight and bias of its normalisation.
    n_vectors = {"none": 1, "batch": 2, "group": 3, "instance": 2}[config.norm]

    def layer(name: str, kind: Kind, out: int, size: tuple[int, int], taps: int = 0, rest: int = 0) -> Layer:
        return Layer(
            name=name, kind=kind, in_channels=channels, channels=out, height=size[0], width=size[1],
            n_taps=taps, n_parameters=taps + rest, in_height=h, in_width=w,
        )  # fmt: skip

    def stack(prefix: str, stage: int) -> Iterator[Layer]:
        nonlocal channels, h, w
        out = config.base_channels * 2**stage
        for index in range(config.stacking):
            taps = config.kernel_size**2 * channels * out
            size = h - lost, w - lost
            yield layer(f"{prefix}.{index}", "convolution", out, size, taps, n_vectors * out)
            channels, h, w = out, *size

    skips = []
    yield from stack("encoder.0", 0)
    for stage in range(1, config.depth + 1):
        skips.append((h, w))
        # A single row or column cannot be halved: rounding up would only repeat it in every stage below.
        half = (0 if h == 1 else (h + 1) // 2), (0 if w == 1 else (w + 1) // 2)
        yield layer(f"encoder.{stage}.pool", "pool", channels, half)
        h, w = half
        yield from stack(f"encoder.{stage}.stack", stage)
    for index, stage in enumerate(reversed(range(config.depth))):
        out = channels // 2
        yield layer(f"decoder.{index}.up", "up", out, (2 * h, 2 * w), 4 * channels * out, out)
        skip_h, skip_w = skips.pop()
        offset = skip_offset(config, stage)
        channels, h, w = 2 * out, min(2 * h, skip_h - offset), min(2 * w, skip_w - offset)
        yield from stack(f"decoder.{index}.stack", stage)
    yield layer("head", "head", 1, (h, w), channels, 1)
    channels = 1
    if (h, w) != (height, width):
        yield layer("interpolation", "interpolation", 1, (height, width))


def _n_per_statistic(config: UNetConfig, layer: Layer, batch_size: int | None) -> int:
    """Return the number of elements that share a mean and variance.

    It is 0 for a layer without normalisation, and for batch normalisation if the batch size is not known.
    """
    per_group = layer.channels // norm_groups(layer.channels)
    n_maps = {"none": 0, "batch": batch_size or 0, "group": per_group, "instance": 1}[config.norm]
    return n_maps * layer.height * layer.width if layer.kind == "convolution" else 0
