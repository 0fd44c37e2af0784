"""Read what a JPEG or PNG says about itself, such as its size and EXIF orientation, before anything is decoded."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from typing import IO, Literal

MAX_PIXELS = 100_000_000
"""Images that claim more are taken for damaged or hostile; the largest of ISIC-2017 has 30 million."""

_PIECE_BYTES = 2**20
"""Pixels that are inflated at once to check them."""
_LAST_PNG_FILTER = 4
_PNG_CRITICAL = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
"""Bits of a sample that there are, by colour type."""
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column and row, and the distances between columns and rows, of each pass of an interlaced PNG."""
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_PALETTE = 3
_EXIF_ORIENTATION = 0x0112
_EXIF_MARK = b"Exif\0\0"
_EXIF_TYPES = {1: "B", 3: "H", 4: "I"}
_LONGEST_HEAD = 16 * 2**20
"""Bytes of a JPEG within which its size must be found."""


@dataclass(frozen=True)
class Header:
    """Size, channels and orientation of an image file."""

    format: Literal["jpeg", "png"]
    height: int
    width: int
    """Of the pixels as they are stored, before any orientation."""
    channels: int = 3
    """Channels in the file: 1 for a palette; transparency that a PNG names apart (tRNS) does not count."""
    depth: int = 8
    """Bits of a channel."""
    orientation: int = 1
    """The EXIF orientation: 1 is upright, 5 to 8 lie on their side."""
    wide: bool = False
    """16 bits a channel (PNG), or all coefficients held until the end (progressive JPEG)."""
    palette: bool = False
    transparent: tuple[int, ...] | None = None
    """The one gray value or colour of a PNG that is transparent (tRNS without a palette)."""

    def size(self, *, upright: bool) -> tuple[int, int]:
        """Height and width, as stored or with the orientation applied."""
        return (self.width, self.height) if upright and self.orientation >= 5 else (self.height, self.width)

    def decode_bytes(self, channels: int) -> int:
        """Memory that decoding to `channels` takes, about."""
        return self.height * self.width * channels * (3 if self.wide else 1)


def read_header(source: bytes | bytearray | IO[bytes]) -> Header:
    """The header of a file, or of its whole content.

    ValueError, saying why, if it is neither JPEG nor PNG or breaks off. Only the few bytes that matter are read.
    """
    file = io.BytesIO(source) if isinstance(source, bytes | bytearray) else source
    start = _up_to(file, 0, 8)
    try:
        if start == b"\x89PNG\r\n\x1a\n":
            return _png(file)
        if start[:3] == b"\xff\xd8\xff":
            return _jpeg(file)
    except (EOFError, struct.error) as error:
        raise ValueError("its header breaks off") from error
    raise ValueError("it is empty" if not start else "it is neither JPEG nor PNG: convert it to one of them")


def verify_png(data: bytes | bytearray) -> None:
    """Check a PNG before it is decoded: libpng's errors end the process in torchvision 0.29.

    Raises ValueError, saying what is damaged: a chunk that is unknown but critical or has a wrong CRC, no palette,
    pixels that cannot be inflated, fewer of them than the header says, or a row with an unknown filter (PNG, third
    edition, 5.3, 7.2 and 9.2).
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
    """Counts the bytes of a PNG's rows, and checks the filter that each row begins with, as they are inflated."""

    def __init__(self, header: memoryview) -> None:
        width, height, depth, color, _, _, interlace = struct.unpack_from(">IIBBBBB", header)
        bits = depth * _PNG_CHANNELS.get(color, 1)
        passes = _ADAM7 if interlace else ((0, 0, 1, 1),)
        sizes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in passes]
        # Number of rows and bytes of a row with its filter, for each pass that has pixels.
        self._passes = [(n_rows, 1 + (columns * bits + 7) // 8) for columns, n_rows in sizes if columns > 0 < n_rows]
        self._at = 0
        self.n_missing = sum(n_rows * n_bytes for n_rows, n_bytes in self._passes)

    def add(self, piece: bytes) -> None:
        """Take the next inflated bytes. ValueError for a filter that there is not."""
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


def _png(file: IO[bytes]) -> Header:
    """Walk over the chunks (PNG, third edition, 5.3): eXIf may come before the pixels or after them."""
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


def _jpeg(file: IO[bytes]) -> Header:
    """Walk over the segments up to the frame header (ITU-T T.81, B.1)."""
    orientation, at = None, 2
    while at < _LONGEST_HEAD:
        mark, marker = _exactly(file, at, 2)
        if mark != 0xFF:
            raise ValueError("its header is damaged")
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if 0xD0 <= marker <= 0xD8 or marker == 0x01:  # markers without content
            at += 2
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
    """The orientation in the first directory of a TIFF block; None if there is none or it makes no sense."""
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
        # Damaged EXIF says nothing about the pixels, and decoders pass over it.
        return None
    return None


def _exactly(file: IO[bytes], at: int, n: int) -> bytes:
    content = _up_to(file, at, n)
    if len(content) < n:
        raise EOFError
    return content


def _up_to(file: IO[bytes], at: int, n: int) -> bytes:
    file.seek(at)
    return file.read(max(0, n))
