"""Requirements of a network that are known before training: possible sizes, parameters, FLOPs and memory.

Each function calls the one of the same name in the module of the network (`hpsearch.models.networks`), which computes
the answer by arithmetic. Where the module has none, `hpsearch.models.dry_run` finds the answer for any network.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Unpack

from hpsearch.config.model import UNetConfig
from hpsearch.models.memory import LayerCost, LayerOptions, MemoryEstimate, StepOptions


def describe(config: UNetConfig) -> str:
    """Return the network in a few words."""
    return str(_find(config, "describe")(config))


def why_impossible(
    config: UNetConfig, in_channels: int, height: int, width: int, *, batch_size: int | None = None
) -> str | None:
    """Return one sentence saying why the network cannot be trained at this size, or None if it can.

    `batch_size` matters to batch normalisation only; without it a batch of one image is not considered.
    """
    reason: str | None = _find(config, "why_impossible")(config, in_channels, height, width, batch_size=batch_size)
    return reason


def n_parameters(config: UNetConfig, in_channels: int) -> int:
    """Return the number of learned parameters."""
    return int(_find(config, "n_parameters")(config, in_channels))


def training_flops(config: UNetConfig, in_channels: int, height: int, width: int) -> int:
    """Return the FLOPs of forward and backward pass of one image, a multiply-add counted as 2."""
    return int(_find(config, "training_flops")(config, in_channels, height, width))


def training_memory(
    config: UNetConfig, in_channels: int, height: int, width: int, **options: Unpack[StepOptions]
) -> MemoryEstimate:
    """Return the peak memory of one training step: forward pass, backward pass, optimizer.

    `precision` is that of autocast; weights, gradients and optimizer state are float32.
    """
    estimate: MemoryEstimate = _find(config, "training_memory")(config, in_channels, height, width, **options)
    return estimate


def layer_costs(
    config: UNetConfig, in_channels: int, height: int, width: int, **options: Unpack[LayerOptions]
) -> list[LayerCost]:
    """Return every layer in the order of the forward pass; an empty list if the network does not define them."""
    costs: list[LayerCost] = _find(config, "layer_costs")(config, in_channels, height, width, **options)
    return costs


def output_margin(config: UNetConfig) -> int:
    """Return the distance in pixels between the upper left corners of an image and of what is computed for it."""
    return int(_find(config, "output_margin")(config))


def output_size(config: UNetConfig, in_channels: int, size: tuple[int, int]) -> tuple[int, int]:
    """Return height and width of what the network computes for an image of `size`."""
    height, width = _find(config, "output_size")(config, in_channels, size)
    return height, width


def uses_batch_statistics(config: UNetConfig) -> bool:
    """Return whether the result for an image depends on the other images of its training batch."""
    return bool(_find(config, "uses_batch_statistics")(config))


def _find(config: UNetConfig, function: str) -> Any:
    """Return a function of the network, or the one that answers the same question for any network."""
    network = import_module(f"hpsearch.models.networks.{config.network}")
    # Imported here because it needs torch, and the UNet's arithmetic does not.
    return getattr(network, function, None) or getattr(import_module("hpsearch.models.dry_run"), function)
