"""Shapes, memory and FLOPs of any network, by a training step on torch's `meta` device, which has shapes but no data.

Each function has the name and signature of the one in `hpsearch.models.costs` for which it stands in.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from hpsearch.config.model import UNetConfig
from hpsearch.models.memory import LayerCost, MemoryEstimate, StepOptions, itemsize, state_factor
from hpsearch.models.network import build_network

_ALLOWANCE = 0.2
"""Share of the counted memory that is added for scratch memory of the kernels and gaps of the allocator."""


def describe(config: UNetConfig) -> str:
    """Return the name of the network."""
    return config.network


@functools.lru_cache(maxsize=1024)
def why_impossible(
    config: UNetConfig, in_channels: int, height: int, width: int, *, batch_size: int | None = None
) -> str | None:
    """Return what the network itself reports at this size, or None if a forward pass succeeds."""
    try:
        logits = _forward(config, in_channels, height, width, batch_size or 2)
    except (RuntimeError, ValueError) as error:
        return f"network {config.network} cannot take images of {height}x{width}: {str(error).splitlines()[0]}"
    expected = (batch_size or 2, 1, height, width)
    if tuple(logits.shape) == expected:
        return None
    return f"network {config.network} returns logits of shape {tuple(logits.shape)}, expected {expected}"


def n_parameters(config: UNetConfig, in_channels: int) -> int:
    """Return the number of learned parameters."""
    return sum(parameter.numel() for parameter in _model(config, in_channels).parameters())


@functools.lru_cache(maxsize=1024)
def training_flops(config: UNetConfig, in_channels: int, height: int, width: int) -> int:
    """Return the FLOPs that torch counts in a forward and a backward pass, for one image."""
    counter = FlopCounterMode(display=False)
    with counter:
        # Two images, since batch normalisation may refuse a single one.
        _forward(config, in_channels, height, width, 2).sum().backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops()) // 2


def training_memory(
    config: UNetConfig, in_channels: int, height: int, width: int, **options: Unpack[StepOptions]
) -> MemoryEstimate:
    """Return the peak memory of a step, from the tensors that autograd saves in the forward pass."""
    batch_size, precision = options["batch_size"], options["precision"]
    saved: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    logits = _forward(
        config, in_channels, height, width, batch_size, saved_tensors_hooks(keep, lambda tensor: tensor)
    )
    for parameter in _model(config, in_channels).parameters():
        saved.pop(parameter.untyped_storage()._cdata, None)
    sizes = [storage.nbytes() * itemsize(precision) // 4 for storage in saved.values()]
    weights = 4 * n_parameters(config, in_channels)
    # In float32 the images are among the saved tensors.
    images = 0 if precision == "float32" else 4 * batch_size * in_channels * height * width
    # Besides what is saved, there are the images, masks and logits, and the gradients of the input and the output of
    # one operation.
    workspace = images + 3 * 4 * logits.numel() + 2 * max(sizes, default=0)
    state = weights * state_factor(options.get("optimizer", "sgd"), options.get("momentum", 0.9))
    return MemoryEstimate(
        weights=weights,
        gradients=weights,
        optimizer=state,
        activations=sum(sizes),
        workspace=workspace + round(_ALLOWANCE * (workspace + sum(sizes))),
    )


def layer_costs(*_: Any, **__: Any) -> list[LayerCost]:
    """Return an empty list: the layers of the network are not known."""
    return []


def output_margin(config: UNetConfig) -> int:
    """Return 0: the logits of the network cover the whole image."""
    return 0


def output_size(config: UNetConfig, in_channels: int, size: tuple[int, int]) -> tuple[int, int]:
    """Return `size`: the logits of the network cover the whole image."""
    return size


def uses_batch_statistics(config: UNetConfig) -> bool:
    """Return whether the network has a batch normalisation."""
    return any(isinstance(module, _BatchNorm) for module in _model(config, 3).modules())


@functools.lru_cache(maxsize=64)
def _model(config: UNetConfig, in_channels: int) -> nn.Module:
    return build_network(config, in_channels).to("meta").train()


def _forward(
    config: UNetConfig,
    in_channels: int,
    height: int,
    width: int,
    batch_size: int,
    context: AbstractContextManager[Any] | None = None,
) -> Tensor:
    """Return the logits of a batch, which are shapes without values."""
    images = torch.empty(batch_size, in_channels, height, width, device="meta")
    with context or nullcontext():
        logits: Tensor = _model(config, in_channels)(images)
    return logits
