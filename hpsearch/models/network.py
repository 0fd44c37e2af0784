"""Networks by name: the interface of a network, and how one is built.

A network is a module `hpsearch/models/networks/NAME.py`, chosen by `unet.network = "NAME"`. It needs only the
function `build` of `Network`. It may also have any function of `hpsearch.models.costs`, with the same signature. A
network whose forward pass depends on the values of the images has to have `why_impossible`, `training_flops` and
`training_memory`, since a dry run has no values.
"""

from importlib import import_module
from typing import Any, Protocol

import torch
from torch import nn

from hpsearch.config.model import UNetConfig


class Network(Protocol):
    """Interface of a module in `hpsearch/models/networks/`."""

    def build(self, config: UNetConfig, in_channels: int) -> nn.Module:
        """Return a network that maps images (B, in_channels, H, W) to logits (B, 1, H, W), both float.

        Initial weights are drawn from torch's global generator, which the caller has seeded.
        """


def build_network(config: UNetConfig, in_channels: int, *, seed: int = 0, margin: int = 0) -> nn.Module:
    """Return the network of `config` on the CPU with the initial weights of `seed`.

    With `margin` (`hpsearch.models.costs.output_margin`) its logits are not stretched to the size of the images. The
    global generator keeps its state.
    """
    network: Network = import_module(f"hpsearch.models.networks.{config.network}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = network.build(config, in_channels)
    if margin:
        model.margin = margin  # type: ignore[assignment]
    return model


def margin_of(model: Any) -> int:
    """Return the distance in pixels between the upper left corners of an image and of its logits."""
    return getattr(model, "margin", 0)
