"""The UNet as a torch module: its building blocks and initial weights."""

import itertools
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hpsearch.config.model import UNetConfig
from hpsearch.models.shapes import norm_groups, skip_offset

LANES = 64
"""Number of channels that fills the vector registers of any CPU in torch's channels_last kernels."""
NARROW_BYTES = 16
"""Largest size of a pixel of a feature map, in bytes over all channels, at which the `BatchNorm` of this module is
faster than torch's."""
NARROW_NUMBERS = 2**16
"""Smallest number of elements of a feature map at which the `BatchNorm` of this module is faster than torch's."""


class UNet(nn.Module):
    """UNet of Ronneberger et al. (2015) for binary masks.

    The forward pass maps images (B, in_channels, H, W) to logits (B, 1, H, W). H and W may have any value for which
    `shapes.why_impossible` returns None. `encoder` is a stacked convolution followed by `depth` `Down` modules,
    `decoder` has `depth` `Up` modules, and `head` is a 1x1 convolution: 10 modules for depth 4.

    Pooling rounds odd sizes up: pixel i of a stage covers pixels 2i and 2i + 1 of the stage above, and the last pixel
    may cover a single one. Up-sampled maps are then cut to the size of the skip connection. With `same` padding,
    every stage stays aligned with the input and the logits need no interpolation. With `valid` padding, the logits
    cover only the centre (572 -> 388) and are interpolated to H x W, as in the source report (see README.md). If
    `margin` is above 0, the logits (B, 1, h, w) are not interpolated. They start `margin` pixels from the top and
    left edges of the image, as in Ronneberger et al.
    """

    margin = 0

    def __init__(self, config: UNetConfig, in_channels: int, *, seed: int = 0) -> None:
        super().__init__()
        self.input_norm = ImageNorm() if config.input_norm == "image" else nn.Identity()
        channels = [config.base_channels * 2**stage for stage in range(config.depth + 1)]
        # The constructors draw random weights from the global generator, whose state must not change. `initialize_`
        # replaces these weights.
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
        """Return logits (B, 1, H, W), or logits (B, 1, h, w) of the centre if the network has a margin.

        The source report interpolates the last feature maps and then applies the 1x1 convolution. Both operations are
        linear and the weights of the interpolation add up to 1, so their order does not matter. Here the single map
        of logits is interpolated, which gives the same result and saves base_channels - 1 maps of H x W.
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
        inputs = [in_channels] + [out_channels] * (config.stacking - 1)
        super().__init__(*(ConvolutionBlock(config, n_channels, out_channels) for n_channels in inputs))


class ConvolutionBlock(nn.Module):
    """Convolution, followed by normalisation and ReLU."""

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int) -> None:
        super().__init__()
        padding = config.kernel_size // 2 if config.padding == "same" else 0
        # Batch and instance normalisation subtract the mean of each channel, which cancels any bias.
        bias = config.norm not in ("batch", "instance")
        self.conv = nn.Conv2d(in_channels, out_channels, config.kernel_size, padding=padding, bias=bias)
        self.norm = make_norm(config, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        # In place, because neither the convolution nor the normalisation needs its output to compute its gradient.
        return F.relu_(self.norm(self.conv(x)))


class Down(nn.Sequential):
    """Max-pooling that halves the resolution and rounds up, followed by a stacked convolution."""

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.stack = StackedConvolution(config, in_channels, out_channels)


class Up(nn.Module):
    """Transposed convolution that doubles the resolution, followed by a stacked convolution.

    The input of the stacked convolution is the concatenation of skip connection and up-sampled map.
    """

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

    The outputs of two input pixels never overlap. Each input pixel can therefore be multiplied by one matrix (C, 2 *
    2 * C') and the result rearranged. On the CPU in bf16, this takes about half the time of torch's transposed
    convolution.
    """

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        assert self.bias is not None
        batch, channels, height, width = x.shape
        # With channels_last maps, neither of these two lines copies the maps.
        taps = self.weight.permute(0, 2, 3, 1).reshape(channels, -1)
        x = F.linear(x.permute(0, 2, 3, 1), taps.t(), self.bias.repeat(4))
        x = x.view(batch, height, width, 2, 2, self.out_channels).transpose(2, 3)
        return x.reshape(batch, 2 * height, 2 * width, self.out_channels).permute(0, 3, 1, 2)


def make_norm(config: UNetConfig, channels: int) -> nn.Module:
    """Return the normalisation layer that follows a convolution."""
    if config.norm == "batch":
        return BatchNorm(channels)
    if config.norm == "group":
        return GroupNorm(norm_groups(channels), channels)
    if config.norm == "instance":
        return InstanceNorm(channels, affine=True)
    return nn.Identity()


class ImageNorm(nn.Module):
    """Standardisation of each image (B, C, H, W) by its own mean and standard deviation per channel.

    It removes differences of camera and lighting before the first convolution. It computes in float32 and returns the
    dtype of the input. An image of a single colour becomes 0.
    """

    eps = 1e-4

    def forward(self, images: Tensor) -> Tensor:
        batch, channels, height, width = images.shape
        # Use whole rows, because vector instructions would be ten times slower with only 3 channels as the innermost
        # dimension.
        rows = images.permute(0, 2, 3, 1).reshape(batch, height, width * channels).to(torch.float32)
        mean = _by_channel(rows, channels)
        var = (_by_channel(rows * rows, channels) - mean * mean).clamp_min(0)
        factor = (var + self.eps).rsqrt()
        shift = -mean * factor
        rows = torch.addcmul(shift.repeat(1, width).unsqueeze(1), rows, factor.repeat(1, width).unsqueeze(1))
        return rows.to(images.dtype).view(batch, height, width, channels).permute(0, 3, 1, 2)


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation that is up to three times as fast as torch's on a CPU if there are few channels.

    torch's channels_last kernels vectorise over the channels, so they are slow if the channels do not fill a vector
    register. A map of 8 channels is therefore viewed as a map of `LANES` channels with an eighth of the pixels,
    without a copy. Each channel then has 8 means and variances, which are combined. The results differ from torch's
    only by rounding.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not _is_narrow(x):
            return super().forward(x)
        assert self.num_batches_tracked is not None
        if not self.training:
            repeats = LANES // x.shape[1]
            given = (self.running_mean, self.running_var, self.weight, self.bias)
            mean, var, weight, bias = (value.repeat(repeats) for value in given if value is not None)
            return _narrow(F.batch_norm(_wide(x), mean, var, weight, bias, eps=self.eps), x)
        y: Tensor
        y, mean, var = _NarrowBatchNorm.apply(x, self.weight, self.bias, self.eps)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        with torch.no_grad():
            n = x.numel() / x.shape[1]
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (n / (n - 1)), self.momentum)
        return y


class GroupNorm(nn.GroupNorm):
    """Group normalisation of channels_last maps.

    Autocast on CUDA computes it in float32; the result is converted to the dtype of the input.
    """

    def forward(self, x: Tensor) -> Tensor:
        # The kernels need contiguous pixels for each channel. Despite the two copies, a step on the CPU is 10-35 %
        # faster.
        return super().forward(x.contiguous()).to(x.dtype, memory_format=torch.channels_last)


class InstanceNorm(nn.InstanceNorm2d):
    """Instance normalisation of channels_last maps."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 1:
            # For a single image in this layout, torch's instance normalisation computes wrong gradients.
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        # Without the conversion the result is not channels_last, and every following convolution has to convert it.
        return super().forward(x).contiguous(memory_format=torch.channels_last)


class _NarrowBatchNorm(torch.autograd.Function):
    """Batch normalisation of (B, C, H, W) in training.

    It returns the normalised map, and the mean and biased variance of each channel, both (C,) float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        wide, repeats = _wide(x), LANES // x.shape[1]
        # The running statistics are not used. They are passed because float32 statistics make the result float32.
        unused = weight.new_zeros(LANES)
        means, variances = torch.ops.aten.batch_norm_update_stats(wide, unused, unused.clone(), 0.0)
        mean = means.view(repeats, -1).mean(0)
        var = variances.view(repeats, -1).mean(0) + means.view(repeats, -1).var(0, correction=0)
        y = torch.empty_like(x)
        _scaled(wide, (weight, bias, mean, var), eps, out=_wide(y))
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt())
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor, Tensor, Tensor, None]:
        """Return the gradients of x, weight and bias.

        With x' = (x - mean) / std: grad_x = weight / std * (grad - mean(grad) - x' * mean(grad * x')).
        """
        x, weight, mean, inverse_std = ctx.saved_tensors
        wide, repeats = _wide(x), LANES // x.shape[1]
        grads = _wide(grad.to(x.dtype, memory_format=torch.channels_last))
        one, n = torch.ones_like(mean), x.numel() // x.shape[1]
        lanes = [value.repeat(repeats) for value in (one, mean, one)]
        _, products, sums = torch.ops.aten.native_batch_norm_backward(
            grads, wide, *lanes, None, None, False, 0.0, [False, True, True]
        )
        grad_bias = sums.view(repeats, -1).sum(0)
        grad_weight = products.view(repeats, -1).sum(0) * inverse_std
        scale = weight * inverse_std
        slope = -scale * inverse_std * grad_weight / n
        shift = -scale * grad_bias / n - slope * mean
        zero = torch.zeros_like(one)
        # Compute scale * grad + shift + slope * x, with each factor in float32.
        grad_x = _scaled(grads, (scale, shift, zero, one), 0.0).add_(_scaled(wide, (slope, zero, zero, one), 0.0))
        return _narrow(grad_x, x), grad_weight, grad_bias, None


def _by_channel(rows: Tensor, channels: int) -> Tensor:
    """Return the mean of each channel over the pixels of each image: (B, H, W * C) to (B, C)."""
    return rows.mean(1).view(len(rows), -1, channels).mean(1)


def _is_narrow(x: Tensor) -> bool:
    channels = x.shape[1]
    return (
        x.device.type == "cpu"
        and channels * x.element_size() <= NARROW_BYTES
        and LANES % channels == 0
        and x.numel() >= NARROW_NUMBERS
        and x.numel() % LANES == 0
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _wide(x: Tensor) -> Tensor:
    """Return (B, C, H, W) reinterpreted as (1, LANES, B * H * W * C / LANES, 1), both in channels_last."""
    return x.permute(0, 2, 3, 1).reshape(1, -1, 1, LANES).permute(0, 3, 1, 2)


def _narrow(wide: Tensor, like: Tensor) -> Tensor:
    """Undo `_wide`: return `wide` in the shape of `like`."""
    batch, channels, height, width = like.shape
    return wide.permute(0, 2, 3, 1).reshape(batch, height, width, channels).permute(0, 3, 1, 2)


def _scaled(
    wide: Tensor, by_channel: tuple[Tensor, Tensor, Tensor, Tensor], eps: float, *, out: Tensor | None = None
) -> Tensor:
    """Return (wide - mean) / sqrt(var + eps) * weight + bias in one pass, in `out` if it is given.

    `by_channel` has weight, bias, mean and var, in this order, each (C,) float32.
    """
    weight, bias, mean, var = (value.repeat(LANES // len(value)) for value in by_channel)
    out = torch.empty_like(wide) if out is None else out
    unused = mean.new_empty((0,)), mean.new_empty((0,))
    torch.native_batch_norm(wide, weight, bias, mean, var, False, 0.0, eps, out=(out, *unused))
    return out


def initialize_(model: nn.Module, init: Literal["xavier", "torch"], *, seed: int) -> None:
    """Initialise all weights of `model` in place with random numbers drawn with `seed`.

    `xavier`: convolutions use the uniform initialisation of Glorot and Bengio with zero bias, and transposed
    convolutions interpolate (`interpolation_weight`). `torch`: both use the initialisation of torch's constructors.
    Normalisation layers start with weight 1 and bias 0. Weights are drawn on the CPU from a separate generator, so a
    seed gives the same bytes on every device. A model on the `meta` device is left unchanged.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.InstanceNorm2d):
            module.reset_parameters()
        if not isinstance(module, nn.Conv2d | nn.ConvTranspose2d) or module.weight.is_meta:
            continue
        weight, bias = torch.empty(module.weight.shape), torch.empty(module.out_channels)
        # torch defines the fan-in as dimension 1 times the kernel size. Dimension 1 of a transposed convolution is
        # its output channels.
        bound = 1 / math.sqrt(weight[0].numel())
        for values in (weight, bias):
            values.uniform_(-bound, bound, generator=generator)
        if init == "xavier":
            bias.zero_()
            if isinstance(module, nn.ConvTranspose2d):
                weight = interpolation_weight(module.in_channels, module.out_channels)
            else:
                nn.init.xavier_uniform_(weight, generator=generator)
        with torch.no_grad():
            module.weight.copy_(weight)
            if module.bias is not None:
                module.bias.copy_(bias)


def interpolation_weight(in_channels: int, out_channels: int) -> Tensor:
    """Return the weight of a transposed convolution of kernel 2 and stride 2 that interpolates.

    Its shape is (in_channels, out_channels, 2, 2), float32. The kernel is the triangle of bilinear interpolation, cut
    to 2x2 pixels and scaled so that a constant map keeps its value. All its values are equal, so each output pixel
    repeats one input pixel (nearest neighbour). Each output channel o is the mean of every out_channels-th input
    channel (o, o + out_channels, ...). `out_channels` must divide `in_channels`.
    """
    share = in_channels // out_channels
    channels = torch.eye(out_channels).repeat(share, 1) / share
    return channels[:, :, None, None].expand(-1, -1, 2, 2)
