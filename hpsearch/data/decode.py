"""Decode an image and its mask, check them, and resize or crop them to the cached size.

decode_pool.py runs this module in a subprocess: `python -m hpsearch.data.decode N_THREADS`. The subprocess uses
threads, because decoding and resizing release the GIL, and because torch is then loaded only once.
"""

import hashlib
import io
import os
import pickle
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from hpsearch.data.decode_pool import DecodeError, ImageStats, Job, Pixels, crc_of
from hpsearch.data.formats import DAMAGE, FORMATS, MAX_PIXELS, Header, read_header
from hpsearch.data.masks import find_lesion
from hpsearch.data.reading import FULL_SCALES, Reading
from hpsearch.user_files import file_fault

BYTES_PER_PIXEL = 12
"""Approximate memory per pixel that decoding, rotating and resizing need, in bytes."""


MAX_BYTES = 400 * 2**20
"""Maximum memory for decoding in all threads together. An image that needs more is decoded alone."""


def read_image(path: Path, reading: Reading) -> Tensor:
    """Decode the image to RGB (3, H, W) uint8 by the rules in `reading`. Raise DecodeError if it is unusable."""
    return _decode_image(_open(path), reading)[0]


def read_pair(image_path: Path, mask_path: Path, reading: Reading) -> tuple[Tensor, Tensor]:
    """Return the image (3, H, W) uint8 and its mask (H, W) uint8 of 0 and 1, at their original size.

    Both are decoded by the rules in `reading`. Raises DecodeError, naming the file, if one of them is unusable.
    """
    (image, mask), _ = open_pair(image_path, mask_path, reading)
    return _decode_image(image, reading)[0], _decode_mask(mask, reading)[0]


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Resize `image` (C, H, W) uint8 to (C, height, width), with bilinear interpolation and antialiasing."""
    if image.shape[1:] == (height, width):
        return image
    return interpolate(image[None], size=[height, width], mode="bilinear", antialias=True)[0]


def resize_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """Resize `mask` (H, W) of 0 and 1 to (height, width). A pixel is 1 if the interpolated value is at least 0.5.

    The mask is interpolated in the same way as the image (`resize`), so its border stays aligned with the image.
    Nearest-neighbour sampling would shift the border by up to half an original pixel.
    """
    return (resize(mask[None] * 255, height, width)[0] >= 128).to(torch.uint8)


def crop(pixels: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """Crop `pixels` (..., H, W) to (..., height, width) at `top` and `left`, reflecting pixels beyond the border."""
    rows = _reflected(top, height, pixels.shape[-2])
    columns = _reflected(left, width, pixels.shape[-1])
    return pixels.index_select(-2, rows).index_select(-1, columns)


def crop_corner(size: tuple[int, int], wanted: tuple[int, int], rng: np.random.Generator | None) -> tuple[int, int]:
    """Return the top and left of a crop of `wanted` (height, width) from an image of `size`.

    The position is drawn from `rng`. If `rng` is None, the crop is centred. An image that is smaller than the crop is
    placed in the middle of the crop, so top and left can be negative.
    """
    spare = [have - want for have, want in zip(size, wanted, strict=True)]
    corner = [n // 2 if rng is None or n <= 0 else int(rng.integers(n + 1)) for n in spare]
    return corner[0], corner[1]


@dataclass(frozen=True)
class OpenFile:
    """Header and content of an image or mask file."""

    path: Path
    header: Header
    data: bytearray


def open_pair(
    image_path: Path | None, mask_path: Path | None, reading: Reading
) -> tuple[list[OpenFile], tuple[int, int]]:
    """Read the image and the mask (either may be None), and return them with their common height and width.

    If `reading` applies EXIF orientations, the height and width are those of the upright image. Raises DecodeError if
    a file cannot be read, its header is damaged, the image is too large, or the sizes of image and mask differ.
    """
    files = [_open(path) for path in (image_path, mask_path) if path is not None]
    image, mask = files[0], files[-1]
    size, mask_size = (file.header.size(upright=reading.turns) for file in (image, mask))
    if size != mask_size:
        text = f"{mask.path} is {mask_size[0]}x{mask_size[1]}, its image is {size[0]}x{size[1]}"
        if image.header.size(upright=not reading.turns) == mask.header.size(upright=not reading.turns):
            done, otherwise = ("applied", "ignored") if reading.turns else ("ignored", "applied")
            text += f"; they match only with the EXIF orientation {otherwise}, but it is {done} {reading.exif_reason}"
            text += ". Correct the EXIF tag, or set data.exif"
        raise DecodeError("sizes differ", text)
    return files, size


class MemoryGate:
    """Limit on the memory that threads use together.

    A thread waits until the memory that it needs fits within the limit. If no other thread has reserved memory, it
    does not wait, even if it needs more than the limit.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held_bytes = 0
        self._changed = threading.Condition()

    @contextmanager
    def admitted(self, n_bytes: int) -> Iterator[None]:
        """Wait until `n_bytes` fit within the limit, and reserve them for the duration of the block."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held_bytes or self._held_bytes + n_bytes <= self._limit_bytes)
            self._held_bytes += n_bytes
        try:
            yield
        finally:
            with self._changed:
                self._held_bytes -= n_bytes
                self._changed.notify_all()


def decode_job(job: Job, gate: MemoryGate) -> tuple[ImageStats, list[Pixels]]:
    """Run `job` and return its stats and the pixels of its views. Raise DecodeError if the pair is unusable.

    Waits until `gate` grants the memory that decoding needs.
    """
    files, size = open_pair(job.image, job.mask, job.reading)
    stats: dict[str, Any] = {}
    images: list[Tensor] = []
    masks: list[Tensor] = []
    with gate.admitted(BYTES_PER_PIXEL * size[0] * size[1]):
        if job.image is not None:
            image, stats["largest"] = _decode_image(files[0], job.reading)
            if job.measure:
                stats["image_sha256"] = hashlib.sha256(files[0].data).hexdigest()
                # For most images, every 16th row and column suffices to find a second colour.
                parts = image[:, ::16, ::16], image
                stats["is_constant"] = all(bool((part == image[:, :1, :1]).all()) for part in parts)
            images = _views(image, job, resize) if job.send else []
            # Free the pixels of the image before the mask is decoded.
            del image
        if job.mask is not None:
            mask, stats["mask_values"] = _decode_mask(files[-1], job.reading)
            stats["foreground"] = int(mask.count_nonzero())
            if job.measure:
                stats["mask_sha256"] = hashlib.sha256(files[-1].data).hexdigest()
            masks = _views(mask, job, resize_mask)
            if masks:
                stats["view_foreground"] = int(masks[0].count_nonzero())
    pixels = [
        (np.ascontiguousarray(view.permute(1, 2, 0).numpy()), np.ascontiguousarray(mask_view.numpy()))
        for view, mask_view in zip(images, masks, strict=False)
    ]
    if pixels and job.measure:
        stats["moments"] = _moments(pixels[0][0])
    return ImageStats(*size, **stats, crc=crc_of(pixels)), pixels


def upright(pixels: Tensor, orientation: int) -> Tensor:
    """Turn `pixels` (..., H, W) upright. `orientation` is the EXIF value from 1 (upright) to 8 (TIFF 6.0)."""
    if orientation >= 5:
        pixels = pixels.transpose(-2, -1)
    axes = {2: [-1], 3: [-2, -1], 4: [-2], 6: [-1], 7: [-2, -1], 8: [-2]}.get(orientation, [])
    # Make the result contiguous, because the rounding of the resize depends on the memory layout.
    return (pixels.flip(axes) if axes else pixels).contiguous()


def _open(path: Path) -> OpenFile:
    """Read a file and its header. Raise DecodeError if this fails or if the image is too large to decode."""
    try:
        data = bytearray(path.read_bytes())
        header = read_header(io.BytesIO(data))
    except OSError as error:
        text = file_fault(path) or f"{path} cannot be read: {error.strerror or error}"
        raise DecodeError("unreadable file", text) from error
    except ValueError as error:
        raise DecodeError("undecodable file", f"{path} cannot be decoded: {error}") from error
    if header.height * header.width > MAX_PIXELS:
        raise DecodeError(
            "absurd size",
            f"{path} has {header.height}x{header.width} pixels according to its header: files of more than "
            f"{MAX_PIXELS // 10**6} million pixels are treated as damaged",
        )
    return OpenFile(path, header, data)


def _decode_image(file: OpenFile, reading: Reading) -> tuple[Tensor, int]:
    """Decode an image to RGB (3, H, W) uint8 and return it with its largest value before scaling to 8 bits.

    Gray is repeated in all channels, CMYK is converted, and transparency is dropped. For images with at most 8 bits
    per channel, 0 is returned as the largest value.
    """
    pixels, largest = _decode(file, rgb=True), 0
    if pixels.dtype == np.uint16:
        pixels, largest = _to_eight_bits(file.path, pixels, reading.max_value)
    return upright(torch.from_numpy(pixels), file.header.orientation if reading.turns else 1), largest


def _to_eight_bits(path: Path, deep: NDArray[np.uint16], max_value: int) -> tuple[NDArray[np.uint8], int]:
    """Scale `deep` from 0..max_value to 0..255, rounding down, and return it with its largest value before scaling.

    A `max_value` of 0 means 255. Raises DecodeError if a value is larger than `max_value`.
    """
    largest, max_value = int(deep.max()), max_value or FULL_SCALES[0]
    if largest > max_value:
        raise DecodeError(
            "value above full scale",
            f"{path} has the value {largest}, above the full scale {max_value} of the training and validation images"
            ": convert it to 8 bits, or set data.max_value before training",
        )
    return (deep.astype(np.uint32) * 256 // (max_value + 1)).astype(np.uint8), largest


def _decode_mask(file: OpenFile, reading: Reading) -> tuple[Tensor, tuple[str, ...]]:
    """Return the mask (H, W) uint8 of 0 and 1, and its pixel values as text.

    The values are background and lesion, or a single value if all pixels are equal.
    """
    samples = _decode(file, rgb=False)
    try:
        mask, values = find_lesion(samples, file.header, reading)
    except DecodeError as error:
        raise DecodeError(error.kind, f"{file.path} {error.text}") from error
    return upright(torch.from_numpy(mask.view(np.uint8)), file.header.orientation if reading.turns else 1), values


def _decode(file: OpenFile, *, rgb: bool) -> NDArray[Any]:
    try:
        return FORMATS[file.header.format].decode(file.data, file.header, rgb)
    except DAMAGE as error:
        raise DecodeError("undecodable file", f"{file.path} cannot be decoded: {error}") from error


def _views(pixels: Tensor, job: Job, resize: Callable[[Tensor, int, int], Tensor]) -> list[Tensor]:
    wanted = (job.height, job.width)
    made = []
    for view in job.views:
        if view == "resize":
            made.append(resize(pixels, *wanted))
            continue
        # Image and mask each use a new generator with the same seed, so that both get the same crop.
        seed = int.from_bytes(hashlib.sha256(job.crop_seed.encode()).digest()[:8])
        rng = np.random.default_rng(seed) if view == "random crop" else None
        made.append(crop(pixels, *crop_corner((pixels.shape[-2], pixels.shape[-1]), wanted, rng), *wanted))
    return made


def _reflected(start: int, n: int, length: int) -> Tensor:
    """Return the indices start..start + n - 1, reflected at 0 and length - 1 if they are outside this range."""
    period = max(1, 2 * (length - 1))
    positions = torch.arange(start, start + n).remainder(period)
    return torch.minimum(positions, period - positions)


def _moments(image: NDArray[np.uint8]) -> tuple[int, ...]:
    """Return the sums over all pixels of `image` (H, W, 3) of R, G, B, RR, GG, BB, RG, RB and GB."""
    # All sums stay below 2^53, up to which float64 is exact.
    values = image.reshape(-1, 3).astype(np.float64)
    products = values.T @ values
    sums = (*values.sum(0), *products.diagonal(), products[0, 1], products[0, 2], products[1, 2])
    return tuple(map(int, sums))


def main(n_threads: int) -> None:
    """Read pickled lists of jobs from standard input until it ends, and write their results to standard output."""
    # Ctrl-C is sent to the whole process group, but the parent decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    # Libraries may print to standard output, so results are written to a separate file descriptor.
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    gate, threads = MemoryGate(MAX_BYTES), ThreadPoolExecutor(n_threads)

    def answer(job: Job) -> tuple[ImageStats | DecodeError, list[Pixels]]:
        try:
            return decode_job(job, gate)
        except DecodeError as error:
            return error, []

    def send(future: Future[Any]) -> None:
        pickle.dump(future.result(), output, pickle.HIGHEST_PROTOCOL)
        output.flush()

    waiting: deque[Future[Any]] = deque()
    try:
        while True:
            for job in pickle.load(sys.stdin.buffer):
                # Limit the number of results held while an earlier job or the parent is slow.
                if len(waiting) == 4 * n_threads:
                    send(waiting.popleft())
                waiting.append(threads.submit(answer, job))
            while waiting:
                send(waiting.popleft())
    except BaseException as error:
        if not isinstance(error, EOFError):
            traceback.print_exc()
        # Exit without waiting for the other threads.
        os._exit(70)


if __name__ == "__main__":
    main(int(sys.argv[1]))
