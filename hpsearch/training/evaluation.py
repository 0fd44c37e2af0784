"""Evaluation of a network: logits of cached images, pixel counts, and batch sizes."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from hpsearch.data.batches import Batch
from hpsearch.models.network import margin_of
from hpsearch.training.losses import Loss
from hpsearch.training.metrics import count_pixels
from hpsearch.training.runtime import Runtime

Indices = npt.NDArray[np.int64]
Forward = Callable[[Tensor], Tensor]


class Evaluation(NamedTuple):
    """Result of evaluating a network on a set of images."""

    counts: npt.NDArray[np.int64]
    """Pixel counts tp, fp, fn, tn of every image, (n, 4)."""
    loss: float
    """Mean loss over the images; NaN if no loss function was given."""


def evaluate(model: Forward, batches: Iterable[Batch], runtime: Runtime, loss: Loss | None = None) -> Evaluation:
    """Return the pixel counts and the mean loss of `model`, both computed at the size of the masks.

    `batches` come from `eval_batches`. The caller must set `model` to evaluation mode. The batch size changes the
    result only by rounding. The CPU waits for the device once, at the end.
    """
    losses: list[Tensor] = []
    counts: list[Tensor] = []
    for logits, masks in predict_logits(model, batches, runtime):
        counts.append(count(logits, masks))
        if loss is not None:
            losses.append(loss(logits, masks) * len(masks))
    return fetch(counts, losses)


def predict_logits(
    model: Forward, batches: Iterable[Batch], runtime: Runtime, *, flips: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the logits (float32) and masks (uint8) of each batch, both (B, 1, H, W) at the size of the masks.

    The caller must set `model` to evaluation mode. If the model has a margin (`output_margin`), the masks are cropped
    to the area that the logits cover. With `flips`, the logits are averaged over flips (`mean_over_flips`).
    """
    margin = margin_of(model)
    for batch in batches:
        with torch.inference_mode():
            with runtime.autocast():
                logits = mean_over_flips(model, batch.images) if flips else model(batch.images)
            masks = covered(batch.masks, logits, margin)
            logits = resize_logits(logits.float(), (masks.shape[-2], masks.shape[-1]))
        runtime.end_step()
        yield logits, masks


def mean_over_flips(forward: Forward, images: Tensor) -> Tensor:
    """Return the logits of `images` (B, C, H, W), averaged over the images and their three flipped versions.

    The logits of each flipped version are flipped back before they are averaged.
    """
    total = forward(images)
    for axes in ((-1,), (-2,), (-2, -1)):
        total = total + forward(images.flip(axes)).flip(axes)
    return total / 4


def covered(masks: Tensor, logits: Tensor, margin: int) -> Tensor:
    """Crop `masks` (B, 1, H, W) to the area that `logits` (B, 1, h, w) cover.

    The logits start `margin` pixels from the top and left edges of the masks. If `margin` is 0, the masks are not
    cropped.
    """
    if not margin:
        return masks
    height, width = logits.shape[-2:]
    return masks[..., margin : margin + height, margin : margin + width]


def resize_logits(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize logits (B, 1, H, W) to `size` by antialiased bilinear interpolation, unless they have that size."""
    if logits.shape[-2:] == size:
        return logits
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False, antialias=True)


def eval_batch_size(batch_size: int, size: tuple[int, int], device: torch.device) -> int:
    """Return the number of images per batch in evaluation.

    On a GPU it is four times the training batch size, because evaluation saves no activations. On a CPU it is the
    training batch size. Batches of small images are larger: they have up to 2**20 pixels on a GPU and up to 2**17 on
    a CPU, where the feature maps should not be much larger than the processor's caches. At 64x64 on a CPU, batches of
    32 images are 10 % faster than batches of 16.
    """
    n_pixels = size[0] * size[1]
    if device.type == "cuda":
        return max(4 * batch_size, 2**20 // n_pixels)
    return max(batch_size, 2**17 // n_pixels)


def count(logits: Tensor, masks: Tensor) -> Tensor:
    """Return tp, fp, fn, tn of each image, (B, 4) int64 on the device, for a threshold of 0.5 on the probability."""
    return torch.stack(count_pixels(logits > 0, masks), dim=1)


def fetch(counts: list[Tensor], losses: list[Tensor]) -> Evaluation:
    """Copy the counts and losses of all batches to the CPU, and return all counts and the mean loss.

    Each element of `counts` is (B, 4). Each element of `losses` is the sum of the losses of a batch's images.
    """
    table: npt.NDArray[np.int64] = torch.cat(counts).cpu().numpy()
    # Sum on the CPU, because not every device supports float64.
    total = float(torch.stack(losses).cpu().double().sum()) if losses else math.nan
    return Evaluation(table, total / len(table))
