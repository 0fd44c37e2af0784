"""Decode an image and its mask, check them, and bring them to the cached size."""

from __future__ import annotations

import hashlib
import io
import os
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, decode_jpeg, decode_png

from hpsearch.data.decode_pool import Facts, Job, Pixels
from hpsearch.data.headers import MAX_PIXELS, Header, read_header, verify_png
from hpsearch.data.masks import MaskError, find_lesion
from hpsearch.data.reading import Reading
from hpsearch.errors import DatasetError
from hpsearch.user_files import file_fault

BAND_BYTES = 16 * 2**20
"""Pixels that are resized at once."""


class BadImageError(Exception):
    """A pair that cannot be used, with the kind of damage."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def read_image(path: Path, reading: Reading) -> Tensor:
    """The image as RGB (3, H, W) uint8, read as the images of the dataset were. DatasetError if it cannot be."""
    try:
        header, _ = _header(path)
        return _decode_image(path, _content(path), header, reading)[0]
    except BadImageError as error:
        raise DatasetError(str(error)) from error


def read_pair(image_path: Path, mask_path: Path, reading: Reading) -> tuple[Tensor, Tensor]:
    """The image (3, H, W) uint8 and its mask (H, W) uint8 of 0 and 1, at their original size.

    DatasetError, naming the file, if one of them cannot be used.
    """
    try:
        pair = open_pair(image_path, mask_path, reading)
        assert pair.image is not None
        assert pair.mask is not None
        image, _ = _decode_image(image_path, _content(image_path), pair.image, reading)
        return image, _decode_mask(mask_path, _content(mask_path), pair.mask, reading)[0]
    except BadImageError as error:
        raise DatasetError(str(error)) from error


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """`image` (C, H, W) uint8 at (C, height, width): bilinear, antialiased, rounded to uint8.

    First along the rows, a band of them at a time, then along the columns: the working memory of torch's own resize
    is that of a band and not of the image.
    """
    n_channels, from_height, from_width = image.shape
    if from_width != width:
        squeezed = torch.empty((n_channels, from_height, width), dtype=torch.uint8)
        n_rows = max(1, BAND_BYTES // (4 * max(from_width, width)))
        for top in range(0, from_height, n_rows):
            band = image[:, top : top + n_rows]
            squeezed[:, top : top + n_rows] = interpolate(
                band[None], size=[band.shape[1], width], mode="bilinear", antialias=True
            )[0]
        image = squeezed
    if from_height != height:
        image = interpolate(image[None], size=[height, width], mode="bilinear", antialias=True)[0]
    return image


def resize_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """`mask` (H, W) of 0 and 1 at (height, width), 1 where at least half of what a pixel averages was 1.

    The average is the same antialiased one as the image's, over the same grid, so the border stays where it is in the
    image, without the steps of up to half an original pixel that the nearest neighbour makes.
    """
    return (resize(mask[None] * 255, height, width)[0] >= 128).to(torch.uint8)


def crop(pixels: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """The window (..., height, width) of `pixels` (..., H, W); outside of it the image goes on reflected."""
    rows = _reflected(top, height, pixels.shape[-2])
    columns = _reflected(left, width, pixels.shape[-1])
    return pixels.index_select(-2, rows).index_select(-1, columns)


def crop_corner(size: tuple[int, int], wanted: tuple[int, int], rng: np.random.Generator | None) -> tuple[int, int]:
    """Top and left of a crop of `wanted` (height, width) from `size`: drawn from `rng`, or in the centre without one.

    Where the image is smaller it lies in the middle of the crop, so a corner can be negative.
    """
    spare = [have - want for have, want in zip(size, wanted, strict=True)]
    corner = [n // 2 if rng is None or n <= 0 else int(rng.integers(n + 1)) for n in spare]
    return corner[0], corner[1]


def open_pair(image_path: Path, mask_path: Path, reading: Reading) -> OpenPair:
    """Read the two headers and compare the sizes. BadImageError if the pair cannot be used."""
    image, image_bytes = _header(image_path)
    mask, mask_bytes = _header(mask_path)
    size, mask_size = image.size(upright=reading.turns), mask.size(upright=reading.turns)
    if size != mask_size:
        text = f"{mask_path} is {mask_size[0]}x{mask_size[1]}, its image is {size[0]}x{size[1]}"
        if image.size(upright=not reading.turns) == mask.size(upright=not reading.turns):
            done, otherwise = ("applied", "ignored") if reading.turns else ("ignored", "applied")
            text += (
                f". The EXIF orientation ({image.orientation} of the image, {mask.orientation} of the mask) is "
                f"{done} {reading.exif_reason}, and this pair fits only if it is {otherwise}: correct the tag, or "
                "set data.exif"
            )
        raise BadImageError("sizes differ", text)
    return OpenPair(image_path, mask_path, reading, image, mask, max(image_bytes, mask_bytes))


@dataclass(frozen=True)
class OpenPair:
    """A pair whose headers fit together; either file may be left out."""

    image_path: Path
    mask_path: Path
    reading: Reading
    image: Header | None
    mask: Header | None
    file_bytes: int
    """Length of the larger file."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        header = self.image or self.mask
        assert header is not None
        return header.size(upright=self.reading.turns)

    def working_bytes(self, job: Job) -> int:
        """Memory that `decode_job` takes, about: one file, its pixels, those at the new width, and the views."""
        pixels = [0]
        if self.image is not None:
            # Turning takes two copies.
            pixels.append(
                self.image.decode_bytes(3) * (3 if self.reading.turns and self.image.orientation > 1 else 1)
            )
        if self.mask is not None:
            # And three of one byte a pixel, for what is where.
            pixels.append(self.mask.decode_bytes(self.mask.channels) + 3 * self.mask.height * self.mask.width)
        squeezed = 3 * max(self.size) * job.width
        return self.file_bytes + max(pixels) + squeezed + 2 * len(job.views) * job.height * job.width * 4


def open_job(job: Job) -> OpenPair:
    """The files that `job` asks for, with headers that fit together. BadImageError if they cannot be used."""
    image_path, mask_path = Path(job.image), Path(job.mask)
    if job.parts == "both":
        return open_pair(image_path, mask_path, job.reading)
    if job.parts == "image":
        image, n_bytes = _header(image_path)
        return OpenPair(image_path, mask_path, job.reading, image, None, n_bytes)
    mask, n_bytes = _header(mask_path)
    return OpenPair(image_path, mask_path, job.reading, None, mask, n_bytes)


def decode_job(pair: OpenPair, job: Job) -> tuple[Facts, list[Pixels]]:
    """What `job` asks for. BadImageError if the pair cannot be used."""
    reading, size = pair.reading, pair.size
    images: list[Tensor] = []
    masks: list[Tensor] = []
    image_sha256 = mask_sha256 = ""
    largest = foreground = 0
    is_constant = False
    values: tuple[str, ...] = ()
    if pair.image is not None:
        data = _content(pair.image_path)
        image_sha256 = hashlib.sha256(data).hexdigest() if job.measure else ""
        image, largest = _decode_image(pair.image_path, data, pair.image, reading)
        is_constant = job.measure and _is_constant(image)
        images = _views(image, job, is_mask=False) if job.send else []
        # The mask is decoded when the image's pixels are gone.
        del data, image
    if pair.mask is not None:
        data = _content(pair.mask_path)
        mask_sha256 = hashlib.sha256(data).hexdigest() if job.measure else ""
        mask, values = _decode_mask(pair.mask_path, data, pair.mask, reading)
        masks = _views(mask, job, is_mask=True)
        foreground = int(mask.count_nonzero())
        del data, mask
    view_foreground = int(masks[0].count_nonzero()) if masks else -1
    pixels = [
        (np.ascontiguousarray(image.permute(1, 2, 0).numpy()), np.ascontiguousarray(mask.numpy()))
        for image, mask in zip(images, masks if job.send else [], strict=True)
    ]
    crc = 0
    for arrays in pixels:
        for array in arrays:
            crc = zlib.crc32(array.data, crc)
    facts = Facts(
        height=size[0],
        width=size[1],
        image_sha256=image_sha256,
        mask_sha256=mask_sha256,
        foreground=foreground,
        moments=_moments(pixels[0][0]) if pixels and job.measure else (),
        crc=crc,
        view_foreground=view_foreground,
        mask_values=values,
        largest=largest,
        is_constant=is_constant,
        is_oriented=any(header is not None and header.orientation > 1 for header in (pair.image, pair.mask)),
    )
    return facts, pixels


def _header(path: Path) -> tuple[Header, int]:
    """Header and length of a file whose decoding is affordable."""
    try:
        with path.open("rb") as file:
            length = os.fstat(file.fileno()).st_size
            header = read_header(file)
    except OSError as error:
        text = file_fault(path) or f"{path} cannot be read: {error.strerror or error}"
        raise BadImageError("unreadable file", text) from error
    except ValueError as error:
        raise BadImageError("undecodable file", f"{path} cannot be decoded: {error}") from error
    if header.height * header.width > MAX_PIXELS:
        raise BadImageError(
            "absurd size",
            f"{path} says it is {header.height}x{header.width} pixels: more than {MAX_PIXELS // 10**6} million are "
            "taken for damage and not decoded",
        )
    return header, length


def _content(path: Path) -> bytearray:
    """The whole file, in memory that torch may call its own."""
    try:
        with path.open("rb") as file:
            data = bytearray(os.fstat(file.fileno()).st_size)
            del data[file.readinto(data) :]
    except OSError as error:
        raise BadImageError("unreadable file", f"{path} cannot be read: {error.strerror or error}") from error
    return data


def _decode_image(path: Path, data: bytearray, header: Header, reading: Reading) -> tuple[Tensor, int]:
    """RGB (3, H, W) uint8: gray is repeated, CMYK converted, transparency dropped.

    Of images with more than 8 bits also the largest value, before it is scaled; else 0.
    """
    image = _decode(path, data, header, ImageReadMode.RGB)
    largest = 0
    if image.dtype == torch.uint16:
        image, largest = _to_eight_bits(path, image.numpy(), reading.max_value)
    return upright(image, header.orientation if reading.turns else 1), largest


def _to_eight_bits(path: Path, deep: NDArray[np.uint16], max_value: int) -> tuple[Tensor, int]:
    """`deep` with 0..max_value divided evenly among 0..255, rounded down, and its largest value before that."""
    largest = int(deep.max())
    if not max_value:
        raise BadImageError(
            "unknown full scale",
            f"{path} has 16 bits a channel, but no training or validation image has more than 8, so nothing says "
            "which of its values is full scale: convert it to 8 bits, or train with data.max_value",
        )
    if largest > max_value:
        raise BadImageError(
            "value above full scale",
            f"{path} has the value {largest}, above the full scale of {max_value} with which training and validation "
            "images are read (data.max_value)",
        )
    image = np.empty(deep.shape, np.uint8)
    # In bands: `Header.decode_bytes` does not count on a whole copy of 32 bits.
    n_rows = max(1, BAND_BYTES // (12 * deep.shape[-1]))
    for top in range(0, deep.shape[1], n_rows):
        rows = slice(top, top + n_rows)
        image[:, rows] = deep[:, rows].astype(np.uint32) * 256 // (max_value + 1)
    return torch.from_numpy(image), largest


def _decode_mask(path: Path, data: bytearray, header: Header, reading: Reading) -> tuple[Tensor, tuple[str, ...]]:
    """(H, W) uint8 of 0 and 1, and its values in the file as text: background and lesion, or the only one."""
    if header.palette:
        samples = _palette_indices(path, data)[None]
    else:
        # Four channels in a JPEG are CMYK, in a PNG there is transparency among them.
        is_cmyk = header.format == "jpeg" and header.channels == 4
        samples = _decode(path, data, header, ImageReadMode.RGB if is_cmyk else ImageReadMode.UNCHANGED).numpy()
    try:
        mask, values = find_lesion(samples, header, background=reading.background, lesion=reading.lesion)
    except MaskError as error:
        raise BadImageError(error.kind, f"{path} {error}") from error
    return upright(torch.from_numpy(mask.view(np.uint8)), header.orientation if reading.turns else 1), values


def _palette_indices(path: Path, data: bytearray) -> NDArray[np.uint8]:
    """(H, W). By Pillow: torchvision gives the colours, or for less than 8 bits nothing that makes sense."""
    try:
        with PngImageFile(io.BytesIO(data)) as image:
            return np.array(image, np.uint8)
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        raise BadImageError("undecodable file", f"{path} cannot be decoded: {error}") from error


def _verify(path: Path, data: bytearray) -> None:
    try:
        verify_png(data)
    except (ValueError, struct.error) as error:
        raise BadImageError("undecodable file", f"{path} cannot be decoded: {error}") from error


def _decode(path: Path, data: bytearray, header: Header, mode: ImageReadMode) -> Tensor:
    if header.format == "png":
        _verify(path, data)
    try:
        encoded = torch.frombuffer(data, dtype=torch.uint8)
        pixels: Tensor = decode_jpeg(encoded, mode) if header.format == "jpeg" else decode_png(encoded, mode)
    except RuntimeError as error:
        # The decoders say first where in their own sources they are.
        reason = re.sub(r"^\S+, \S+:\d+, ", "", str(error).splitlines()[0])
        if "allocate" in reason:
            # Too little memory is no damage of the image.
            raise
        raise BadImageError("undecodable file", f"{path} cannot be decoded: {reason}") from error
    if pixels.shape[1:] != (header.height, header.width):
        raise BadImageError("undecodable file", f"{path} changed while it was read")
    return pixels


def upright(pixels: Tensor, orientation: int) -> Tensor:
    """`pixels` (..., H, W) turned by an EXIF orientation from 1 (as it is) to 8 (TIFF 6.0, Orientation)."""
    if orientation >= 5:
        pixels = pixels.transpose(-2, -1)
    axes = {2: [-1], 3: [-2, -1], 4: [-2], 6: [-1], 7: [-2, -1], 8: [-2]}.get(orientation, [])
    # In order: how pixels lie in memory decides how the resize rounds.
    return (pixels.flip(axes) if axes else pixels).contiguous()


def _is_constant(image: Tensor) -> bool:
    """Whether all pixels of (C, H, W) are of one colour."""
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
        # Made anew for image and mask, so that both get the same crop.
        seed = int.from_bytes(hashlib.sha256(job.crop_seed.encode()).digest()[:8])
        rng = np.random.default_rng(seed) if view == "random crop" else None
        made.append(crop(pixels, *crop_corner(size, wanted, rng), *wanted))
    return made


def _reflected(start: int, n: int, length: int) -> Tensor:
    """Indices into an axis of `length` for `n` positions from `start`; beyond both ends it is mirrored."""
    positions = torch.arange(start, start + n)
    if length == 1:
        return torch.zeros_like(positions)
    period = 2 * (length - 1)
    positions = positions.remainder(period)
    return torch.minimum(positions, period - positions)


def _moments(image: NDArray[np.uint8]) -> tuple[int, ...]:
    """Sums over the pixels of (H, W, 3): R, G, B, RR, GG, BB, RG, RB, GB; exact, as float64 is below 2^53."""
    sums = np.zeros(3)
    products = np.zeros((3, 3))
    for row in np.array_split(image.reshape(-1, 3), max(1, image.size // 2**18)):
        values = row.astype(np.float64)
        sums += values.sum(0)
        products += values.T @ values
    return tuple(int(n) for n in (*sums, *products.diagonal(), products[0, 1], products[0, 2], products[1, 2]))
