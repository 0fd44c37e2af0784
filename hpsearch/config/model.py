"""Settings of the network. Imports no torch: shapes, memory and the coordinator read them."""

import dataclasses
from typing import Annotated, Any, Literal

from hpsearch.config.values import ModuleName, check_at_least, require

_NETWORK = ModuleName("models/networks")
FIELDS_OF_0_1 = ("base_channels", "depth", "stacking", "kernel_size", "padding", "norm", "input_norm", "init")
"""Settings that every file and hash includes. Settings added after version 0.1 are left out if they have their
default, so that the checkpoints and weights of existing studies stay valid."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The UNet of Ronneberger et al. (2015) and its variations."""

    network: Annotated[str, _NETWORK] = "unet"
    """Network to train: a module in `hpsearch/models/networks/`. A network other than `unet` uses those of the
    settings below that apply to it."""
    base_channels: int = 64
    """Channels of the first stage; each stage below has twice as many."""
    depth: int = 4
    """Number of down-samplings."""
    stacking: int = 2
    """Convolutions per stage."""
    kernel_size: int = 3
    """Side of the convolution kernels; odd."""
    padding: Literal["same", "valid"] = "same"
    """`valid` is that of the paper: each convolution removes a border."""
    norm: Literal["none", "batch", "group", "instance"] = "batch"
    """Normalisation after each convolution; the report has none."""
    input_norm: Literal["none", "image"] = "image"
    """`image`: each image is also standardised by its own mean and standard deviation per channel; the report has
    `none`."""
    init: Literal["xavier", "torch"] = "xavier"
    """`xavier`: Xavier convolutions and bilinear transposed convolutions, as in the report; `torch`: the defaults of
    torch."""

    def __post_init__(self) -> None:
        _NETWORK.check("unet.network", self.network)
        check_at_least("unet", self, 1, "base_channels", "depth", "stacking", "kernel_size")
        require(self.kernel_size % 2 == 1, f"unet.kernel_size must be odd, got {self.kernel_size}")

    def to_dict(self) -> dict[str, Any]:
        """Return plain types for files and hashes; settings that version 0.1 lacks appear only if they are set."""
        default = {field.name: field.default for field in dataclasses.fields(self)}
        table = dataclasses.asdict(self)
        return {name: value for name, value in table.items() if name in FIELDS_OF_0_1 or value != default[name]}
