"""Read and decode image files. FORMATS has one entry per file format.

A new format is a new entry of FORMATS and needs no change elsewhere. An entry names the suffixes and the first bytes
of the files, and has two functions: one reads the header, the other decodes the whole content.
"""

import io
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags
from PIL.Image import Exif, Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

MAX_PIXELS = 100_000_000
"""Larger images are refused as damaged or hostile. The largest image of ISIC-2017 has 30 million pixels."""
UNSUPPORTED_SUFFIXES = (
    *(".bmp", ".dib", ".tif", ".tiff", ".gif", ".webp", ".heic", ".heif", ".avif", ".jp2", ".j2k", ".jxl"),
    *(".dcm", ".dicom", ".svg", ".psd", ".tga", ".ppm", ".pgm", ".pbm", ".dng"),
)
"""Suffixes (lower case) of images that cannot be decoded unless FORMATS has them. They are reported as errors."""
DAMAGE = (ValueError, SyntaxError, EOFError, OSError, struct.error, zlib.error)
"""Errors that Pillow and torchvision raise for damaged content."""

_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Channels by colour type."""


@dataclass(frozen=True)
class Header:
    """Size, channels and orientation of an image file."""

    format: str
    """Key of FORMATS."""
    height: int
    width: int
    """Size of the stored pixels, before any orientation is applied."""
    channels: int = 3
    """Channels in the file. A palette counts as 1, and a tRNS chunk of a PNG does not count."""
    depth: int = 8
    """Bits per channel."""
    orientation: int = 1
    """EXIF orientation: 1 is upright, 5 to 8 swap height and width."""
    palette: bool = False
    transparent: tuple[int, ...] | None = None
    """Gray value or colour of a PNG that is transparent (tRNS without a palette)."""

    def size(self, *, upright: bool) -> tuple[int, int]:
        """Return height and width, as stored or with the orientation applied."""
        return (self.width, self.height) if upright and self.orientation >= 5 else (self.height, self.width)


@dataclass(frozen=True)
class ImageFormat:
    """A file format that can be decoded."""

    suffixes: tuple[str, ...]
    """Name endings in lower case."""
    magic: bytes
    """First bytes of a file."""
    read_header: Callable[[IO[bytes]], Header]
    """Reads the few bytes that matter. Raises an error of `DAMAGE` if they are damaged."""
    decode: Callable[[bytearray, Header, bool], NDArray[Any]]
    """Decodes the whole file to (C, H, W), uint8 or uint16.

    With True as the last argument the result is RGB. With False it has the samples of the file, which for a palette
    are the indices. Raises an error of `DAMAGE` for damaged content.
    """


def readable_suffixes() -> tuple[str, ...]:
    """Return the name endings (lower case) of the images that can be decoded."""
    return tuple(suffix for each in FORMATS.values() for suffix in each.suffixes)


def without_suffix(name: str) -> str:
    """Return the id in a name that a list or table has, with or without an ending such as `.jpg`."""
    return name[: name.rindex(".")] if name.lower().endswith(readable_suffixes()) else name


def is_image_name(name: str) -> bool:
    """Return whether `name` ends like an image, decodable or not."""
    return name.lower().endswith((*readable_suffixes(), *UNSUPPORTED_SUFFIXES))


def read_header(file: IO[bytes]) -> Header:
    """Return the header of an open file. ValueError, with the reason, if its format is unknown or it is damaged."""
    start = file.read(16)
    file.seek(0)
    try:
        for each in FORMATS.values():
            if start.startswith(each.magic):
                return each.read_header(file)
    except DAMAGE as error:
        raise ValueError(f"its header is damaged ({error})") from error
    names = " nor ".join(name.upper() for name in FORMATS)
    raise ValueError(f"it is neither {names}: convert it to one of them" if start else "it is empty")


def _read_jpeg_header(file: IO[bytes]) -> Header:
    image = JpegImageFile(file)
    orientation = _orientation(image.info.get("exif", b""))
    return Header("jpeg", image.height, image.width, image.layers, orientation=orientation)


def _read_png_header(file: IO[bytes]) -> Header:
    image = PngImageFile(file)
    file.seek(24)
    depth, color = file.read(2)
    orientation, transparent = _orientation(_png_exif(file)), None
    if color in (0, 2) and "transparency" in image.info:
        transparent = tuple(np.atleast_1d(image.info["transparency"]).tolist())
    is_palette = image.mode == "P"
    return Header("png", image.height, image.width, _PNG_CHANNELS[color], depth, orientation, is_palette, transparent)


def _png_exif(file: IO[bytes]) -> bytes:
    """Return the EXIF data of a PNG, which Pillow finds behind the pixels only by decoding them."""
    return next((file.read(length) for kind, length in _png_chunks(file) if kind == b"eXIf"), b"")


def _png_chunks(file: IO[bytes]) -> Iterator[tuple[bytes, int]]:
    """Yield type and length of every chunk, while the file stands at the content of the chunk."""
    file.seek(8)
    while len(start := file.read(8)) == 8 and start[4:] != b"IEND":
        length, kind = struct.unpack(">I4s", start)
        end = file.tell() + length + 4
        yield kind, length
        file.seek(end)


def _check_rows(data: bytearray, header: Header) -> None:
    """Raise ValueError if the pixels end early: Pillow would fill the missing rows with 0."""
    bytes_per_row, is_interlaced = 1 + -(-header.width * header.channels * header.depth // 8), data[28]
    file, inflate, n_bytes = io.BytesIO(data), zlib.decompressobj(), 0
    for kind, length in _png_chunks(file):
        if kind == b"IDAT":
            n_bytes += len(inflate.decompress(file.read(length)))
    if n_bytes < header.height * bytes_per_row and not is_interlaced:
        raise ValueError(f"it has {n_bytes // bytes_per_row} of {header.height} rows")


def _orientation(data: bytes) -> int:
    """Return the orientation in EXIF data, 1 (upright) if it is missing or invalid."""
    exif = Exif()
    try:
        exif.load(data)
        orientation = exif.get(ExifTags.Base.Orientation)
    except (SyntaxError, struct.error):
        # Damaged EXIF says nothing about the pixels, and decoders ignore it.
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _decode_png(data: bytearray, header: Header, rgb: bool) -> NDArray[Any]:
    """Decode with Pillow, because damaged content ends the process in torchvision's decoder."""
    PngImageFile(io.BytesIO(data)).verify()
    _check_rows(data, header)
    if header.depth == 16 and header.channels > 1:
        pixels = _decode_deep_png(data, header.channels)
    else:
        image: Image = PngImageFile(io.BytesIO(data))
        if image.mode == "1" or (rgb and header.palette):
            image.info.pop("transparency", None)
            image = image.convert("L" if image.mode == "1" else "RGB")
        pixels = np.atleast_3d(np.array(image))
    if rgb:
        # Transparency is dropped, and gray repeated.
        pixels = pixels[..., :3] if pixels.shape[2] > 2 else pixels[..., :1].repeat(3, axis=2)
    return pixels.transpose(2, 0, 1)


def _decode_deep_png(data: bytearray, n_channels: int) -> NDArray[np.uint16]:
    """Return 2 to 4 channels of 16 bits (H, W, C). Pillow decodes them one byte per channel at a time."""

    def decode(rawmode: str) -> NDArray[np.uint8]:
        image = PngImageFile(io.BytesIO(data))
        image.tile = [image.tile[0]._replace(args=rawmode)]
        return np.array(image)

    if n_channels == 2:
        # The two bytes of both channels, as four channels.
        return decode("RGBA").view(">u2").astype(np.uint16)
    mode = "RGB" if n_channels == 3 else "RGBA"
    return decode(f"{mode};16B") * np.uint16(256) + decode(f"{mode};16L")


def _decode_jpeg(data: bytearray, header: Header, rgb: bool) -> NDArray[Any]:
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    # Four channels are CMYK.
    mode = ImageReadMode.RGB if rgb or header.channels == 4 else ImageReadMode.UNCHANGED
    try:
        pixels: NDArray[np.uint8] = decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), mode).numpy()
    except RuntimeError as error:
        # The decoder begins with a position in its own sources.
        reason = re.sub(r"^\S+, \S+:\d+, ", "", str(error).splitlines()[0])
        if "allocate" in reason:
            # Running out of memory does not mean that the image is damaged.
            raise MemoryError(reason) from error
        raise ValueError(reason) from error
    return pixels


FORMATS = {
    "jpeg": ImageFormat((".jpg", ".jpeg", ".jpe", ".jfif"), b"\xff\xd8\xff", _read_jpeg_header, _decode_jpeg),
    "png": ImageFormat((".png",), b"\x89PNG\r\n\x1a\n", _read_png_header, _decode_png),
}
"""Every format by its name."""
