"""Networks by name: how one is built, and its possible sizes, parameters, FLOPs and memory before training.

A network is a module `hpsearch/models/networks/NAME.py`, chosen by `unet.network = "NAME"`. It needs only the
function `build` of `Network`. It may also have any other function of this module, with the same signature. A network
whose forward pass depends on the values of the images has to have `why_impossible`, `training_flops` and
`training_memory`, since a dry run has no values.

Each of the functions that a network may have calls that of the network's module, which computes the answer by
arithmetic. Where the module has none, the function itself finds the answer for any network, by a dry run: a training
step on torch's `meta` device, which has shapes but no data.
"""

import functools
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from hpsearch.config.model import UNetConfig
from hpsearch.models.memory import LayerCost, MemoryEstimate, Step

if TYPE_CHECKING:
    # torch is imported in functions because the coordinator, for which the UNet's arithmetic is enough, runs without.
    from torch import Tensor, nn

F = TypeVar("F", bound=Callable[..., Any])

_ALLOWANCE = 0.2
"""Share of the counted memory that is added for scratch memory of the kernels and gaps of the allocator."""


class Network(Protocol):
    """Interface of a module in `hpsearch/models/networks/`."""

    def build(self, config: UNetConfig, in_channels: int) -> "nn.Module":
        """Return a network that maps images (B, in_channels, H, W) to logits (B, 1, H, W), both float.

        Initial weights are drawn from torch's global generator, which the caller has seeded.
        """


def build_network(config: UNetConfig, in_channels: int, *, seed: int = 0, margin: int = 0) -> "nn.Module":
    """Return the network of `config` on the CPU with the initial weights of `seed`.

    With `margin` (`output_margin`) its logits are not stretched to the size of the images. The global generator keeps
    its state.
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
    """Return the distance in pixels between the upper left corners of an image and of its logits."""
    return getattr(model, "margin", 0)


def _by_network(function: F) -> F:
    """Make a function call that of the same name in the network's module, where there is one."""

    @functools.wraps(function)
    def call(config: UNetConfig, *args: Any, **kwargs: Any) -> Any:
        network = import_module(f"hpsearch.models.networks.{config.network}")
        return getattr(network, function.__name__, function)(config, *args, **kwargs)

    return cast("F", call)


@_by_network
def describe(config: UNetConfig) -> str:
    """Return the network in a few words."""
    return config.network


@_by_network
@functools.lru_cache(maxsize=1024)
def why_impossible(
    config: UNetConfig, in_channels: int, height: int, width: int, *, batch_size: int | None = None
) -> str | None:
    """Return one sentence saying why the network cannot be trained at this size, or None if it can.

    `batch_size` matters to batch normalisation only; without it a batch of one image is not considered.
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
    """Return the FLOPs of forward and backward pass of one image, a multiply-add counted as 2."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        # Two images, since batch normalisation may refuse a single one.
        _forward(config, in_channels, height, width, 2).sum().backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops()) // 2


@_by_network
def training_memory(config: UNetConfig, in_channels: int, height: int, width: int, step: Step) -> MemoryEstimate:
    """Return the peak memory of one training step: forward pass, backward pass, optimizer."""
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
    # Besides what is saved, there are the images, masks and logits, and the gradients of the input and the output of
    # one operation.
    workspace = images + 3 * 4 * logits.numel() + 2 * max(sizes, default=0)
    return MemoryEstimate(
        weights=weights,
        gradients=weights,
        optimizer=weights * step.state_factor,
        activations=sum(sizes),
        workspace=workspace + round(_ALLOWANCE * (workspace + sum(sizes))),
    )


@_by_network
def layer_costs(config: UNetConfig, in_channels: int, height: int, width: int, step: Step) -> list[LayerCost]:
    """Return every layer in the order of the forward pass; an empty list if the network does not define them."""
    return []


@_by_network
def output_margin(config: UNetConfig) -> int:
    """Return the distance in pixels between the upper left corners of an image and of what is computed for it."""
    return 0


@_by_network
def output_size(config: UNetConfig, in_channels: int, size: tuple[int, int]) -> tuple[int, int]:
    """Return height and width of what the network computes for an image of `size`."""
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
    """Return the logits of a batch, which are shapes without values."""
    import torch

    logits: Tensor = _model(config, in_channels)(torch.empty(batch_size, in_channels, height, width, device="meta"))
    return logits
