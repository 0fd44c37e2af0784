"""Settings of the UNet. Imports no torch: shapes, memory and the coordinator read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hpsearch.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The UNet of Ronneberger et al. (2015) and its variations."""

    base_channels: int = 64
    """Channels of the first stage; each stage below has twice as many."""
    depth: int = 4
    """Number of down-samplings."""
    stacking: int = 2
    """Convolutions per stage."""
    kernel_size: int = 3
    """Side of the convolutions' kernels; odd."""
    padding: Literal["same", "valid"] = "same"
    """`valid` is the paper's: every convolution takes a border away."""
    norm: Literal["none", "batch", "group", "instance"] = "batch"
    """Normalisation after each convolution; the report has none."""
    input_norm: Literal["none", "image"] = "image"
    """`image`: each image is standardised once more by its own mean and deviation, by channel; the report has
    `none`."""
    init: Literal["xavier", "torch"] = "xavier"
    """`xavier`: Xavier convolutions, bilinear transposed ones (the report's); `torch`: torch's defaults."""

    def __post_init__(self) -> None:
        for name in ("base_channels", "depth", "stacking", "kernel_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"unet.{name} must be at least 1, got {getattr(self, name)}")
        if self.kernel_size % 2 == 0:
            raise ConfigError(f"unet.kernel_size must be odd, got {self.kernel_size}")
