"""Every layer's output shape, parameters and FLOPs by arithmetic; why a network cannot exist at a size."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from hpsearch.config.model import UNetConfig

Kind = Literal["convolution", "pool", "up", "head", "interpolation"]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer as the report counts: normalisation and ReLU go with their convolution, joining with the next."""

    name: str
    """Its module in `UNet`, as in the state dict."""
    kind: Kind
    stage: int
    """Down-samplings above it; 0 is the resolution of the input."""
    in_channels: int
    channels: int
    height: int
    width: int
    n_parameters: int
    flops: int
    """Of the forward pass of one image, a multiply-add counted as 2; bias, normalisation and ReLU not counted."""
    in_height: int
    in_width: int


def layers(config: UNetConfig, in_channels: int, height: int, width: int) -> list[Layer]:
    """All layers in the order of the forward pass, for one image of `height` x `width`.

    27 for depth 4 and stacking 2, and the interpolation as the 28th where the logits are not of the image's size.
    ValueError, with the sentence of `why_impossible`, if a feature map vanishes.
    """
    found = list(_walk(config, in_channels, height, width))
    if reason := _vanished(config, found):
        raise ValueError(reason)
    return found


def why_impossible(
    config: UNetConfig, in_channels: int, height: int, width: int, *, batch_size: int | None = None
) -> str | None:
    """One sentence saying why this network cannot be trained at this size, or None if it can.

    `batch_size` matters to batch normalisation alone: without it, batches of one image are not looked for.
    """
    found = list(_walk(config, in_channels, height, width))
    if reason := _vanished(config, found):
        smallest = _smallest_side(config, in_channels, batch_size)
        return f"{reason}; images must be at least {smallest}x{smallest}"
    for layer in found:
        if layer.kind == "convolution" and _values_per_statistic(config, layer, batch_size) == 1:
            return (
                f"{layer.name} has a map of {layer.height}x{layer.width}, of which {config.norm} normalisation "
                "cannot take a variance: choose a smaller depth, a larger image"
                + (" or a larger batch" if config.norm != "instance" else "")
            )
    return None


def n_parameters(config: UNetConfig, in_channels: int) -> int:
    """Learned numbers of the whole network; they do not depend on the size of the image."""
    side = 2**config.depth
    return sum(layer.n_parameters for layer in _walk(replace(config, padding="same"), in_channels, side, side))


def forward_flops(config: UNetConfig, in_channels: int, height: int, width: int) -> int:
    """FLOPs of the forward pass of one image, a multiply-add counted as 2."""
    return sum(layer.flops for layer in layers(config, in_channels, height, width))


def training_flops(config: UNetConfig, in_channels: int, height: int, width: int) -> int:
    """FLOPs of forward and backward pass of one image.

    Each layer costs three times its forward pass (output, gradient of the input, gradient of the weight), except that
    nobody needs the gradient of the image. Base 32 with `valid`, RGB, 572x572: 226 GFLOP.
    """
    found = layers(config, in_channels, height, width)
    return 3 * sum(layer.flops for layer in found) - found[0].flops


def n_layers(config: UNetConfig, *, interpolation: bool = True) -> int:
    """The report's count: convolutions, poolings, transposed convolutions, head: 27; with the interpolation 28."""
    return config.stacking * (2 * config.depth + 1) + 2 * config.depth + 1 + interpolation


def n_objects(config: UNetConfig) -> int:
    """The report's count of objects: a stacked convolution, `depth` downs, `depth` ups and the head: 10."""
    return 1 + config.depth + config.depth + 1


def skip_offset(config: UNetConfig, stage: int) -> int:
    """Where the map that is up-sampled to `stage` begins on that stage's skip: pixels from the top and from the left.

    0 for `same`; for `valid` what the convolutions below took away, which for even sizes is the paper's centre crop.
    """
    if config.padding == "same":
        return 0
    margin = config.stacking * (config.kernel_size // 2)
    lost = margin
    for _ in range(config.depth - stage - 1):
        lost = 2 * lost + 2 * margin
    return 2 * lost


def output_margin(config: UNetConfig) -> int:
    """Pixels between an image's upper left corner and that of what the network computes of it: 92 for the paper's."""
    if config.padding == "same":
        return 0
    return skip_offset(config, 0) + 2 * config.stacking * (config.kernel_size // 2)


def output_size(config: UNetConfig, in_channels: int, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of what the network computes of an image of `size`: (388, 388) of (572, 572)."""
    head = next(layer for layer in layers(config, in_channels, *size) if layer.kind == "head")
    return head.height, head.width


def norm_groups(channels: int) -> int:
    """Groups of a group normalisation: as many as divide `channels`, at most 32, of at least 4 channels; else 1."""
    return max((n for n in range(1, min(32, channels // 4) + 1) if channels % n == 0), default=1)


def _walk(config: UNetConfig, in_channels: int, height: int, width: int) -> Iterator[Layer]:
    """The layers one by one, ending after the first whose map has vanished."""
    lost = 0 if config.padding == "same" else config.kernel_size - 1
    channels, h, w = in_channels, height, width

    def layer(name: str, kind: Kind, stage: int, out: int, out_h: int, out_w: int, weights: int, flops: int) -> Layer:
        return Layer(
            name=name, kind=kind, stage=stage, in_channels=channels, channels=out, height=out_h, width=out_w,
            n_parameters=weights, flops=flops, in_height=h, in_width=w,
        )  # fmt: skip

    def stack(prefix: str, stage: int) -> Iterator[Layer]:
        nonlocal channels, h, w
        out = config.base_channels * 2**stage
        for index in range(config.stacking):
            taps = config.kernel_size**2 * channels * out
            out_h, out_w = h - lost, w - lost
            weights = taps + _bias_and_norm(config, out)
            yield layer(
                f"{prefix}.{index}", "convolution", stage, out, out_h, out_w, weights, 2 * taps * out_h * out_w
            )
            channels, h, w = out, out_h, out_w

    skips = []
    for stage in range(config.depth + 1):
        if stage > 0:
            skips.append((h, w))
            # A single row or column is not halved: rounding up would only repeat it in every stage below.
            half_h, half_w = (0 if h == 1 else (h + 1) // 2), (0 if w == 1 else (w + 1) // 2)
            pool = layer(f"encoder.{stage}.pool", "pool", stage, channels, half_h, half_w, 0, 0)
            yield pool
            if _is_empty(pool):
                return
            h, w = half_h, half_w
        for convolution in stack("encoder.0" if stage == 0 else f"encoder.{stage}.stack", stage):
            yield convolution
            if _is_empty(convolution):
                return
    for index, stage in enumerate(reversed(range(config.depth))):
        out = channels // 2
        taps = 4 * channels * out
        up = layer(f"decoder.{index}.up", "up", stage, out, 2 * h, 2 * w, taps + out, 2 * taps * h * w)
        yield up
        skip_h, skip_w = skips.pop()
        offset = skip_offset(config, stage)
        channels, h, w = 2 * out, min(2 * h, skip_h - offset), min(2 * w, skip_w - offset)
        for convolution in stack(f"decoder.{index}.stack", stage):
            yield convolution
            if _is_empty(convolution):
                return
    yield layer("head", "head", 0, 1, h, w, channels + 1, 2 * channels * h * w)
    channels = 1
    if (h, w) != (height, width):
        yield layer("interpolation", "interpolation", 0, 1, height, width, 0, 0)


def _is_empty(layer: Layer) -> bool:
    return layer.height < 1 or layer.width < 1


def _vanished(config: UNetConfig, found: list[Layer]) -> str | None:
    layer = found[-1]
    if not _is_empty(layer):
        return None
    size = f"{layer.in_height}x{layer.in_width}"
    if layer.kind == "pool":
        return f"{layer.name} cannot halve a map of {size} any further"
    side = config.kernel_size
    return f"{layer.name} cannot take a {side}x{side} convolution without padding of a map of {size}"


def _smallest_side(config: UNetConfig, in_channels: int, batch_size: int | None) -> int:
    """Side of the smallest square image that the network can be trained on."""

    def can_train(side: int) -> bool:
        found = list(_walk(config, in_channels, side, side))
        return not _is_empty(found[-1]) and all(
            _values_per_statistic(config, layer, batch_size) != 1 for layer in found if layer.kind == "convolution"
        )

    enough = 1
    while not can_train(enough):
        enough *= 2
    return bisect.bisect_left(range(enough), True, key=can_train)


def _values_per_statistic(config: UNetConfig, layer: Layer, batch_size: int | None) -> int:
    """Numbers that a mean and variance of the normalisation are taken over; 0 if there is none or it is unknown."""
    pixels = layer.height * layer.width
    if config.norm == "batch":
        return 0 if batch_size is None else batch_size * pixels
    if config.norm == "group":
        return layer.channels // norm_groups(layer.channels) * pixels
    return pixels if config.norm == "instance" else 0


def _bias_and_norm(config: UNetConfig, channels: int) -> int:
    return {"none": channels, "batch": 2 * channels, "group": 3 * channels, "instance": 2 * channels}[config.norm]
