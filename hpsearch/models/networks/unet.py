"""The UNet, with its shapes, memory and FLOPs calculated from the layers."""

from typing import Any

from hpsearch.config.model import UNetConfig
from hpsearch.models.memory import layer_costs, training_memory  # noqa: F401
from hpsearch.models.shapes import n_parameters, output_margin, output_size, training_flops, why_impossible  # noqa: F401


def build(config: UNetConfig, in_channels: int) -> Any:
    """Return a UNet whose initial weights are drawn from torch's global generator."""
    # Imported here because the coordinator runs without torch and needs only calculated sizes.
    import torch

    from hpsearch.models.unet import UNet

    return UNet(config, in_channels, seed=torch.initial_seed())


def describe(config: UNetConfig) -> str:
    """Return a short description of the network."""
    return (
        f"UNet, base channels {config.base_channels}, depth {config.depth}, stacking {config.stacking}, "
        f"{config.kernel_size}x{config.kernel_size} {config.padding}, normalisation {config.norm}"
    )


def uses_batch_statistics(config: UNetConfig) -> bool:
    """Return whether the result for an image depends on the other images of its training batch."""
    return config.norm == "batch"
