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

On the CPU a process takes more than its tensors. glibc gives each block of 32 MiB and more memory of its own and
returns it when the block is freed. Smaller blocks lie on the heap, which never gives back what lies between blocks in
use: so the peak is the most that the large blocks ever take, and beside it the most that the small ones ever take,
also where that is at another moment, and a part of the latter for the gaps. (With a fixed, low
`MALLOC_MMAP_THRESHOLD_` measured memory is that of the tensors to within 1 %. But every step then pays for fresh
pages: 20 to 40 % of its time.)
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from hpsearch.config.model import UNetConfig
from hpsearch.models.shapes import Layer, layers, norm_groups

Precision = Literal["float32", "bf16", "fp16"]
Device = Literal["cpu", "cuda"]

_ALLOWANCE = 0.05
"""What the kernels' scratch memory and the allocator's gaps add to the tensors, but for training on the CPU."""
_OWN_MEMORY = 32 * 2**20
"""Blocks of at least so many bytes are not on glibc's heap, once it has adapted to the sizes that it sees."""
_GAPS = {"none": 0.15, "batch": 0.15, "group": 0.6, "instance": 0.5}
"""Of the heap, beside what is in use at its fullest, as measured: the latter two copy whole maps in between."""


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
    saved: tuple[int, ...]
    """Bytes of each tensor that autograd saves of it for the whole batch."""

    @property
    def activations(self) -> int:
        """Bytes that autograd saves of it."""
        return sum(self.saved)


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
    # Masks take a byte. The loop holds the images in float32, also where what autograd saves is autocast's copy; and
    # the logits, until the next ones are there.
    logits = pixels * _itemsize(precision)
    batch = pixels + logits + (0 if precision == "float32" else pixels * in_channels * 4)
    moments = list(_backward(config, costs, batch_size, precision, device))
    peak = max(moments, key=lambda moment: moment.total)
    total = weights + state + batch + peak.total
    if device == "cpu":
        always = _blocks(pixels, logits, batch - pixels - logits)
        heap = max(moment.bytes.heap for moment in moments) + always.heap
        own = max(moment.bytes.own for moment in moments) + always.own
        total = weights + state + own + round((1 + _GAPS[config.norm]) * heap)
    else:
        total += round(_ALLOWANCE * total)
    return MemoryEstimate(
        weights=weights,
        gradients=peak.gradients.total,
        optimizer=state,
        activations=peak.saved.total,
        workspace=total - weights - peak.gradients.total - state - peak.saved.total,
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
        saved: tuple[int, ...] = ()
        weight = 0
        if layer.kind == "convolution":
            weight = config.kernel_size**2 * layer.in_channels * layer.channels
            by_norm = _saved_by_norm(config, layer, batch_size, precision, device)
            saved = (batch_size * output * itemsize, *by_norm)
        elif layer.kind == "pool":
            saved = (batch_size * output * itemsize, batch_size * output * 8)
        elif layer.kind == "up":
            weight = 4 * layer.in_channels * layer.channels
            saved = (batch_size * following.in_channels * following.in_height * following.in_width * itemsize,)
        elif layer.kind == "head":
            weight = layer.in_channels
        if precision != "float32" and weight:
            saved = (*saved, itemsize * weight)
        costs.append(LayerCost(layer=layer, weights=4 * layer.n_parameters, saved=saved))
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


class _Bytes(NamedTuple):
    """Bytes on the heap and in blocks of their own."""

    heap: int = 0
    own: int = 0

    @property
    def total(self) -> int:
        return self.heap + self.own

    def plus(self, other: _Bytes) -> _Bytes:
        return _Bytes(self.heap + other.heap, self.own + other.own)

    def minus(self, other: _Bytes) -> _Bytes:
        return _Bytes(self.heap - other.heap, self.own - other.own)


def _blocks(*sizes: int) -> _Bytes:
    own = sum(size for size in sizes if size >= _OWN_MEMORY)
    return _Bytes(sum(sizes) - own, own)


@dataclass(frozen=True)
class _Moment:
    """What is alive at one moment of the backward pass, apart from what is alive during the whole step."""

    saved: _Bytes
    maps: _Bytes
    """Gradients of feature maps, and the loss."""
    gradients: _Bytes

    @property
    def bytes(self) -> _Bytes:
        return self.saved.plus(self.maps).plus(self.gradients)

    @property
    def total(self) -> int:
        return self.bytes.total


def _backward(
    config: UNetConfig, costs: list[LayerCost], batch_size: int, precision: Precision, device: Device
) -> Iterator[_Moment]:
    """The moments at which memory can be highest, from the loss to the optimizer's step."""
    itemsize = _itemsize(precision) * batch_size
    saved = _blocks(
        _images(costs[0].layer, batch_size, precision), *itertools.chain.from_iterable(cost.saved for cost in costs)
    )
    # Logits, masks and the logits' gradient, in float32.
    loss = (4 * batch_size * costs[-1].layer.height * costs[-1].layer.width,) * 3
    gradients = _Bytes()
    waiting: list[_Bytes] = []
    for cost in reversed(costs):
        layer = cost.layer
        output = itemsize * layer.channels * layer.height * layer.width
        source = itemsize * layer.in_channels * layer.in_height * layer.in_width
        held = functools.reduce(_Bytes.plus, waiting, _Bytes())
        gradients = gradients.plus(_blocks(cost.weights))
        own = _blocks(*cost.saved)
        if layer.kind == "convolution":
            # ReLU, normalisation, convolution: at each one gradient comes from another, then what it saved goes.
            yield _Moment(saved, held.plus(_blocks(output, output)), gradients)
            saved = saved.minus(own)
            input_of_norm = _Bytes() if config.norm == "none" else _blocks(output)
            yield _Moment(saved.plus(input_of_norm), held.plus(_blocks(output, output)), gradients)
            # The CPU's kernels have the weights and their gradient laid out in a way of their own.
            weights = _itemsize(precision) * config.kernel_size**2 * layer.in_channels * layer.channels
            copies = (weights,) * (2 if device == "cpu" else 0)
            yield _Moment(saved, held.plus(_blocks(output, source, *copies)), gradients)
        elif layer.kind == "up":
            saved = saved.minus(own)
            # The skip's half of the joined gradient waits for the encoder, and holds the other half with it.
            waiting.append(_blocks(2 * output))
            yield _Moment(saved, held.plus(_blocks(2 * output, output, source)), gradients)
        elif layer.kind == "pool":
            saved = saved.minus(own)
            yield _Moment(saved, held.plus(_blocks(source, source)), gradients)
            waiting.pop()
        else:
            saved = saved.minus(own)
            yield _Moment(saved, _blocks(*loss, source), gradients)
    yield _Moment(_Bytes(), _Bytes(), gradients)


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


def _saved_by_norm(
    config: UNetConfig, layer: Layer, batch_size: int, precision: Precision, device: Device
) -> tuple[int, ...]:
    """Bytes that the normalisation of a convolution's output saves: its input; its means and deviations."""
    if config.norm == "none":
        return ()
    # On CUDA autocast has group normalisation compute in float32.
    widened = config.norm == "group" and device == "cuda"
    pixels = batch_size * layer.channels * layer.height * layer.width
    numbers = {
        "batch": 2 * layer.channels,
        "group": 2 * batch_size * norm_groups(layer.channels),
        "instance": 3 * batch_size * layer.channels,  # its scale too, once for each image
    }[config.norm]
    return pixels * (4 if widened else _itemsize(precision)), 4 * numbers


def _images(first: Layer, batch_size: int, precision: Precision) -> int:
    return batch_size * first.in_channels * first.in_height * first.in_width * _itemsize(precision)


def _itemsize(precision: Precision) -> int:
    return 4 if precision == "float32" else 2
