"""Decode an image and its mask, check them, and bring them to the cached size."""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from hpsearch.data.decode_pool import DecodeError, ImageStats, Job, Pixels
from hpsearch.data.formats import FORMATS, MAX_PIXELS, Header, read_header
from hpsearch.data.masks import find_lesion
from hpsearch.data.reading import Reading
from hpsearch.errors import DatasetError
from hpsearch.user_files import file_fault

BAND_BYTES = 16 * 2**20
"""Pixels that are resized at once."""


def read_image(path: Path, reading: Reading) -> Tensor:
    """Return the image as RGB (3, H, W) uint8, read by the rules of its dataset. DatasetError if it is unusable."""
    try:
        return _decode_image(_open(path), reading)[0]
    except DecodeError as error:
        raise DatasetError(error.text) from error


def read_pair(image_path: Path, mask_path: Path, reading: Reading) -> tuple[Tensor, Tensor]:
    """Return the image (3, H, W) uint8 and its mask (H, W) uint8 of 0 and 1, at their original size.

    Raises DatasetError, naming the file, if one of them is unusable.
    """
    try:
        pair = open_pair(image_path, mask_path, reading)
        assert pair.image is not None
        assert pair.mask is not None
        return _decode_image(pair.image, reading)[0], _decode_mask(pair.mask, reading)[0]
    except DecodeError as error:
        raise DatasetError(error.text) from error


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Return `image` (C, H, W) uint8 at (C, height, width): bilinear, antialiased, rounded to uint8.

    Rows are resized first, in bands, and columns second. torch's own resize needs working memory for the whole image,
    this one for a band.
    """
    n_channels, from_height, from_width = image.shape
    if from_width != width:
        squeezed = torch.empty((n_channels, from_height, width), dtype=torch.uint8)
        n_rows = max(1, BAND_BYTES // (4 * max(from_width, width)))
        for top in range(0, from_height, n_rows):
            band = image[:, top : top + n_rows]
            squeezed[:, top : top + n_rows] = _interpolate(band, band.shape[1], width)
        image = squeezed
    return image if from_height == height else _interpolate(image, height, width)


def resize_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """Return `mask` (H, W) of 0 and 1 at (height, width): 1 where at least half of the averaged pixels are 1.

    The average and its grid are those of `resize`, so the border stays where it is in the image. Nearest-neighbour
    sampling moves it by up to half an original pixel.
    """
    return (resize(mask[None] * 255, height, width)[0] >= 128).to(torch.uint8)


def crop(pixels: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """Return the window (..., height, width) of `pixels` (..., H, W), reflected beyond the borders."""
    rows = _reflected(top, height, pixels.shape[-2])
    columns = _reflected(left, width, pixels.shape[-1])
    return pixels.index_select(-2, rows).index_select(-1, columns)


def crop_corner(size: tuple[int, int], wanted: tuple[int, int], rng: np.random.Generator | None) -> tuple[int, int]:
    """Return top and left of a crop of `wanted` (height, width) from `size`, drawn from `rng` or centred without one.

    An image that is smaller than the crop lies in its middle, so a corner can be negative.
    """
    spare = [have - want for have, want in zip(size, wanted, strict=True)]
    corner = [n // 2 if rng is None or n <= 0 else int(rng.integers(n + 1)) for n in spare]
    return corner[0], corner[1]


@dataclass(frozen=True)
class OpenFile:
    """An image or mask file whose header is read."""

    path: Path
    header: Header
    n_bytes: int

    def content(self) -> bytearray:
        """Return the whole file in writable memory, which torch needs."""
        try:
            with self.path.open("rb") as file:
                data = bytearray(os.fstat(file.fileno()).st_size)
                del data[file.readinto(data) :]
        except OSError as error:
            text = f"{self.path} cannot be read: {error.strerror or error}"
            raise DecodeError("unreadable file", text) from error
        return data


@dataclass(frozen=True)
class OpenPair:
    """A pair with headers of equal size, or one file alone."""

    image: OpenFile | None
    mask: OpenFile | None
    reading: Reading

    @property
    def files(self) -> list[OpenFile]:
        return [file for file in (self.image, self.mask) if file is not None]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.files[0].header.size(upright=self.reading.turns)

    def working_bytes(self, job: Job) -> int:
        """Return about how much memory `decode_job` takes: file, pixels, resized rows and views."""
        pixels = [0]
        if self.image is not None:
            header = self.image.header
            # Turning makes two copies.
            pixels.append(header.decode_bytes(3) * (3 if self.reading.turns and header.orientation > 1 else 1))
        if self.mask is not None:
            header = self.mask.header
            # Three arrays of one byte per pixel mark where the values are.
            pixels.append(header.decode_bytes(header.channels) + 3 * header.height * header.width)
        squeezed = 3 * max(self.size) * job.width
        file_bytes = max(file.n_bytes for file in self.files)
        return file_bytes + max(pixels) + squeezed + 2 * len(job.views) * job.height * job.width * 4


def open_pair(image_path: Path | None, mask_path: Path | None, reading: Reading) -> OpenPair:
    """Read the headers and compare the sizes. Raise DecodeError if the pair is unusable."""
    image = None if image_path is None else _open(image_path)
    mask = None if mask_path is None else _open(mask_path)
    if image is not None and mask is not None:
        _require_equal_sizes(image, mask, reading)
    return OpenPair(image, mask, reading)


def open_job(job: Job) -> OpenPair:
    """Open the files of `job`. Raise DecodeError if they are unusable."""
    return open_pair(job.image, job.mask, job.reading)


def decode_job(pair: OpenPair, job: Job) -> tuple[ImageStats, list[Pixels]]:
    """Return what `job` asks for. Raise DecodeError if the pair is unusable."""
    # The mask is decoded after the image's pixels are freed.
    image_sha256, largest, is_constant, images = _image_part(pair.image, job)
    mask_sha256, foreground, values, masks = _mask_part(pair.mask, job)
    pixels = [
        (np.ascontiguousarray(image.permute(1, 2, 0).numpy()), np.ascontiguousarray(mask.numpy()))
        for image, mask in zip(images, masks if job.send else [], strict=True)
    ]
    height, width = pair.size
    stats = ImageStats(
        height=height,
        width=width,
        image_sha256=image_sha256,
        mask_sha256=mask_sha256,
        foreground=foreground,
        moments=_moments(pixels[0][0]) if pixels and job.measure else (),
        crc=crc_of(pixels),
        view_foreground=int(masks[0].count_nonzero()) if masks else -1,
        mask_values=values,
        largest=largest,
        is_constant=is_constant,
        is_oriented=any(file.header.orientation > 1 for file in pair.files),
    )
    return stats, pixels


def crc_of(pixels: list[Pixels]) -> int:
    """Return the CRC-32 of the bytes of all views."""
    crc = 0
    for array in (array for view in pixels for array in view):
        crc = zlib.crc32(array.data, crc)
    return crc


def upright(pixels: Tensor, orientation: int) -> Tensor:
    """Return `pixels` (..., H, W) turned by an EXIF orientation of 1 (unchanged) to 8 (TIFF 6.0, Orientation)."""
    if orientation >= 5:
        pixels = pixels.transpose(-2, -1)
    axes = {2: [-1], 3: [-2, -1], 4: [-2], 6: [-1], 7: [-2, -1], 8: [-2]}.get(orientation, [])
    # Contiguous, because the memory layout decides how the resize rounds.
    return (pixels.flip(axes) if axes else pixels).contiguous()


def _open(path: Path) -> OpenFile:
    """Read the header of a file and check that its decoding is affordable."""
    try:
        with path.open("rb") as file:
            length = os.fstat(file.fileno()).st_size
            header = read_header(file)
    except OSError as error:
        text = file_fault(path) or f"{path} cannot be read: {error.strerror or error}"
        raise DecodeError("unreadable file", text) from error
    except ValueError as error:
        raise _undecodable(path, error) from error
    if header.height * header.width > MAX_PIXELS:
        raise DecodeError(
            "absurd size",
            f"{path} says it is {header.height}x{header.width} pixels: more than {MAX_PIXELS // 10**6} million are "
            "taken for damage and not decoded",
        )
    return OpenFile(path, header, length)


def _require_equal_sizes(image: OpenFile, mask: OpenFile, reading: Reading) -> None:
    size, mask_size = (file.header.size(upright=reading.turns) for file in (image, mask))
    if size == mask_size:
        return
    text = f"{mask.path} is {mask_size[0]}x{mask_size[1]}, its image is {size[0]}x{size[1]}"
    if image.header.size(upright=not reading.turns) == mask.header.size(upright=not reading.turns):
        done, otherwise = ("applied", "ignored") if reading.turns else ("ignored", "applied")
        text += (
            f". The EXIF orientation ({image.header.orientation} of the image, {mask.header.orientation} of the "
            f"mask) is {done} {reading.exif_reason}, and this pair fits only if it is {otherwise}: correct the tag, "
            "or set data.exif"
        )
    raise DecodeError("sizes differ", text)


def _image_part(file: OpenFile | None, job: Job) -> tuple[str, int, bool, list[Tensor]]:
    """Return hash, largest value, whether the image has one colour, and the views to send."""
    if file is None:
        return "", 0, False, []
    data = file.content()
    sha256 = hashlib.sha256(data).hexdigest() if job.measure else ""
    image, largest = _decode_image(file, job.reading, data)
    is_constant = job.measure and _is_constant(image)
    return sha256, largest, is_constant, _views(image, job, is_mask=False) if job.send else []


def _mask_part(file: OpenFile | None, job: Job) -> tuple[str, int, tuple[str, ...], list[Tensor]]:
    """Return hash, number of lesion pixels, values and views of the mask."""
    if file is None:
        return "", 0, (), []
    data = file.content()
    sha256 = hashlib.sha256(data).hexdigest() if job.measure else ""
    mask, values = _decode_mask(file, job.reading, data)
    return sha256, int(mask.count_nonzero()), values, _views(mask, job, is_mask=True)


def _decode_image(file: OpenFile, reading: Reading, data: bytearray | None = None) -> tuple[Tensor, int]:
    """Return RGB (3, H, W) uint8: gray repeated, CMYK converted, transparency dropped.

    Also return the largest value before scaling of an image of more than 8 bits, 0 for other images.
    """
    image, largest = _decode(file, data, rgb=True), 0
    if image.dtype == torch.uint16:
        image, largest = _to_eight_bits(file.path, image.numpy(), reading.max_value)
    return upright(image, file.header.orientation if reading.turns else 1), largest


def _to_eight_bits(path: Path, deep: NDArray[np.uint16], max_value: int) -> tuple[Tensor, int]:
    """Return `deep` with 0..max_value mapped evenly to 0..255, rounded down, and its largest value before that."""
    largest = int(deep.max())
    if not max_value:
        raise DecodeError(
            "unknown full scale",
            f"{path} has 16 bits a channel, but no training or validation image has more than 8, so nothing says "
            "which of its values is full scale: convert it to 8 bits, or train with data.max_value",
        )
    if largest > max_value:
        raise DecodeError(
            "value above full scale",
            f"{path} has the value {largest}, above the full scale of {max_value} with which training and validation "
            "images are read (data.max_value)",
        )
    image = np.empty(deep.shape, np.uint8)
    # In bands, because `Header.decode_bytes` does not count a whole copy of 32 bits.
    n_rows = max(1, BAND_BYTES // (12 * deep.shape[-1]))
    for top in range(0, deep.shape[1], n_rows):
        rows = slice(top, top + n_rows)
        image[:, rows] = deep[:, rows].astype(np.uint32) * 256 // (max_value + 1)
    return torch.from_numpy(image), largest


def _decode_mask(file: OpenFile, reading: Reading, data: bytearray | None = None) -> tuple[Tensor, tuple[str, ...]]:
    """Return the mask (H, W) uint8 of 0 and 1 and its values as text: background and lesion, or the only one."""
    samples = _decode(file, data, rgb=False).numpy()
    try:
        mask, values = find_lesion(samples, file.header, background=reading.background, lesion=reading.lesion)
    except DecodeError as error:
        raise DecodeError(error.kind, f"{file.path} {error.text}") from error
    return upright(torch.from_numpy(mask.view(np.uint8)), file.header.orientation if reading.turns else 1), values


def _decode(file: OpenFile, data: bytearray | None, *, rgb: bool) -> Tensor:
    """Decode the content of a file, which is read if it is not given."""
    try:
        pixels = FORMATS[file.header.format].decode(file.content() if data is None else data, file.header, rgb)
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        raise _undecodable(file.path, error) from error
    if pixels.shape[1:] != (file.header.height, file.header.width):
        raise _undecodable(file.path, "it changed while it was read")
    return pixels


def _undecodable(path: Path, reason: object) -> DecodeError:
    return DecodeError("undecodable file", f"{path} cannot be decoded: {reason}")


def _interpolate(image: Tensor, height: int, width: int) -> Tensor:
    return interpolate(image[None], size=[height, width], mode="bilinear", antialias=True)[0]


def _is_constant(image: Tensor) -> bool:
    """Return whether all pixels of (C, H, W) have the same colour."""
    first = image[:, :1, :1]
    return bool((image[:, ::16, ::16] == first).all()) and bool((image == first).all())


def _views(pixels: Tensor, job: Job, *, is_mask: bool) -> list[Tensor]:
    wanted = (job.height, job.width)
    size = (pixels.shape[-2], pixels.shape[-1])
    made = []
    for view in job.views:
        if view == "resize":
            made.append(resize_mask(pixels, *wanted) if is_mask else resize(pixels, *wanted))
            continue
        # A new generator for each of image and mask, so that both get the same crop.
        seed = int.from_bytes(hashlib.sha256(job.crop_seed.encode()).digest()[:8])
        rng = np.random.default_rng(seed) if view == "random crop" else None
        made.append(crop(pixels, *crop_corner(size, wanted, rng), *wanted))
    return made


def _reflected(start: int, n: int, length: int) -> Tensor:
    """Return indices into an axis of `length` for `n` positions from `start`, mirrored beyond both ends."""
    positions = torch.arange(start, start + n)
    if length == 1:
        return torch.zeros_like(positions)
    period = 2 * (length - 1)
    positions = positions.remainder(period)
    return torch.minimum(positions, period - positions)


def _moments(image: NDArray[np.uint8]) -> tuple[int, ...]:
    """Return the sums over the pixels of (H, W, 3): R, G, B, RR, GG, BB, RG, RB, GB. float64 is exact below 2^53."""
    sums = np.zeros(3)
    products = np.zeros((3, 3))
    for row in np.array_split(image.reshape(-1, 3), max(1, image.size // 2**18)):
        values = row.astype(np.float64)
        sums += values.sum(0)
        products += values.T @ values
    return tuple(int(n) for n in (*sums, *products.diagonal(), products[0, 1], products[0, 2], products[1, 2]))
