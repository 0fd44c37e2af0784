"""Read and decode image files. FORMATS has one entry per file format.

To add a format, add an entry to FORMATS. No other change is needed. An entry consists of the file name suffixes, the
first bytes of every file, a function that reads the header, and a function that decodes the file.
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
"""Maximum number of pixels of an image. Larger images are rejected as damaged or malicious.

The largest image in ISIC-2017 has 30 million pixels.
"""
UNSUPPORTED_SUFFIXES = (
    *(".bmp", ".dib", ".tif", ".tiff", ".gif", ".webp", ".heic", ".heif", ".avif", ".jp2", ".j2k", ".jxl"),
    *(".dcm", ".dicom", ".svg", ".psd", ".tga", ".ppm", ".pgm", ".pbm", ".dng"),
)
"""Lower-case suffixes of image formats that cannot be decoded. Files with such a suffix are reported as errors."""
DAMAGE = (ValueError, SyntaxError, EOFError, OSError, struct.error, zlib.error)
"""Exceptions that reading or decoding a damaged file can raise."""

_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Number of channels for each PNG colour type."""


@dataclass(frozen=True)
class Header:
    """Header of an image file: size, channels and orientation."""

    format: str
    """Key of FORMATS."""
    height: int
    width: int
    """Height and width as stored, before the EXIF orientation is applied."""
    channels: int = 3
    """Number of channels in the file. A palette image has one. The tRNS chunk of a PNG is not a channel."""
    depth: int = 8
    """Bits per channel."""
    orientation: int = 1
    """EXIF orientation, from 1 (upright) to 8. Values from 5 to 8 swap height and width."""
    palette: bool = False
    transparent: tuple[int, ...] | None = None
    """Gray value or colour that the tRNS chunk of a PNG without a palette marks as transparent, or None."""

    def size(self, *, upright: bool) -> tuple[int, int]:
        """Return the height and width as stored or, if `upright` is True, after the EXIF orientation is applied."""
        return (self.width, self.height) if upright and self.orientation >= 5 else (self.height, self.width)


@dataclass(frozen=True)
class ImageFormat:
    """Image file format that can be decoded."""

    suffixes: tuple[str, ...]
    """File name suffixes in lower case, such as `.png`."""
    magic: bytes
    """First bytes of every file of this format."""
    read_header: Callable[[IO[bytes]], Header]
    """Function that reads the header from an open file. It raises one of `DAMAGE` if the header is damaged."""
    decode: Callable[[bytearray, Header, bool], NDArray[Any]]
    """Function that decodes the content of a file to an array (C, H, W) of uint8 or uint16.

    The last argument says whether to convert to RGB. If it is False, the stored values are returned, which are
    indices for a palette image. The function raises one of `DAMAGE` if the content is damaged.
    """


def readable_suffixes() -> tuple[str, ...]:
    """Return the lower-case file name suffixes of all formats that can be decoded."""
    return tuple(suffix for each in FORMATS.values() for suffix in each.suffixes)


def without_suffix(name: str) -> str:
    """Return `name` without the suffix of a decodable image format. Other names are returned unchanged."""
    return name[: name.rindex(".")] if name.lower().endswith(readable_suffixes()) else name


def is_image_name(name: str) -> bool:
    """Return whether `name` has the suffix of an image format. Formats that cannot be decoded count too."""
    return name.lower().endswith((*readable_suffixes(), *UNSUPPORTED_SUFFIXES))


def read_header(file: IO[bytes]) -> Header:
    """Return the header of an open file. Raise ValueError if the format is unknown or the header is damaged."""
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
    """Return the EXIF data of a PNG. If it follows the pixels, Pillow would have to decode them to find it."""
    return next((file.read(length) for kind, length in _png_chunks(file) if kind == b"eXIf"), b"")


def _png_chunks(file: IO[bytes]) -> Iterator[tuple[bytes, int]]:
    """Yield the type and length of each chunk of a PNG. The file is positioned at the content of that chunk."""
    file.seek(8)
    while len(start := file.read(8)) == 8 and start[4:] != b"IEND":
        length, kind = struct.unpack(">I4s", start)
        end = file.tell() + length + 4
        yield kind, length
        file.seek(end)


def _check_rows(data: bytearray, header: Header) -> None:
    """Raise ValueError if rows are missing at the end of a PNG. Pillow would silently fill them with 0."""
    bytes_per_row, is_interlaced = 1 + -(-header.width * header.channels * header.depth // 8), data[28]
    file, inflate, n_bytes = io.BytesIO(data), zlib.decompressobj(), 0
    for kind, length in _png_chunks(file):
        if kind == b"IDAT":
            n_bytes += len(inflate.decompress(file.read(length)))
    if n_bytes < header.height * bytes_per_row and not is_interlaced:
        raise ValueError(f"it has {n_bytes // bytes_per_row} of {header.height} rows")


def _orientation(data: bytes) -> int:
    """Return the orientation from EXIF data, or 1 (upright) if it is missing or invalid."""
    exif = Exif()
    try:
        exif.load(data)
        orientation = exif.get(ExifTags.Base.Orientation)
    except (SyntaxError, struct.error):
        # Damaged EXIF data does not mean that the pixels are damaged, and decoders ignore it.
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _decode_png(data: bytearray, header: Header, rgb: bool) -> NDArray[Any]:
    """Decode a PNG with Pillow, because torchvision's decoder crashes the process on damaged files."""
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
        # Drop transparency, and repeat gray values in all channels.
        pixels = pixels[..., :3] if pixels.shape[2] > 2 else pixels[..., :1].repeat(3, axis=2)
    return pixels.transpose(2, 0, 1)


def _decode_deep_png(data: bytearray, n_channels: int) -> NDArray[np.uint16]:
    """Decode a 16-bit PNG with 2 to 4 channels to (H, W, C).

    Pillow has no mode with several 16-bit channels. Images with 3 or 4 channels are therefore decoded twice, once for
    the high and once for the low bytes. Images with 2 channels are decoded once, as if they had four 8-bit channels.
    """

    def decode(rawmode: str) -> NDArray[np.uint8]:
        image = PngImageFile(io.BytesIO(data))
        image.tile = [image.tile[0]._replace(args=rawmode)]
        return np.array(image)

    if n_channels == 2:
        # Two channels of two bytes have the same layout as four channels of one byte.
        return decode("RGBA").view(">u2").astype(np.uint16)
    mode = "RGB" if n_channels == 3 else "RGBA"
    return decode(f"{mode};16B") * np.uint16(256) + decode(f"{mode};16L")


def _decode_jpeg(data: bytearray, header: Header, rgb: bool) -> NDArray[Any]:
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    # Four channels are CMYK, which is converted to RGB in masks too.
    mode = ImageReadMode.RGB if rgb or header.channels == 4 else ImageReadMode.UNCHANGED
    try:
        pixels: NDArray[np.uint8] = decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), mode).numpy()
    except RuntimeError as error:
        # Remove the position in the decoder's source code from the start of the message.
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
"""Supported formats by name."""
