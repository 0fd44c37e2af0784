"""The UNet, built from four parts (stacked convolution, down, up, 1x1 head), and its initial weights."""

import itertools
import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpsearch.config.model import UNetConfig
from hpsearch.models.norms import ImageNorm, make_norm
from hpsearch.models.shapes import skip_offset


class UNet(nn.Module):
    """UNet of Ronneberger et al. (2015) for binary masks.

    The forward pass maps images (B, in_channels, H, W) to logits (B, 1, H, W). H and W may have any value for which
    `shapes.why_impossible` returns None. The parts are `encoder` (a stacked convolution, then `depth` downs),
    `decoder` (`depth` ups) and `head`: 10 objects for depth 4.

    Pooling rounds odd sizes up: pixel i of a stage covers pixels 2i and 2i + 1 of the stage above, and the last one
    may cover a single pixel. Up-sampled maps are then cut to the size of the skip connection. With `same` padding
    every stage stays on the grid of the input and the logits need no interpolation. With `valid` padding the logits
    cover the centre only (572 -> 388), and are stretched to H x W, as in the adaptive UNet of the report. If
    `margin` is above 0, they are not stretched (B, 1, h, w) and lie `margin` pixels from the border of the image,
    as in the paper.
    """

    margin = 0

    def __init__(self, config: UNetConfig, in_channels: int, *, seed: int = 0) -> None:
        super().__init__()
        self.input_norm = ImageNorm() if config.input_norm == "image" else nn.Identity()
        channels = [config.base_channels * 2**stage for stage in range(config.depth + 1)]
        # The constructors draw from the global generator; `initialize_` replaces the weights by those of the seed.
        with torch.random.fork_rng(devices=[]):
            self.encoder = nn.ModuleList(
                [StackedConvolution(config, in_channels, channels[0])]
                + [Down(config, above, below) for above, below in itertools.pairwise(channels)]
            )
            self.decoder = nn.ModuleList(
                Up(config, channels[stage + 1], channels[stage], offset=skip_offset(config, stage))
                for stage in reversed(range(config.depth))
            )
            self.head = nn.Conv2d(channels[0], 1, kernel_size=1)
        initialize_(self, config.init, seed=seed)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, 1, H, W), or those of the centre (B, 1, h, w) if the network has a margin.

        The report interpolates the last feature maps and then applies the 1x1 convolution. Both are linear and the
        weights of the interpolation add up to 1, so they commute. Here the single map of logits is interpolated,
        which is the same function and saves base_channels - 1 maps of H x W.
        """
        skips = []
        x = self.input_norm(images)
        for part in self.encoder:
            x = part(x)
            skips.append(x)
        skips.pop()
        for part in self.decoder:
            x = part(x, skips.pop())
        logits: Tensor = self.head(x)
        size = images.shape[-2:]
        if self.margin or logits.shape[-2:] == size:
            return logits
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


class StackedConvolution(nn.Sequential):
    """Sequence of `stacking` convolution blocks: (B, in_channels, H, W) to (B, out_channels, H', W')."""

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int) -> None:
        blocks = [ConvolutionBlock(config, in_channels, out_channels)]
        blocks += [ConvolutionBlock(config, out_channels, out_channels) for _ in range(config.stacking - 1)]
        super().__init__(*blocks)


class ConvolutionBlock(nn.Module):
    """Convolution, normalisation, ReLU."""

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            config.kernel_size,
            padding=config.kernel_size // 2 if config.padding == "same" else 0,
            # Batch and instance normalisation subtract the mean of each channel, and with it any bias.
            bias=config.norm not in ("batch", "instance"),
        )
        self.norm = make_norm(config, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        # In place, since neither the convolution nor the normalisation needs its output for its gradient.
        return F.relu_(self.norm(self.conv(x)))


class Down(nn.Module):
    """Halve the resolution by max-pooling, rounding up, then apply a stacked convolution."""

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.stack = StackedConvolution(config, in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.stack(self.pool(x))  # type: ignore[no-any-return]


class Up(nn.Module):
    """Double the resolution by a transposed convolution, concatenate the skip, then a stacked convolution."""

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int, *, offset: int) -> None:
        super().__init__()
        self.up = UpSampling(in_channels, out_channels, kernel_size=2, stride=2)
        self.stack = StackedConvolution(config, 2 * out_channels, out_channels)
        self.offset = offset

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.up(x)
        height = min(x.shape[-2], skip.shape[-2] - self.offset)
        width = min(x.shape[-1], skip.shape[-1] - self.offset)
        skip = skip[..., self.offset : self.offset + height, self.offset : self.offset + width]
        x = torch.cat((skip, x[..., :height, :width]), dim=1)
        return self.stack(x)  # type: ignore[no-any-return]


class UpSampling(nn.ConvTranspose2d):
    """Transposed convolution of kernel 2 and stride 2 as a matrix product: (B, C, H, W) to (B, C', 2H, 2W).

    The taps of two input pixels never overlap. Each input pixel is therefore multiplied by one matrix (C, 2 * 2 * C')
    and the result is rearranged. On the CPU in bf16 this takes about half the time of torch's transposed convolution.
    """

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        assert self.bias is not None
        batch, channels, height, width = x.shape
        # In channels_last neither of these two lines copies the maps.
        taps = self.weight.permute(0, 2, 3, 1).reshape(channels, -1)
        x = F.linear(x.permute(0, 2, 3, 1), taps.t(), self.bias.repeat(4))
        x = x.view(batch, height, width, 2, 2, self.out_channels).transpose(2, 3)
        return x.reshape(batch, 2 * height, 2 * width, self.out_channels).permute(0, 3, 1, 2)


def initialize_(model: nn.Module, init: Literal["xavier", "torch"], *, seed: int) -> None:
    """Fill every weight of `model` in place with random numbers of `seed`, without a global generator.

    `xavier`: convolutions by the uniform rule of Glorot and Bengio with zero bias, transposed convolutions as
    interpolation (`interpolation_weight`). `torch`: the rule of torch's constructors for both. Normalisation layers
    start with weight 1 and bias 0. Weights are drawn on the CPU, so a seed gives the same bytes on every device. A
    model on the `meta` device is left unchanged.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.InstanceNorm2d):
            module.reset_parameters()
        if not isinstance(module, nn.Conv2d | nn.ConvTranspose2d) or module.weight.is_meta:
            continue
        weight, bias = torch.empty(module.weight.shape), torch.empty(module.out_channels)
        # For torch the fan is dimension 1 times the kernel; for a transposed convolution that is its output channels.
        bound = 1 / math.sqrt(weight[0].numel())
        for values in (weight, bias):
            values.uniform_(-bound, bound, generator=generator)
        if init == "xavier":
            bias.zero_()
            if isinstance(module, nn.ConvTranspose2d):
                sizes = module.in_channels, module.out_channels, module.kernel_size[0], module.stride[0]
                weight = interpolation_weight(*sizes)
            else:
                nn.init.xavier_uniform_(weight, generator=generator)
        with torch.no_grad():
            module.weight.copy_(weight)
            if module.bias is not None:
                module.bias.copy_(bias)


def interpolation_weight(in_channels: int, out_channels: int, kernel_size: int, stride: int) -> Tensor:
    """Return the weight with which a transposed convolution interpolates.

    Its shape is (in_channels, out_channels, kernel_size, kernel_size), float32.
    The kernel is the triangle of bilinear interpolation, cut to `kernel_size` and scaled so that a constant map
    keeps its value. With kernel 4, stride 2 and padding 1 it equals `F.interpolate(mode="bilinear")`. With kernel 2
    and stride 2 each output pixel sees one input pixel and repeats it (nearest neighbour). Each output channel is
    the mean of every out_channels-th input channel (o, o + out_channels, ...). `out_channels` divides `in_channels`,
    and `stride` divides `kernel_size`.
    """
    centre = (kernel_size - 1) / 2
    triangle = (1 - (torch.arange(kernel_size) - centre).abs() / stride).clamp(min=0)
    # An output pixel receives every stride-th tap, and the taps of each of the `stride` phases must add up to 1.
    triangle = triangle / triangle.view(-1, stride).sum(0).repeat(kernel_size // stride)
    share = in_channels // out_channels
    channels = torch.eye(out_channels).repeat(share, 1) / share
    return channels[:, :, None, None] * torch.outer(triangle, triangle)
