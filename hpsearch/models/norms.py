"""Normalisation layers of the UNet for images and feature maps in channels_last."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hpsearch.config.model import UNetConfig
from hpsearch.models.shapes import norm_groups

LANES = 64
"""Channels that make full use of the vector instructions of any CPU in torch's channels_last kernels."""
NARROW_BYTES = 16
"""Most bytes per pixel for which maps are reinterpreted as wider ones; above it there is no gain."""
NARROW_NUMBERS = 2**16
"""Fewest numbers in the maps for which this is faster."""


def make_norm(config: UNetConfig, channels: int) -> nn.Module:
    """Return the normalisation after a convolution."""
    if config.norm == "batch":
        return BatchNorm(channels)
    if config.norm == "group":
        return GroupNorm(norm_groups(channels), channels)
    if config.norm == "instance":
        return InstanceNorm(channels, affine=True)
    return nn.Identity()


class ImageNorm(nn.Module):
    """Standardise every image (B, C, H, W) by its own mean and standard deviation per channel; the dtype is kept.

    This removes differences of camera and lighting before the first convolution. It is computed in float32; an image
    of a single colour becomes 0.
    """

    def __init__(self, eps: float = 1e-4) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, images: Tensor) -> Tensor:
        batch, channels, height, width = images.shape
        # Whole rows, since vector instructions would be ten times slower over an innermost dimension of 3 channels.
        rows = images.permute(0, 2, 3, 1).reshape(batch, height, width * channels).to(torch.float32)
        mean = _by_channel(rows, channels)
        var = (_by_channel(rows * rows, channels) - mean * mean).clamp_min(0)
        factor = (var + self.eps).rsqrt()
        shift = -mean * factor
        rows = torch.addcmul(shift.repeat(1, width).unsqueeze(1), rows, factor.repeat(1, width).unsqueeze(1))
        return rows.to(images.dtype).view(batch, height, width, channels).permute(0, 3, 1, 2)


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation, on the CPU up to three times as fast as torch's for few channels.

    torch's channels_last kernels work along the channels and use vector instructions only if the channels fill one.
    Therefore maps of 8 channels are reinterpreted as maps of `LANES` channels and an eighth of the pixels, in the
    same memory. The 8 statistics of each channel are then combined. The results differ from torch's by rounding
    only.
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
    """Group normalisation of maps in channels_last. On CUDA autocast uses float32; the result has the dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        # The kernels need the pixels of a channel side by side. Even with two copies a step on the CPU is 10-35 %
        # faster.
        return super().forward(x.contiguous()).to(x.dtype, memory_format=torch.channels_last)


class InstanceNorm(nn.InstanceNorm2d):
    """Instance normalisation of maps in channels_last."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 1:
            # For one image in this layout torch's instance normalisation computes wrong gradients.
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        # Otherwise the result is not in channels_last, and every following convolution has to convert it.
        return super().forward(x).contiguous(memory_format=torch.channels_last)


class _NarrowBatchNorm(torch.autograd.Function):
    """Batch normalisation of (B, C, H, W) in training; also returns mean and biased variance (C,) in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        wide, repeats = _wide(x), LANES // x.shape[1]
        # The unused running statistics make the result float32.
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
        """With x' = (x - mean) / std: grad_x = weight / std (grad - mean(grad) - x' mean(grad x'))."""
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
        # scale x grad + shift + slope x, each factor in float32
        grad_x = _scaled(grads, (scale, shift, zero, one), 0.0).add_(_scaled(wide, (slope, zero, zero, one), 0.0))
        return _narrow(grad_x, x), grad_weight, grad_bias, None


def _by_channel(rows: Tensor, channels: int) -> Tensor:
    """Return the mean of (B, H, W * C) over the pixels of each image, (B, C)."""
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
    """Return (wide - mean) / sqrt(var + eps) * weight + bias in one pass, with (C,) float32 statistics."""
    weight, bias, mean, var = (value.repeat(LANES // len(value)) for value in by_channel)
    out = torch.empty_like(wide) if out is None else out
    unused = mean.new_empty((0,)), mean.new_empty((0,))
    torch.native_batch_norm(wide, weight, bias, mean, var, False, 0.0, eps, out=(out, *unused))
    return out
