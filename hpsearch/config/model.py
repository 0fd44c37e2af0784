"""Network settings. Does not import torch, so that commands start fast."""

import dataclasses
from typing import Annotated, Any, Literal

from hpsearch.config.values import ModuleName, check_at_least, require

_NETWORK = ModuleName("models/networks")
FIELDS_OF_0_1 = ("base_channels", "depth", "stacking", "kernel_size", "padding", "norm", "input_norm", "init")
"""Settings that are always included in files and hashes. Settings added after version 0.1 are omitted if they have
their default, so that the checkpoints and weights of existing studies stay valid."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Settings of the network: the UNet of Ronneberger et al. (2015) and its variations."""

    network: Annotated[str, _NETWORK] = "unet"
    """Network to train: the name of a module in `hpsearch/models/networks/`. A network other than `unet` uses only
    the settings below that apply to it."""
    base_channels: int = 64
    """Number of channels of the first stage. The number doubles with each down-sampling."""
    depth: int = 4
    """Number of down-sampling steps."""
    stacking: int = 2
    """Number of convolutions per stage."""
    kernel_size: int = 3
    """Side length of the convolution kernels in pixels; must be odd."""
    padding: Literal["same", "valid"] = "same"
    """Padding of the convolutions. `valid` adds none, as in the paper, so that each convolution trims the borders."""
    norm: Literal["none", "batch", "group", "instance"] = "batch"
    """Normalisation after each convolution. The built-in configurations `report-fig*` use `none`."""
    input_norm: Literal["none", "image"] = "image"
    """Additional normalisation of the input. `image` standardises each image by its own mean and standard deviation
    per channel. The built-in configurations `report-fig*` use `none`."""
    init: Literal["xavier", "torch"] = "xavier"
    """Initial weights. `xavier`: Xavier initialisation for convolutions and bilinear interpolation for transposed
    convolutions. `torch`: the defaults of PyTorch."""

    def __post_init__(self) -> None:
        _NETWORK.check("unet.network", self.network)
        check_at_least("unet", self, 1, "base_channels", "depth", "stacking", "kernel_size")
        require(self.kernel_size % 2 == 1, f"unet.kernel_size must be odd, got {self.kernel_size}")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain types for files and hashes.

        Settings added after version 0.1 are included only if they differ from their default.
        """
        default = {field.name: field.default for field in dataclasses.fields(self)}
        table = dataclasses.asdict(self)
        return {name: value for name, value in table.items() if name in FIELDS_OF_0_1 or value != default[name]}
