"""Peak memory of a training step and of inference, by arithmetic from the layers' shapes.

What autograd saves in the forward pass is counted tensor by tensor, each storage once:

- the images, as the first convolution reads them;
- of each convolution what the ReLU, which works in place, leaves; and where there is a normalisation, its input, its
  means and its deviations;
- of each pooling its output and the indices of the maxima, 8 bytes each;
- of each up-sampling the map that joins skip and up-sampled map, which the next convolution reads;
- under autocast the weights' copies in 16 bits.

All else that a gradient needs is one of these maps. With the weights added that is the report's memory calculation:
`valid`, RGB, 572x572, float32, no normalisation: 5.50 GiB for base 32 and batch 16, 21.90 GiB for batch 64, 10.99 GiB
for base 64 and batch 16.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from hpsearch.models.config import UNetConfig
from hpsearch.models.shapes import Layer, layers, norm_groups

Precision = Literal["float32", "bf16", "fp16"]
Device = Literal["cpu", "cuda"]

_ALLOWANCE = 0.05
"""What the kernels' scratch memory and the allocator's gaps add to the tensors, as measured on the CPU."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """What is alive at the moment of the peak, in bytes."""

    weights: int
    gradients: int
    """Of the weights; hardly any yet where the peak is at the start of the backward pass, as it mostly is."""
    optimizer: int
    activations: int
    """What autograd has saved and not yet released."""
    workspace: int
    """The batch, the loss, gradients of feature maps, and an allowance for the allocator and the kernels."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.workspace


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """One layer of the network and what training it on a batch keeps in memory."""

    layer: Layer
    weights: int
    """Bytes of its parameters."""
    activations: int
    """Bytes that autograd saves of it for the whole batch."""


def training_memory(
    config: UNetConfig,
    in_channels: int,
    height: int,
    width: int,
    *,
    batch_size: int,
    precision: Precision,
    optimizer: Literal["sgd", "adamw"] = "sgd",
    momentum: float = 0.9,
    device: Device = "cpu",
) -> MemoryEstimate:
    """Peak of one step: forward, backward, optimizer; gradients set to None between steps; without torch.compile.

    `precision` is that of autocast: weights, their gradients and the optimizer's state are float32. ValueError if the
    network cannot exist at this size.
    """
    costs = layer_costs(config, in_channels, height, width, batch_size=batch_size, precision=precision, device=device)
    weights = sum(cost.weights for cost in costs)
    state = weights * {"sgd": 1 if momentum else 0, "adamw": 2}[optimizer]
    pixels = batch_size * height * width
    # Masks take a byte. The loop holds the images in float32, also where what autograd saves is autocast's copy.
    batch = pixels + (0 if precision == "float32" else pixels * in_channels * 4)
    peak = max(_backward(config, costs, batch_size, precision), key=lambda moment: moment.total)
    tensors = weights + state + batch + peak.total
    return MemoryEstimate(
        weights=weights,
        gradients=peak.gradients,
        optimizer=state,
        activations=peak.saved,
        workspace=batch + peak.maps + round(_ALLOWANCE * tensors),
    )


def saved_activations(
    config: UNetConfig,
    in_channels: int,
    height: int,
    width: int,
    *,
    batch_size: int,
    precision: Precision,
    device: Device = "cpu",
) -> int:
    """Bytes of all that autograd saves in the forward pass of one batch, apart from parameters and the loss's own."""
    costs = layer_costs(config, in_channels, height, width, batch_size=batch_size, precision=precision, device=device)
    return _images(costs[0].layer, batch_size, precision) + sum(cost.activations for cost in costs)


def layer_costs(
    config: UNetConfig,
    in_channels: int,
    height: int,
    width: int,
    *,
    batch_size: int,
    precision: Precision,
    device: Device = "cpu",
) -> list[LayerCost]:
    """Every layer with its shape, FLOPs, parameters and saved activations, in the order of the forward pass.

    A layer's activations are those it makes; the images are no layer's.
    """
    found = layers(config, in_channels, height, width)
    itemsize = _itemsize(precision)
    costs = []
    for layer, following in itertools.zip_longest(found, found[1:]):
        output = layer.channels * layer.height * layer.width
        saved = 0
        weight = 0
        if layer.kind == "convolution":
            weight = config.kernel_size**2 * layer.in_channels * layer.channels
            saved = batch_size * output * itemsize + _saved_by_norm(config, layer, batch_size, precision, device)
        elif layer.kind == "pool":
            saved = batch_size * output * (itemsize + 8)
        elif layer.kind == "up":
            weight = 4 * layer.in_channels * layer.channels
            saved = batch_size * following.in_channels * following.in_height * following.in_width * itemsize
        elif layer.kind == "head":
            weight = layer.in_channels
        if precision != "float32":
            saved += itemsize * weight
        costs.append(LayerCost(layer=layer, weights=4 * layer.n_parameters, activations=saved))
    return costs


def inference_memory(
    config: UNetConfig, in_channels: int, height: int, width: int, *, batch_size: int, precision: Precision
) -> int:
    """Peak bytes of a forward pass without gradients: weights, images, feature maps that are alive at once."""
    found = layers(config, in_channels, height, width)
    # Under autocast weights and images are there in both precisions.
    itemsize = 4 if precision == "float32" else 4 + _itemsize(precision)
    numbers = sum(layer.n_parameters for layer in found) + batch_size * in_channels * height * width
    maps = _itemsize(precision) * batch_size * max(_forward(config, found))
    return round((1 + _ALLOWANCE) * (itemsize * numbers + maps))


@dataclass(frozen=True)
class _Moment:
    """Bytes alive at one moment of the backward pass, apart from what is alive during the whole step."""

    saved: int
    maps: int
    """Gradients of feature maps, and the loss."""
    gradients: int

    @property
    def total(self) -> int:
        return self.saved + self.maps + self.gradients


def _backward(config: UNetConfig, costs: list[LayerCost], batch_size: int, precision: Precision) -> Iterator[_Moment]:
    """The moments at which memory can be highest, from the loss to the optimizer's step."""
    itemsize = _itemsize(precision) * batch_size
    saved = _images(costs[0].layer, batch_size, precision) + sum(cost.activations for cost in costs)
    # Logits, masks and the logits' gradient, in float32.
    loss = 3 * 4 * batch_size * costs[-1].layer.height * costs[-1].layer.width
    gradients = 0
    waiting: list[int] = []
    for cost in reversed(costs):
        layer = cost.layer
        output = itemsize * layer.channels * layer.height * layer.width
        source = itemsize * layer.in_channels * layer.in_height * layer.in_width
        held = sum(waiting)
        gradients += cost.weights
        if layer.kind == "convolution":
            # ReLU, normalisation, convolution: at each one gradient comes from another, then what it saved goes.
            yield _Moment(saved, held + 2 * output, gradients)
            saved -= cost.activations
            input_of_norm = 0 if config.norm == "none" else output
            yield _Moment(saved + input_of_norm, held + 2 * output, gradients)
            yield _Moment(saved, held + output + source, gradients)
        elif layer.kind == "up":
            saved -= cost.activations
            # The skip's half of the joined gradient waits for the encoder, and holds the other half with it.
            waiting.append(2 * output)
            yield _Moment(saved, held + 2 * output + output + source, gradients)
        elif layer.kind == "pool":
            saved -= cost.activations
            yield _Moment(saved, held + 2 * source, gradients)
            waiting.pop()
        else:
            saved -= cost.activations
            yield _Moment(saved, loss + source, gradients)
    yield _Moment(0, 0, gradients)


def _forward(config: UNetConfig, found: list[Layer]) -> Iterator[int]:
    """Numbers in the feature maps of one image that are alive in each layer of a forward pass without gradients."""
    # The convolution's output beside the normalisation's; those per image change the layout and back.
    outputs = {"none": 1, "batch": 2, "group": 3, "instance": 3}[config.norm]
    skips: list[int] = []
    given = 0
    for previous, layer in zip([None, *found], found, strict=False):
        output = layer.channels * layer.height * layer.width
        source = layer.in_channels * layer.in_height * layer.in_width
        if layer.kind == "convolution":
            # What a stack was given stays with its caller until the stack is done.
            inside = source if previous is not None and previous.kind == "convolution" else 0
            yield sum(skips) + given + inside + outputs * output
        elif layer.kind == "pool":
            skips.append(source)
            given = output
            yield sum(skips) + output
        elif layer.kind == "up":
            skip = skips.pop()
            given = source + skip + 2 * output
            yield sum(skips) + given + output
        else:
            yield source + output


def _saved_by_norm(config: UNetConfig, layer: Layer, batch_size: int, precision: Precision, device: Device) -> int:
    """Bytes that the normalisation of a convolution's output saves: its input, means and deviations."""
    if config.norm == "none":
        return 0
    # On CUDA autocast has group normalisation compute in float32.
    widened = config.norm == "group" and device == "cuda"
    pixels = batch_size * layer.channels * layer.height * layer.width
    numbers = {
        "batch": 2 * layer.channels,
        "group": 2 * batch_size * norm_groups(layer.channels),
        "instance": 3 * batch_size * layer.channels,  # its scale too, once for each image
    }[config.norm]
    return pixels * (4 if widened else _itemsize(precision)) + 4 * numbers


def _images(first: Layer, batch_size: int, precision: Precision) -> int:
    return batch_size * first.in_channels * first.in_height * first.in_width * _itemsize(precision)


def _itemsize(precision: Precision) -> int:
    return 4 if precision == "float32" else 2
