"""Read and decode image files. FORMATS has one entry per file format.

A new format is a new entry of FORMATS and needs no change elsewhere. An entry names the suffixes and the first bytes
of the files, and has two functions: one reads the header, the other decodes the whole content.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

import numpy as np
from PIL.PngImagePlugin import PngImageFile

if TYPE_CHECKING:
    from torch import Tensor

MAX_PIXELS = 100_000_000
"""Larger images are refused as damaged or hostile. The largest image of ISIC-2017 has 30 million pixels."""
UNSUPPORTED_SUFFIXES = (
    *(".bmp", ".dib", ".tif", ".tiff", ".gif", ".webp", ".heic", ".heif", ".avif", ".jp2", ".j2k", ".jxl"),
    *(".dcm", ".dicom", ".svg", ".psd", ".tga", ".ppm", ".pgm", ".pbm", ".dng"),
)
"""Suffixes (lower case) of images that cannot be decoded unless FORMATS has them. They are reported as errors."""

_PIECE_BYTES = 2**20
"""Inflated bytes that are checked at once."""
_LAST_PNG_FILTER = 4
_PNG_CRITICAL = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
"""Valid bits per sample by colour type."""
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column, first row, column step and row step of each pass of an interlaced PNG."""
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_PALETTE = 3
_EXIF_ORIENTATION = 0x0112
_EXIF_MARK = b"Exif\0\0"
_EXIF_TYPES = {1: "B", 3: "H", 4: "I"}
_MAX_JPEG_HEADER_BYTES = 16 * 2**20


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
    wide: bool = False
    """Whether decoding needs more memory: 16 bits per channel (PNG), or a progressive JPEG."""
    palette: bool = False
    transparent: tuple[int, ...] | None = None
    """Gray value or colour of a PNG that is transparent (tRNS without a palette)."""

    def size(self, *, upright: bool) -> tuple[int, int]:
        """Return height and width, as stored or with the orientation applied."""
        return (self.width, self.height) if upright and self.orientation >= 5 else (self.height, self.width)

    def decode_bytes(self, channels: int) -> int:
        """Return about how much memory decoding to `channels` takes."""
        return self.height * self.width * channels * (3 if self.wide else 1)


@dataclass(frozen=True)
class ImageFormat:
    """A file format that can be decoded."""

    suffixes: tuple[str, ...]
    """Name endings in lower case."""
    magic: bytes
    """First bytes of a file."""
    read_header: Callable[[IO[bytes]], Header]
    """Reads the few bytes that matter. Raises ValueError, EOFError or struct.error if they are damaged."""
    decode: Callable[[bytearray, Header, bool], Tensor]
    """Decodes the whole file to (C, H, W), uint8 or uint16.

    With True as the last argument the result is RGB. With False it has the samples of the file, which for a palette
    are the indices. Raises ValueError for damaged content.
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


def is_unsupported(suffix: str) -> bool:
    """Return whether `suffix` is that of an image that cannot be decoded."""
    return suffix.lower() in UNSUPPORTED_SUFFIXES and suffix.lower() not in readable_suffixes()


def read_header(source: bytes | bytearray | IO[bytes]) -> Header:
    """Return the header of an open file or of its whole content. Only the few bytes that matter are read.

    Raises ValueError, with the reason, for a file of unknown format or with a damaged header.
    """
    file = io.BytesIO(source) if isinstance(source, bytes | bytearray) else source
    start = _up_to(file, 0, 16)
    try:
        for each in FORMATS.values():
            if start.startswith(each.magic):
                return each.read_header(file)
    except (EOFError, struct.error) as error:
        raise ValueError("its header breaks off") from error
    names = " nor ".join(name.upper() for name in FORMATS)
    raise ValueError(f"it is neither {names}: convert it to one of them" if start else "it is empty")


def verify_png(data: bytes | bytearray) -> None:
    """Check a PNG before it is decoded, because libpng errors end the process in torchvision 0.29.

    Raises ValueError, with the reason, for an unknown critical chunk, a wrong CRC, a missing palette, pixels that
    cannot be inflated, missing pixels, and a row with an unknown filter (PNG, third edition, 5.3, 7.2 and 9.2).
    """
    view, at = memoryview(data), 8
    inflate, rows, needs_palette = zlib.decompressobj(), None, False
    while at + 12 <= len(view):
        length, kind = struct.unpack_from(">I4s", view, at)
        content = view[at + 8 : at + 8 + length]
        if len(content) < length or at + 12 + length > len(view):
            raise ValueError(f"it breaks off in its chunk {kind.decode('latin-1')}")
        (crc,) = struct.unpack_from(">I", view, at + 8 + length)
        is_critical = not kind[0] & 0x20
        if is_critical and kind not in _PNG_CRITICAL:
            raise ValueError(f"its chunk {kind.decode('latin-1')} is unknown")
        if (is_critical or kind == b"tRNS") and zlib.crc32(content, zlib.crc32(kind)) != crc:
            raise ValueError(f"its chunk {kind.decode('latin-1')} has a wrong checksum")
        if kind == b"IHDR":
            rows = _PngRows(content)
            needs_palette = content[9] == _PALETTE
        if kind == b"PLTE":
            needs_palette = False
        if kind == b"IDAT" and needs_palette:
            raise ValueError("it has no palette")
        if kind == b"IDAT" and rows is not None and not inflate.eof:
            try:
                piece = inflate.decompress(content, _PIECE_BYTES)
                while piece:
                    rows.add(piece)
                    piece = inflate.decompress(inflate.unconsumed_tail, _PIECE_BYTES)
            except zlib.error as error:
                raise ValueError(f"its pixels cannot be inflated: {error}") from error
        if kind == b"IEND":
            break
        at += 12 + length
    if rows is None or rows.n_missing > 0:
        raise ValueError("it has fewer pixels than its header says")


class _PngRows:
    """Counts the inflated bytes of a PNG and checks the filter byte of each row."""

    def __init__(self, header: memoryview) -> None:
        width, height, depth, color, _, _, interlace = struct.unpack_from(">IIBBBBB", header)
        bits = depth * _PNG_CHANNELS.get(color, 1)
        passes = _ADAM7 if interlace else ((0, 0, 1, 1),)
        sizes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in passes]
        # Number of rows and bytes per row, filter included, of each pass that has pixels.
        self._passes = [(n_rows, 1 + (columns * bits + 7) // 8) for columns, n_rows in sizes if columns > 0 < n_rows]
        self._at = 0
        self.n_missing = sum(n_rows * n_bytes for n_rows, n_bytes in self._passes)

    def add(self, piece: bytes) -> None:
        """Check the next inflated bytes. Raise ValueError for an unknown filter."""
        self.n_missing -= len(piece)
        while piece and self._passes:
            n_rows, n_bytes = self._passes[0]
            part = piece[: n_rows * n_bytes - self._at]
            if max(part[-self._at % n_bytes :: n_bytes], default=0) > _LAST_PNG_FILTER:
                raise ValueError("it has a row with an unknown filter")
            self._at += len(part)
            piece = piece[len(part) :]
            if self._at == n_rows * n_bytes:
                del self._passes[0]
                self._at = 0


def _read_png_header(file: IO[bytes]) -> Header:
    """Read the chunks of a PNG (third edition, 5.3). eXIf may come before the pixels or after them."""
    if _exactly(file, 12, 4) != b"IHDR":
        raise ValueError("its header is damaged")
    width, height, depth, color = struct.unpack(">IIBB", _exactly(file, 16, 10))
    if depth not in _PNG_DEPTHS.get(color, ()) or not width or not height:
        raise ValueError("its header is damaged")
    orientation, transparent = None, None
    at = 33
    while len(start := _up_to(file, at, 8)) == 8 and start[4:] != b"IEND" and start[4:].isalpha():
        length, kind = struct.unpack(">I4s", start)
        if kind == b"eXIf" and orientation is None:
            orientation = _exif_orientation(_up_to(file, at + 8, length))
        if kind == b"tRNS" and color in (0, 2):
            content = _up_to(file, at + 8, min(length, 2 * _PNG_CHANNELS[color]))
            transparent = tuple(value for (value,) in struct.iter_unpack(">H", content[: len(content) // 2 * 2]))
        at += 12 + length
    return Header(
        "png",
        height,
        width,
        _PNG_CHANNELS[color],
        depth,
        orientation or 1,
        wide=depth == 16,
        palette=color == _PALETTE,
        transparent=transparent if transparent and len(transparent) == _PNG_CHANNELS[color] else None,
    )


def _read_jpeg_header(file: IO[bytes]) -> Header:
    """Read the segments of a JPEG up to the frame header (ITU-T T.81, B.1)."""
    orientation, at = None, 2
    while at < _MAX_JPEG_HEADER_BYTES:
        mark, marker = _exactly(file, at, 2)
        if mark != 0xFF:
            raise ValueError("its header is damaged")
        # A fill byte, or a marker without content.
        if marker == 0xFF or 0xD0 <= marker <= 0xD8 or marker == 0x01:
            at += 1 if marker == 0xFF else 2
            continue
        if marker in (0xD9, 0xDA):
            raise ValueError("its header names no size")
        (length,) = struct.unpack(">H", _exactly(file, at + 2, 2))
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            depth, height, width, channels = struct.unpack(">BHHB", _exactly(file, at + 4, 6))
            if not width or not height:
                raise ValueError("its header names no size")
            return Header("jpeg", height, width, channels, depth, orientation or 1, wide=marker not in (0xC0, 0xC1))
        if marker == 0xE1 and orientation is None and _up_to(file, at + 4, 6) == _EXIF_MARK:
            orientation = _exif_orientation(_up_to(file, at + 4, length - 2))
        at += 2 + length
    raise EOFError


def _exif_orientation(exif: bytes) -> int | None:
    """Return the orientation in the first directory of a TIFF block, None if it is missing or invalid."""
    tiff = exif.removeprefix(_EXIF_MARK)
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return None
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (n_entries,) = struct.unpack_from(order + "H", tiff, directory)
        for entry in range(n_entries):
            at = directory + 2 + 12 * entry
            tag, kind = struct.unpack_from(order + "HH", tiff, at)
            if tag == _EXIF_ORIENTATION and kind in _EXIF_TYPES:
                (value,) = struct.unpack_from(order + _EXIF_TYPES[kind], tiff, at + 8)
                return value if 1 <= value <= 8 else None
    except struct.error:
        # Damaged EXIF says nothing about the pixels, and decoders ignore it.
        pass
    return None


def _exactly(file: IO[bytes], at: int, n: int) -> bytes:
    content = _up_to(file, at, n)
    if len(content) < n:
        raise EOFError
    return content


def _up_to(file: IO[bytes], at: int, n: int) -> bytes:
    file.seek(at)
    return file.read(max(0, n))


def _decode_png(data: bytearray, header: Header, rgb: bool) -> Tensor:
    import torch
    from torchvision.io import decode_png

    if header.palette and not rgb:
        # torchvision returns colours, and wrong values for less than 8 bits.
        with PngImageFile(io.BytesIO(data)) as image:
            return torch.from_numpy(np.array(image, np.uint8))[None]
    verify_png(data)
    return _decode_by_torchvision(decode_png, data, rgb)


def _decode_jpeg(data: bytearray, header: Header, rgb: bool) -> Tensor:
    from torchvision.io import decode_jpeg

    # Four channels are CMYK.
    return _decode_by_torchvision(decode_jpeg, data, rgb or header.channels == 4)


def _decode_by_torchvision(decoder: Callable[..., Tensor], data: bytearray, rgb: bool) -> Tensor:
    import torch
    from torchvision.io import ImageReadMode

    try:
        return decoder(
            torch.frombuffer(data, dtype=torch.uint8), ImageReadMode.RGB if rgb else ImageReadMode.UNCHANGED
        )
    except RuntimeError as error:
        # The decoders begin with a position in their own sources.
        reason = re.sub(r"^\S+, \S+:\d+, ", "", str(error).splitlines()[0])
        if "allocate" in reason:
            # Running out of memory does not mean that the image is damaged.
            raise
        raise ValueError(reason) from error


FORMATS = {
    "jpeg": ImageFormat((".jpg", ".jpeg", ".jpe", ".jfif"), b"\xff\xd8\xff", _read_jpeg_header, _decode_jpeg),
    "png": ImageFormat((".png",), b"\x89PNG\r\n\x1a\n", _read_png_header, _decode_png),
}
"""Every format by its name."""
