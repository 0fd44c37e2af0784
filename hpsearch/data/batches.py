"""Yield batches for training and evaluation on the device.

The order and the augmentation of training batches depend only on the seed and the epoch.

A batch is gathered as uint8, augmented as a whole (augment.py) and normalised with one multiply-add, so there is no
Python loop over images. Batches stay (B, H, W, 3) until the end. Permuting the axes then gives channels-last
(B, C, H, W) without a copy.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpsearch.config.data import AugmentConfig
from hpsearch.data.augment import augment_batch, draw_changes, to_gray
from hpsearch.data.cache import Cache, Normalization
from hpsearch.errors import CacheError, DatasetError


class Batch(NamedTuple):
    """Batch of images and masks for one training or evaluation step."""

    images: Tensor
    """(B, C, H, W) float, normalised, channels-last in memory."""
    masks: Tensor
    """(B, 1, H, W) uint8, 0 or 1."""


class DeviceData:
    """Images and masks of one cache, served as uint8 batches on a device.

    On a CUDA device, all images are copied to the GPU once if they fit into `resident_share` of its free memory. The
    rest is left for the network. Otherwise each batch is copied through pinned memory while the GPU computes. On the
    CPU, each batch is read from the cache.

    `truth` is an optional second cache of the same images, at the size at which predictions are scored. If it is
    given, `eval_batches` yields its masks instead of those of `cache`.
    """

    def __init__(
        self,
        cache: Cache,
        device: torch.device | str = "cpu",
        *,
        truth: Cache | None = None,
        resident_share: float = 0.25,
    ) -> None:
        if truth is not None and truth.ids != cache.ids:
            raise CacheError("the caches for training and evaluation contain different images")
        self.cache = cache
        self.truth = truth
        self.device = torch.device(device)
        self.size = cache.size
        """Height and width of the cached images."""
        self._resident: list[list[Tensor]] = []
        if self.device.type == "cuda":
            views = [False, True] if cache.has_held_out_view else [False]
            height, width = cache.size
            free_bytes, _ = torch.cuda.mem_get_info(self.device)
            if len(views) * len(cache) * height * width * 4 <= free_bytes * resident_share:
                self._resident = [_upload(cache, self.device, held_out=held_out) for held_out in views]
        self.is_resident = bool(self._resident)
        """Whether all images were copied to the memory of the CUDA device."""

    def __len__(self) -> int:
        return len(self.cache)

    def stream(
        self, batches: Sequence[NDArray[np.int64]], *, held_out: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images (B, H, W, 3) and masks (B, H, W) of each batch, uint8 on the device.

        Each item of `batches` contains the cache indices of one batch. `held_out` is described in `Cache.read`. The
        tensors are copies, so the caller may modify them in place.
        """
        if not batches:
            return
        if self._resident:
            images, masks = self._resident[-1 if held_out else 0]
            order = torch.from_numpy(np.concatenate(batches)).to(self.device)
            for rows in torch.split(order, [len(batch) for batch in batches]):
                yield images.index_select(0, rows), masks.index_select(0, rows)
        else:
            for batch in batches:
                read_images, read_masks = self.cache.read(batch, held_out=held_out)
                yield self.send(read_images), self.send(read_masks)

    def send(self, array: NDArray[np.uint8]) -> Tensor:
        """Copy `array` to the device and return it as a tensor. The copy to a CUDA device is asynchronous."""
        tensor = torch.from_numpy(array)
        if self.device.type != "cuda":
            return tensor.to(self.device)
        # The pinned tensor may be freed at once: its memory is reused only after the copy from it has finished.
        return tensor.pin_memory().to(self.device, non_blocking=True)


def train_batches(
    data: DeviceData,
    indices: NDArray[np.int64],
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    augment: AugmentConfig,
    normalization: Normalization,
    size: tuple[int, int],
) -> Iterator[Batch]:
    """Yield the augmented training batches of one epoch, at `size` (height, width).

    The images with the cache indices `indices` are shuffled. The order and the augmentation are drawn from a new
    generator seeded with (seed, epoch), so an epoch does not depend on earlier epochs. An incomplete last batch is
    dropped unless it is the only batch, because its few images would count as much as a full batch in the optimizer
    step and in batch normalisation.

    Raises DatasetError if `indices` is empty, and CacheError if the cached size does not fit `size`.
    """
    if len(indices) == 0:
        raise DatasetError("there are no images to train on")
    generator = np.random.default_rng((seed, epoch))
    order = generator.permutation(np.asarray(indices, dtype=np.int64))
    changes = draw_changes(augment, len(order), generator, from_size=data.size, to_size=size, device=data.device)
    finish = ToInput(normalization, data.device)
    starts = range(0, n_train_batches(len(order), batch_size) * batch_size, batch_size)
    rows = [slice(start, start + batch_size) for start in starts]
    for row, (images, masks) in zip(rows, data.stream([order[row] for row in rows]), strict=True):
        images, masks = augment_batch(images, masks, changes[row], size)
        yield Batch(finish(images), masks.unsqueeze(1))


def eval_batches(
    data: DeviceData,
    indices: NDArray[np.int64],
    *,
    batch_size: int,
    normalization: Normalization,
    size: tuple[int, int],
) -> Iterator[Batch]:
    """Yield the images with the cache indices `indices` in batches, in this order and without augmentation.

    The images have the size `size` (height, width). Larger cached images, as used with `augment.crop`, are cropped at
    the centre. If `data.truth` is set, the masks are read from it. Raises CacheError if the cached images are smaller
    than `size`.
    """
    height, width = size
    top, left = (data.size[0] - height) // 2, (data.size[1] - width) // 2
    if top < 0 or left < 0:
        raise CacheError(f"the cached images are {data.size[0]}x{data.size[1]}, smaller than {height}x{width}")
    finish = ToInput(normalization, data.device)
    batches = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    for batch, (images, masks) in zip(batches, data.stream(batches, held_out=True), strict=True):
        images = images[:, top : top + height, left : left + width]
        if data.truth is None:
            masks = masks[:, top : top + height, left : left + width]
        else:
            masks = data.send(data.truth.read(batch, held_out=True)[1])
        yield Batch(finish(images), masks.unsqueeze(1))


def n_train_batches(n_images: int, batch_size: int) -> int:
    """Return the number of batches that `train_batches` yields per epoch."""
    return max(n_images // batch_size, min(n_images, 1))


class ToInput:
    """Convert RGB images with values from 0 to 255 to the input of the network.

    The result is normalised, channels-last in memory, and has as many channels as `normalization`: three, or one for
    grayscale.
    """

    def __init__(self, normalization: Normalization, device: torch.device | str) -> None:
        self.is_gray = len(normalization.mean) == 1
        mean = torch.tensor(normalization.mean, dtype=torch.float64)
        std = torch.tensor(normalization.std, dtype=torch.float64)
        # (x / 255 - mean) / std = x * factor + shift
        self.factor = (1 / (255 * std)).float().to(device)
        self.shift = (-mean / std).float().to(device)

    def __call__(self, images: Tensor) -> Tensor:
        """Convert (B, H, W, 3) uint8 or (B, 3, H, W) float32 to (B, C, H, W) float32."""
        if self.is_gray:
            images = to_gray(images)
        if images.dtype != torch.uint8:
            return self.normalize(images)
        height, width = images.shape[1:3]
        # Process whole rows with a repeated factor. An inner dimension of 3 would prevent vectorisation and take 8
        # times as long at 64x64.
        rows = images.to(torch.float32).flatten(2)
        rows = torch.addcmul(self.shift.repeat(width), rows, self.factor.repeat(width))
        return rows.view(-1, height, width, 3).permute(0, 3, 1, 2)

    def normalize(self, planes: Tensor) -> Tensor:
        """Normalise (B, C, H, W) float32 with values from 0 to 255."""
        planes = torch.addcmul(self.shift.view(-1, 1, 1), planes, self.factor.view(-1, 1, 1))
        return planes.contiguous(memory_format=torch.channels_last)


def _upload(cache: Cache, device: torch.device, *, held_out: bool, chunk: int = 64) -> list[Tensor]:
    """Copy all images and masks of the cache to the device, `chunk` images at a time."""
    shape = (len(cache), *cache.size)
    whole = [torch.empty(each, dtype=torch.uint8, device=device) for each in ((*shape, 3), shape)]
    for start in range(0, len(cache), chunk):
        rows = np.arange(start, min(start + chunk, len(cache)))
        for target, array in zip(whole, cache.read(rows, held_out=held_out), strict=True):
            target[start : start + chunk] = torch.from_numpy(array)
    return whole
