"""Calculation of the peak memory of a UNet training step from the shapes of its layers.

The calculation counts the tensors that autograd saves in the forward pass, each storage once:

- the images, in the precision of the first convolution;
- for each convolution, the output of the in-place ReLU; with normalisation, also the input of the normalisation, its
  means and its standard deviations;
- for each pooling, its output and the indices of the maxima, 8 bytes each;
- for each up-sampling, the concatenation of skip connection and up-sampled map, which is the input of the next
  convolution;
- under autocast, the 16-bit copies of the weights.

The backward pass needs no other tensors from the forward pass. For the network of the source report (see README.md;
`valid`, RGB, 572x572, float32, no normalisation), these tensors and the weights take 5.50 GiB with base 32 and batch
16, 21.90 GiB with base 32 and batch 64, and 10.99 GiB with base 64 and batch 16.

On a CPU, a process takes more memory than its tensors. glibc maps each block of 32 MiB or more separately and returns
it to the system when it is freed. Smaller blocks are on the heap, which cannot return free memory between blocks in
use. The peak is therefore the maximum of the large blocks plus the maximum of the small blocks, even if the two occur
at different moments, plus a fraction of the heap for fragmentation. (With a fixed, low `MALLOC_MMAP_THRESHOLD_` the
measured memory equals that of the tensors to within 1 %, but page faults then take 20 to 40 % of each step.)
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from hpsearch.config.model import UNetConfig
from hpsearch.models.shapes import Layer, layers, norm_groups

_ALLOWANCE = 0.05
"""Fraction of the memory that is added on a GPU for the workspace of kernels and for fragmentation."""
_OWN_MEMORY = 32 * 2**20
"""Smallest block in bytes that glibc maps separately, after it has adapted its threshold to the blocks of a fit."""
_GAPS = {"none": 0.15, "batch": 0.15, "group": 0.6, "instance": 0.5}
"""Measured fraction of the heap that is added for fragmentation. Group and instance normalisation copy whole maps."""
_Moment = tuple[list[int], list[int], list[int]]


@dataclass(frozen=True, kw_only=True)
class Step:
    """Settings besides network and image size that determine the memory of a training step."""

    batch_size: int
    precision: str
    """Precision of autocast: float32, bf16 or fp16. Weights, gradients and optimizer state are always float32."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    device: str = "cpu"
    """Type of the device: `cpu` or `cuda`."""

    @property
    def itemsize(self) -> int:
        """Number of bytes per element of an activation."""
        return 4 if self.precision == "float32" else 2

    @property
    def state_factor(self) -> int:
        """Number of values that the optimizer keeps for each weight."""
        return 2 if self.optimizer == "adamw" else int(self.momentum > 0)


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Estimated memory in use at the peak of a training step, in bytes."""

    weights: int
    gradients: int
    """Size of the weights' gradients that exist at the peak. There are few, because the peak is usually at the start
    of the backward pass."""
    optimizer: int
    activations: int
    """Size of the tensors that autograd has saved and not yet released at the peak."""
    workspace: int
    """Size of the batch, the loss and the gradients of feature maps, and an allowance for the allocator and the
    kernels."""

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.workspace


class LayerCost(NamedTuple):
    """A layer of the network and the tensors that autograd saves for it."""

    layer: Layer
    saved: list[int]
    """Sizes in bytes of the saved tensors, for the whole batch."""


def training_memory(config: UNetConfig, in_channels: int, height: int, width: int, step: Step) -> MemoryEstimate:
    """Return the peak memory of one training step without torch.compile.

    Gradients are assumed to be set to None between steps. Raises ValueError if the network is impossible at this
    size.
    """
    costs = layer_costs(config, in_channels, height, width, step)
    weights = 4 * sum(cost.layer.n_parameters for cost in costs)
    state = weights * step.state_factor
    pixels = step.batch_size * height * width
    # Masks take one byte per pixel. The training loop keeps the images in float32, even if autograd saves a 16-bit
    # copy. It keeps the logits until the logits of the next batch exist.
    images = 0 if step.precision == "float32" else pixels * in_channels * 4
    batch = [pixels, pixels * step.itemsize, images]
    moments = list(_backward(config, costs, step))
    saved, maps, gradients = max(([sum(part) for part in moment] for moment in moments), key=sum)
    if step.device == "cpu":
        blocks = [[*batch, *itertools.chain(*moment)] for moment in moments]
        own = max(sum(size for size in sizes if size >= _OWN_MEMORY) for sizes in blocks)
        heap = max(sum(size for size in sizes if size < _OWN_MEMORY) for sizes in blocks)
        total = weights + state + own + round((1 + _GAPS[config.norm]) * heap)
    else:
        total = weights + state + sum(batch) + saved + maps + gradients
        total += round(_ALLOWANCE * total)
    workspace = total - weights - gradients - state - saved
    return MemoryEstimate(
        weights=weights, gradients=gradients, optimizer=state, activations=saved, workspace=workspace
    )


def saved_activations(config: UNetConfig, in_channels: int, height: int, width: int, step: Step) -> int:
    """Return the bytes that autograd saves in the forward pass of one batch, excluding parameters and the loss."""
    costs = layer_costs(config, in_channels, height, width, step)
    return _image_bytes(costs, step) + sum(sum(cost.saved) for cost in costs)


def layer_costs(config: UNetConfig, in_channels: int, height: int, width: int, step: Step) -> list[LayerCost]:
    """Return all layers with the tensors that autograd saves for them, in the order of the forward pass.

    The output of a layer is listed with that layer. The input images are not listed.
    """
    found = layers(config, in_channels, height, width)
    size = step.batch_size * step.itemsize
    costs = []
    for layer, following in itertools.zip_longest(found, found[1:]):
        saved = []
        if layer.kind == "convolution":
            saved = [size * layer.n_outputs, *_saved_by_norm(config, layer, step)]
        elif layer.kind == "pool":
            saved = [size * layer.n_outputs, step.batch_size * layer.n_outputs * 8]
        elif layer.kind == "up":
            saved = [size * following.n_inputs]
        if step.precision != "float32" and layer.n_taps:
            saved.append(step.itemsize * layer.n_taps)
        costs.append(LayerCost(layer, saved))
    return costs


def _backward(config: UNetConfig, costs: list[LayerCost], step: Step) -> Iterator[_Moment]:
    """Yield the memory in use at each possible peak, from the loss to the optimizer step.

    Each item has three lists of block sizes in bytes: tensors that autograd saved, gradients of feature maps and the
    loss, and gradients of the weights. Blocks that exist during the whole step are left out.
    """
    saved = [_image_bytes(costs, step), *itertools.chain.from_iterable(cost.saved for cost in costs)]
    gradients: list[int] = []
    waiting: list[int] = []
    for layer, own in reversed(costs):
        output, source = (step.itemsize * step.batch_size * n for n in (layer.n_outputs, layer.n_inputs))
        gradients = [*gradients, 4 * layer.n_parameters]
        before, saved = saved, saved[: len(saved) - len(own)]
        if layer.kind == "convolution":
            # ReLU, normalisation and convolution each need two gradients at once. Their saved tensors are then
            # released.
            held_by_both = [*waiting, output, output]
            yield (before, held_by_both, gradients)
            yield (saved if config.norm == "none" else [*saved, output], held_by_both, gradients)
            # The CPU kernels copy the weights and their gradient into their own layout.
            copies = [step.itemsize * layer.n_taps] * (2 if step.device == "cpu" else 0)
            yield (saved, [*waiting, output, source, *copies], gradients)
        elif layer.kind == "up":
            # The gradient of the concatenation is one block. The encoder's backward pass needs its skip half later,
            # so the whole block stays in memory.
            waiting = [*waiting, 2 * output]
            yield (saved, [*waiting, output, source], gradients)
        elif layer.kind == "pool":
            yield (saved, [*waiting, source, source], gradients)
            waiting = waiting[:-1]
        else:
            # The loss: logits, masks and the gradient of the logits, in float32.
            loss = 4 * step.batch_size * costs[-1].layer.height * costs[-1].layer.width
            yield (saved, [loss, loss, loss, source], gradients)
    yield ([], [], gradients)


def _saved_by_norm(config: UNetConfig, layer: Layer, step: Step) -> list[int]:
    """Return the sizes in bytes of the tensors that the normalisation of a layer saves: input and statistics."""
    if config.norm == "none":
        return []
    n_statistics = {
        "batch": 2 * layer.channels,
        "group": 2 * step.batch_size * norm_groups(layer.channels),
        # Instance normalisation also saves its scale once per image.
        "instance": 3 * step.batch_size * layer.channels,
    }[config.norm]
    # On CUDA, autocast computes group normalisation in float32.
    size = 4 if config.norm == "group" and step.device == "cuda" else step.itemsize
    return [step.batch_size * layer.n_outputs * size, 4 * n_statistics]


def _image_bytes(costs: list[LayerCost], step: Step) -> int:
    return step.batch_size * costs[0].layer.n_inputs * step.itemsize
