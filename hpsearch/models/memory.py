"""Peak memory of a training step of the UNet, by arithmetic from the shapes of its layers.

The tensors that autograd saves in the forward pass are counted, each storage once:

- the images, as the first convolution reads them;
- for each convolution the output of the ReLU, which works in place; with normalisation also its input, means and
  standard deviations;
- for each pooling its output and the indices of the maxima, 8 bytes each;
- for each up-sampling the concatenation of skip and up-sampled map, which the next convolution reads;
- under autocast the copies of the weights in 16 bits.

Everything else that a gradient needs is one of these maps. With the weights this is the memory calculation of the
report (`valid`, RGB, 572x572, float32, no normalisation): 5.50 GiB for base 32 and batch 16, 21.90 GiB for batch 64,
10.99 GiB for base 64 and batch 16.

On the CPU a process takes more memory than its tensors. glibc maps each block of 32 MiB or more separately and
returns it to the system when it is freed. Smaller blocks lie on the heap, which cannot return memory between blocks
in use. The peak is therefore the maximum of the large blocks plus the maximum of the small blocks, even if the two
occur at different moments, plus a share of the heap for gaps. (With a fixed, low `MALLOC_MMAP_THRESHOLD_` the
measured memory is that of the tensors to within 1 %, but page faults then take 20 to 40 % of each step.)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NotRequired, TypedDict, Unpack

from hpsearch.config.model import UNetConfig
from hpsearch.models.shapes import Layer, layers, norm_groups

Precision = Literal["float32", "bf16", "fp16"]
Device = Literal["cpu", "cuda"]
Optimizer = Literal["sgd", "adamw"]


class LayerOptions(TypedDict):
    """Keyword arguments that decide the memory of a layer."""

    batch_size: int
    precision: Precision
    device: NotRequired[Device]


class StepOptions(LayerOptions):
    """Keyword arguments that decide the memory of a training step."""

    optimizer: NotRequired[Optimizer]
    momentum: NotRequired[float]


_ALLOWANCE = 0.05
"""Share added on a GPU for scratch memory of the kernels and gaps of the allocator."""
_OWN_MEMORY = 32 * 2**20
"""Smallest block in bytes that glibc maps separately once it has adapted to the sizes that occur."""
_GAPS = {"none": 0.15, "batch": 0.15, "group": 0.6, "instance": 0.5}
"""Share of the heap added for gaps, as measured; group and instance normalisation copy whole maps."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Memory in use at the peak of a training step, in bytes."""

    weights: int
    gradients: int
    """Gradients of the weights; mostly small, because the peak is usually at the start of the backward pass."""
    optimizer: int
    activations: int
    """Tensors that autograd has saved and not yet released."""
    workspace: int
    """The batch, the loss, gradients of feature maps, and an allowance for allocator and kernels."""

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.workspace


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """One layer of the network and the memory that training it on a batch takes."""

    layer: Layer
    weights: int
    """Bytes of its parameters."""
    saved: tuple[int, ...]
    """Bytes of each tensor that autograd saves for it, for the whole batch."""

    @property
    def activations(self) -> int:
        """Bytes that autograd saves for it."""
        return sum(self.saved)


def training_memory(
    config: UNetConfig,
    in_channels: int,
    height: int,
    width: int,
    *,
    batch_size: int,
    precision: Precision,
    optimizer: Optimizer = "sgd",
    momentum: float = 0.9,
    device: Device = "cpu",
) -> MemoryEstimate:
    """Return the peak of one step without torch.compile; gradients are set to None between steps.

    `precision` is that of autocast; weights, gradients and optimizer state are float32. ValueError if the network
    cannot exist at this size.
    """
    costs = layer_costs(config, in_channels, height, width, batch_size=batch_size, precision=precision, device=device)
    weights = sum(cost.weights for cost in costs)
    state = weights * state_factor(optimizer, momentum)
    pixels = batch_size * height * width
    # Masks take one byte per pixel. The loop holds the images in float32, even where autograd saves a 16-bit copy,
    # and the logits until those of the next batch exist.
    logits = pixels * itemsize(precision)
    images = 0 if precision == "float32" else pixels * in_channels * 4
    moments = list(_backward(config, costs, batch_size, precision, device))
    peak = max(moments, key=lambda moment: moment.total)
    if device == "cpu":
        batch = _blocks(pixels, logits, images)
        heap = max(moment.bytes.heap for moment in moments) + batch.heap
        own = max(moment.bytes.own for moment in moments) + batch.own
        total = weights + state + own + round((1 + _GAPS[config.norm]) * heap)
    else:
        total = weights + state + pixels + logits + images + peak.total
        total += round(_ALLOWANCE * total)
    return MemoryEstimate(
        weights=weights,
        gradients=peak.gradients.total,
        optimizer=state,
        activations=peak.saved.total,
        workspace=total - weights - peak.gradients.total - state - peak.saved.total,
    )


def saved_activations(
    config: UNetConfig, in_channels: int, height: int, width: int, **options: Unpack[LayerOptions]
) -> int:
    """Return the bytes that autograd saves in the forward pass of one batch, without parameters and the loss."""
    costs = layer_costs(config, in_channels, height, width, **options)
    images = _images(costs[0].layer, options["batch_size"], options["precision"])
    return images + sum(cost.activations for cost in costs)


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
    """Return every layer with its parameters and saved activations, in the order of the forward pass.

    The activations of a layer are its outputs; the images belong to no layer.
    """
    found = layers(config, in_channels, height, width)
    size = itemsize(precision)
    costs = []
    for layer, following in itertools.zip_longest(found, found[1:]):
        saved: tuple[int, ...] = ()
        if layer.kind == "convolution":
            by_norm = _saved_by_norm(config, layer, batch_size, precision, device)
            saved = (batch_size * layer.n_outputs * size, *by_norm)
        elif layer.kind == "pool":
            saved = (batch_size * layer.n_outputs * size, batch_size * layer.n_outputs * 8)
        elif layer.kind == "up":
            saved = (batch_size * following.n_inputs * size,)
        if precision != "float32" and layer.n_taps:
            saved = (*saved, size * layer.n_taps)
        costs.append(LayerCost(layer=layer, weights=4 * layer.n_parameters, saved=saved))
    return costs


def state_factor(optimizer: Optimizer, momentum: float) -> int:
    """Return how many numbers the optimizer keeps for each weight."""
    return {"sgd": 1 if momentum else 0, "adamw": 2}[optimizer]


def itemsize(precision: Precision) -> int:
    """Return the bytes of one number."""
    return 4 if precision == "float32" else 2


@dataclass(frozen=True)
class _Bytes:
    """Bytes on the heap and in separately mapped blocks."""

    heap: int = 0
    own: int = 0

    @property
    def total(self) -> int:
        return self.heap + self.own

    def __add__(self, other: _Bytes) -> _Bytes:
        return _Bytes(self.heap + other.heap, self.own + other.own)

    def __sub__(self, other: _Bytes) -> _Bytes:
        return _Bytes(self.heap - other.heap, self.own - other.own)


def _blocks(*sizes: int) -> _Bytes:
    own = sum(size for size in sizes if size >= _OWN_MEMORY)
    return _Bytes(sum(sizes) - own, own)


@dataclass(frozen=True)
class _Moment:
    """Memory in use at one moment of the backward pass, without what is in use during the whole step."""

    saved: _Bytes
    maps: _Bytes
    """Gradients of feature maps, and the loss."""
    gradients: _Bytes

    @property
    def bytes(self) -> _Bytes:
        return self.saved + self.maps + self.gradients

    @property
    def total(self) -> int:
        return self.bytes.total


def _backward(
    config: UNetConfig, costs: list[LayerCost], batch_size: int, precision: Precision, device: Device
) -> Iterator[_Moment]:
    """Yield the moments at which memory may be highest, from the loss to the step of the optimizer."""
    size = itemsize(precision) * batch_size
    saved = _blocks(_images(costs[0].layer, batch_size, precision), *(each for cost in costs for each in cost.saved))
    gradients = _Bytes()
    waiting: list[_Bytes] = []
    for cost in reversed(costs):
        layer = cost.layer
        output, source = size * layer.n_outputs, size * layer.n_inputs
        held = sum(waiting, _Bytes())
        gradients += _blocks(cost.weights)
        before, saved = saved, saved - _blocks(*cost.saved)
        if layer.kind == "convolution":
            # Each of ReLU, normalisation and convolution holds two gradients, then its saved tensors are released.
            held_by_both = held + _blocks(output, output)
            yield _Moment(before, held_by_both, gradients)
            yield _Moment(saved if config.norm == "none" else saved + _blocks(output), held_by_both, gradients)
            # The CPU kernels copy the weights and their gradient into a layout of their own.
            copies = (itemsize(precision) * layer.n_taps,) * (2 if device == "cpu" else 0)
            yield _Moment(saved, held + _blocks(output, source, *copies), gradients)
        elif layer.kind == "up":
            # The skip's half of the gradient waits for the encoder, and keeps the other half alive.
            waiting.append(_blocks(2 * output))
            yield _Moment(saved, held + _blocks(2 * output, output, source), gradients)
        elif layer.kind == "pool":
            yield _Moment(saved, held + _blocks(source, source), gradients)
            waiting.pop()
        else:
            # The loss: logits, masks and the gradient of the logits, in float32.
            loss = 4 * batch_size * costs[-1].layer.height * costs[-1].layer.width
            yield _Moment(saved, _blocks(loss, loss, loss, source), gradients)
    yield _Moment(_Bytes(), _Bytes(), gradients)


def _saved_by_norm(
    config: UNetConfig, layer: Layer, batch_size: int, precision: Precision, device: Device
) -> tuple[int, ...]:
    """Return the bytes that the normalisation after a convolution saves: its input, and its statistics."""
    if config.norm == "none":
        return ()
    n_statistics = {
        "batch": 2 * layer.channels,
        "group": 2 * batch_size * norm_groups(layer.channels),
        # Instance normalisation also saves its scale once per image.
        "instance": 3 * batch_size * layer.channels,
    }[config.norm]
    # On CUDA, autocast computes group normalisation in float32.
    size = 4 if config.norm == "group" and device == "cuda" else itemsize(precision)
    return batch_size * layer.n_outputs * size, 4 * n_statistics


def _images(first: Layer, batch_size: int, precision: Precision) -> int:
    return batch_size * first.n_inputs * itemsize(precision)
