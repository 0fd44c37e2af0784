"""First weights of the network: Xavier and bilinear interpolation, or torch's own, from one seed."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn


def initialize_(model: nn.Module, init: Literal["xavier", "torch"], *, seed: int) -> None:
    """Fill every weight of `model` in place with random numbers of `seed`; no global generator is used.

    `xavier`: convolutions by Glorot and Bengio's uniform rule with zero bias, transposed ones as interpolation
    (`interpolation_weight`). `torch`: the rule of torch's own constructors for both. Normalisation starts as 1 and 0.
    They are drawn on the CPU, so that a seed gives the same bytes on every device; on the `meta` device nothing is.
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
    """Weight (in_channels, out_channels, kernel_size, kernel_size), float32, with which a transposed convolution
    interpolates.

    The kernel is the triangle of bilinear interpolation, cut to `kernel_size` and scaled so that a constant map stays
    that constant. With kernel 4, stride 2 and padding 1 this is `F.interpolate(mode="bilinear")`. Kernel 2, stride 2
    sees one input pixel per output pixel, so it can only repeat it: the nearest neighbour. Each output channel is the
    mean of its share of the input channels (o, o + out_channels, ...). ValueError if the shares are not whole.
    """
    if in_channels % out_channels or kernel_size % stride:
        raise ValueError(
            f"{in_channels} channels to {out_channels}, kernel {kernel_size}, stride {stride} do not divide"
        )
    centre = (kernel_size - 1) / 2
    triangle = (1 - (torch.arange(kernel_size) - centre).abs() / stride).clamp(min=0)
    # An output pixel receives every stride-th tap; those must add up to 1 for each of the `stride` phases.
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
    """What `module.reset_parameters()` would draw, from `generator`: uniform within 1 / sqrt(fan in), both."""
    # torch takes dimension 1 times the kernel for the fan, which for a transposed convolution is its output channels.
    weight = torch.empty(module.weight.shape)
    bound = 1 / math.sqrt(weight[0].numel())
    weight.uniform_(-bound, bound, generator=generator)
    bias = torch.empty(module.out_channels).uniform_(-bound, bound, generator=generator)
    return weight, bias
