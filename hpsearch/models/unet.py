"""The UNet, from four parts: stacked convolution, down, up, 1x1 head; and one interpolation that learns nothing."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpsearch.config.model import UNetConfig
from hpsearch.models.init import initialize_
from hpsearch.models.norms import ImageNorm, make_norm
from hpsearch.models.shapes import output_margin, skip_offset


class UNet(nn.Module):
    """UNet of Ronneberger et al. (2015) for binary masks.

    Forward takes images (B, in_channels, H, W) and gives logits (B, 1, H, W), of any H and W that can exist
    (`shapes.why_impossible`). The parts are `encoder` (a stacked convolution, then `depth` downs), `decoder` (`depth`
    ups) and `head`: 10 objects for depth 4.

    Odd sizes: pooling rounds up, so that pixel i of a stage covers pixels 2i and 2i + 1 of the stage above, the last
    perhaps only one of them; up-sampled maps are then cut to the skip's size. With `same` every stage stays on the
    input's grid and the logits need no interpolation. With `valid` they cover the centre only (572 -> 388), and are
    stretched to H x W, as the report's adaptive UNet does. Without `stretch` they are left as they are (B, 1, h, w):
    they say something about the centre of the image, `margin` pixels away from its border, as in the paper.
    """

    def __init__(self, config: UNetConfig, in_channels: int, *, seed: int = 0, stretch: bool = True) -> None:
        super().__init__()
        self.config = config
        self.margin = 0 if stretch else output_margin(config)
        self.input_norm = ImageNorm() if config.input_norm == "image" else nn.Identity()
        channels = [config.base_channels * 2**stage for stage in range(config.depth + 1)]
        # The constructors draw from the global generator; `initialize_` then draws what is used from the seed.
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

    def forward(self, images: Tensor, *, interpolate: bool = True) -> Tensor:
        """Logits (B, 1, H, W); without `interpolate` those that the network computed, smaller than H x W for `valid`.

        So are they where the network is not made to stretch them.
        The report interpolates the last feature maps and then applies the 1x1 convolution. Both are linear and the
        interpolation's weights add up to 1, so that they commute: here the one map of logits is interpolated, which
        is the same function and saves base_channels - 1 maps of H x W.
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
        if interpolate and not self.margin and logits.shape[-2:] != size:
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return logits


class StackedConvolution(nn.Sequential):
    """`stacking` times convolution, normalisation, ReLU: (B, in_channels, H, W) to (B, out_channels, H', W')."""

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
            # These two subtract each channel's mean, and any bias with it.
            bias=config.norm not in ("batch", "instance"),
        )
        self.norm = make_norm(config, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        # In place: neither the convolution nor the normalisation needs its own output for its gradient.
        return F.relu_(self.norm(self.conv(x)))


class Down(nn.Module):
    """Halve the resolution by max-pooling, rounding up, then a stacked convolution."""

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.stack = StackedConvolution(config, in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.stack(self.pool(x))  # type: ignore[no-any-return]


class Up(nn.Module):
    """Double the resolution by a transposed convolution, join the skip of that grid, then a stacked convolution."""

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
    """A transposed convolution of kernel 2 and stride 2, as a matrix product: (B, C, H, W) to (B, C', 2H, 2W).

    None of its taps meet in an output pixel, so each input pixel is multiplied by one matrix (C, 2 * 2 * C') and the
    result laid out anew. On the CPU in bf16 that takes about half the time of the transposed convolution's kernels.
    """

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        assert self.bias is not None
        batch, channels, height, width = x.shape
        # In channels_last neither of these two copies anything.
        taps = self.weight.permute(0, 2, 3, 1).reshape(channels, -1)
        x = F.linear(x.permute(0, 2, 3, 1), taps.t(), self.bias.repeat(4))
        x = x.view(batch, height, width, 2, 2, self.out_channels).transpose(2, 3)
        return x.reshape(batch, 2 * height, 2 * width, self.out_channels).permute(0, 3, 1, 2)
