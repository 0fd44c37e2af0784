"""Networks by name: build a network, and find its valid sizes, parameters, FLOPs and memory before training.

A network is a module `hpsearch/models/networks/NAME.py`, selected by `unet.network = "NAME"`. It must define the
function `build` of `Network`. It may also define its own version of other functions of this module, with the same
signature. A network whose forward pass depends on the values of the images must define `why_impossible`,
`training_flops` and `training_memory`, because a dry run has no values.

The functions of this module call the network's own version if there is one. Otherwise they use a dry run, which works
for any network: a training step on torch's `meta` device, which has shapes but no data.
"""

import functools
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from hpsearch.config.model import UNetConfig
from hpsearch.models.memory import LayerCost, MemoryEstimate, Step

if TYPE_CHECKING:
    # Torch is imported inside functions, because the coordinator runs without it and needs only calculated sizes.
    from torch import Tensor, nn

F = TypeVar("F", bound=Callable[..., Any])

_ALLOWANCE = 0.2
"""Fraction of the counted memory that is added for the workspace of kernels and the fragmentation of the
allocator."""


class Network(Protocol):
    """Interface of a module in `hpsearch/models/networks/`."""

    def build(self, config: UNetConfig, in_channels: int) -> "nn.Module":
        """Return a network that maps images (B, in_channels, H, W) to logits (B, 1, H, W), both float.

        Initial weights are drawn from torch's global generator, which the caller has seeded.
        """


def build_network(config: UNetConfig, in_channels: int, *, seed: int = 0, margin: int = 0) -> "nn.Module":
    """Return the network of `config` on the CPU, with initial weights drawn with `seed`.

    If `margin` is above 0 (see `output_margin`), the logits are not resized to the size of the images. The state of
    torch's global generator does not change.
    """
    import torch

    network: Network = import_module(f"hpsearch.models.networks.{config.network}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = network.build(config, in_channels)
    if margin:
        model.margin = margin  # type: ignore[assignment]
    return model


def margin_of(model: Any) -> int:
    """Return the margin that `build_network` has set for a model, or 0."""
    return getattr(model, "margin", 0)


def _by_network(function: F) -> F:
    """Decorate a function so that it calls the function of the same name in the network's module, if there is one."""

    @functools.wraps(function)
    def call(config: UNetConfig, *args: Any, **kwargs: Any) -> Any:
        network = import_module(f"hpsearch.models.networks.{config.network}")
        return getattr(network, function.__name__, function)(config, *args, **kwargs)

    return cast("F", call)


@_by_network
def describe(config: UNetConfig) -> str:
    """Return a short description of the network."""
    return config.network


@_by_network
@functools.lru_cache(maxsize=1024)
def why_impossible(
    config: UNetConfig, in_channels: int, height: int, width: int, *, batch_size: int | None = None
) -> str | None:
    """Return the reason why the network cannot be trained at this size, as one sentence, or None if it can.

    `batch_size` matters only for batch normalisation. If it is None, batches are assumed to have several images.
    """
    try:
        logits = _forward(config, in_channels, height, width, batch_size or 2)
    except (RuntimeError, ValueError) as error:
        return f"network {config.network} cannot take images of {height}x{width}: {str(error).splitlines()[0]}"
    expected = (batch_size or 2, 1, height, width)
    if tuple(logits.shape) == expected:
        return None
    return f"network {config.network} returns logits of shape {tuple(logits.shape)}, expected {expected}"


@_by_network
def n_parameters(config: UNetConfig, in_channels: int) -> int:
    """Return the number of learned parameters."""
    return sum(parameter.numel() for parameter in _model(config, in_channels).parameters())


@_by_network
@functools.lru_cache(maxsize=1024)
def training_flops(config: UNetConfig, in_channels: int, height: int, width: int) -> int:
    """Return the FLOPs of the forward and backward pass of one image. A multiply-add counts as 2."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        # Use two images, because batch normalisation may refuse a single one.
        _forward(config, in_channels, height, width, 2).sum().backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops()) // 2


@functools.cache
@_by_network
def training_memory(config: UNetConfig, in_channels: int, height: int, width: int, step: Step) -> MemoryEstimate:
    """Return the estimated peak memory of one training step: forward pass, backward pass and optimizer."""
    from torch.autograd.graph import saved_tensors_hooks

    saved: dict[int, Any] = {}

    def keep(tensor: "Tensor") -> "Tensor":
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = _forward(config, in_channels, height, width, step.batch_size)
    for parameter in _model(config, in_channels).parameters():
        saved.pop(parameter.untyped_storage()._cdata, None)
    sizes = [storage.nbytes() * step.itemsize // 4 for storage in saved.values()]
    weights = 4 * n_parameters(config, in_channels)
    # In float32 the images are among the saved tensors.
    images = 0 if step.precision == "float32" else 4 * step.batch_size * in_channels * height * width
    # The workspace consists of the images, masks and logits, and the gradients of one operation's input and output.
    workspace, activations = images + 3 * 4 * logits.numel() + 2 * max(sizes, default=0), sum(sizes)
    workspace += round(_ALLOWANCE * (workspace + activations))
    state = weights * step.state_factor
    return MemoryEstimate(
        weights=weights, gradients=weights, optimizer=state, activations=activations, workspace=workspace
    )


@_by_network
def layer_costs(config: UNetConfig, in_channels: int, height: int, width: int, step: Step) -> list[LayerCost]:
    """Return the cost of each layer in the order of the forward pass; empty unless the network overrides this."""
    return []


@_by_network
def output_margin(config: UNetConfig) -> int:
    """Return the distance in pixels from the top and left edges of the image to the first logit."""
    return 0


@_by_network
def output_size(config: UNetConfig, in_channels: int, size: tuple[int, int]) -> tuple[int, int]:
    """Return the height and width of the logits for an image of `size`, before any resizing."""
    return size


@_by_network
def uses_batch_statistics(config: UNetConfig) -> bool:
    """Return whether the result for an image depends on the other images of its training batch."""
    from torch.nn.modules.batchnorm import _BatchNorm

    return any(isinstance(module, _BatchNorm) for module in _model(config, 3).modules())


@functools.lru_cache(maxsize=64)
def _model(config: UNetConfig, in_channels: int) -> "nn.Module":
    return build_network(config, in_channels).to("meta").train()


def _forward(config: UNetConfig, in_channels: int, height: int, width: int, batch_size: int) -> "Tensor":
    """Return the logits of a batch on the `meta` device, which have a shape but no values."""
    import torch

    logits: Tensor = _model(config, in_channels)(torch.empty(batch_size, in_channels, height, width, device="meta"))
    return logits
