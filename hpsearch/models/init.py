"""Initial weights of the UNet from one seed: Xavier and bilinear interpolation, or the defaults of torch."""

import math
from typing import Literal

import torch
from torch import Tensor, nn


def initialize_(model: nn.Module, init: Literal["xavier", "torch"], *, seed: int) -> None:
    """Fill every weight of `model` in place with random numbers of `seed`, without a global generator.

    `xavier`: convolutions by the uniform rule of Glorot and Bengio with zero bias, transposed convolutions as
    interpolation (`interpolation_weight`). `torch`: the rule of torch's constructors for both. Normalisation layers
    start with weight 1 and bias 0. Weights are drawn on the CPU, so a seed gives the same bytes on every device. A
    model on the `meta` device is left unchanged.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            if module.weight.is_meta:
                continue
            weight, bias = _torch_default(module, generator)
            if init == "xavier":
                weight = _xavier(module, generator)
                bias = torch.zeros_like(bias)
            with torch.no_grad():
                module.weight.copy_(weight)
                if module.bias is not None:
                    module.bias.copy_(bias)
        elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.InstanceNorm2d):
            module.reset_parameters()


def interpolation_weight(in_channels: int, out_channels: int, kernel_size: int, stride: int) -> Tensor:
    """Return the weight with which a transposed convolution interpolates.

    Its shape is (in_channels, out_channels, kernel_size, kernel_size), float32.
    The kernel is the triangle of bilinear interpolation, cut to `kernel_size` and scaled so that a constant map
    keeps its value. With kernel 4, stride 2 and padding 1 it equals `F.interpolate(mode="bilinear")`. With kernel 2
    and stride 2 each output pixel sees one input pixel and repeats it (nearest neighbour). Each output channel is
    the mean of every out_channels-th input channel (o, o + out_channels, ...). ValueError if channels or kernel do
    not divide.
    """
    if in_channels % out_channels or kernel_size % stride:
        raise ValueError(
            f"{in_channels} channels to {out_channels}, kernel {kernel_size}, stride {stride} do not divide"
        )
    centre = (kernel_size - 1) / 2
    triangle = (1 - (torch.arange(kernel_size) - centre).abs() / stride).clamp(min=0)
    # An output pixel receives every stride-th tap, and the taps of each of the `stride` phases must add up to 1.
    triangle = triangle / triangle.view(-1, stride).sum(0).repeat(kernel_size // stride)
    share = in_channels // out_channels
    channels = torch.eye(out_channels).repeat(share, 1) / share
    return channels[:, :, None, None] * torch.outer(triangle, triangle)


def _xavier(module: nn.Conv2d | nn.ConvTranspose2d, generator: torch.Generator) -> Tensor:
    if isinstance(module, nn.ConvTranspose2d):
        return interpolation_weight(module.in_channels, module.out_channels, module.kernel_size[0], module.stride[0])
    weight = torch.empty(module.weight.shape)
    nn.init.xavier_uniform_(weight, generator=generator)
    return weight


def _torch_default(module: nn.Conv2d | nn.ConvTranspose2d, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw weight and bias as `module.reset_parameters()` does: both uniform within 1 / sqrt(fan in)."""
    # For torch the fan is dimension 1 times the kernel; for a transposed convolution that is its output channels.
    weight = torch.empty(module.weight.shape)
    bound = 1 / math.sqrt(weight[0].numel())
    weight.uniform_(-bound, bound, generator=generator)
    bias = torch.empty(module.out_channels).uniform_(-bound, bound, generator=generator)
    return weight, bias
