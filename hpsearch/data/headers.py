"""Reads from the first bytes of a JPEG or PNG what it will cost to decode, before anything is decoded."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal

MAX_PIXELS = 100_000_000
"""Images that claim more are taken for damaged or hostile; the largest of ISIC-2017 has 30 million."""

_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Header:
    """What a file says of itself."""

    format: Literal["jpeg", "png"]
    height: int
    width: int
    """Of the pixels as they are stored, before any orientation."""
    orientation: int = 1
    """The EXIF orientation of a JPEG: 1 is upright, 5 to 8 lie on their side."""
    wide: bool = False
    """16 bits a channel (PNG), or all coefficients held until the end (progressive JPEG)."""

    @property
    def turned_size(self) -> tuple[int, int]:
        """Height and width once the orientation is applied."""
        return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)

    def decode_bytes(self, channels: int) -> int:
        """Memory that decoding to `channels` takes, about."""
        return self.height * self.width * channels * (3 if self.wide else 1)


def read_header(data: bytes | bytearray) -> Header:
    """The header of a whole file's content. ValueError, saying why, if it is neither JPEG nor PNG or breaks off."""
    try:
        if data[:8] == b"\x89PNG\r\n\x1a\n":
            return _png(data)
        if data[:3] == b"\xff\xd8\xff":
            return _jpeg(data)
    except (struct.error, IndexError) as error:
        raise ValueError("its header breaks off") from error
    raise ValueError("it is empty" if not data else "it is neither JPEG nor PNG: convert it to one of them")


def _png(data: bytes | bytearray) -> Header:
    if data[12:16] != b"IHDR":
        raise ValueError("its header is damaged")
    width, height, depth, color = struct.unpack_from(">IIBB", data, 16)
    if color not in _PNG_CHANNELS or not width or not height:
        raise ValueError("its header is damaged")
    return Header("png", height, width, wide=depth == 16)


def _jpeg(data: bytes | bytearray) -> Header:
    """Walk over the segments up to the frame header (ITU-T T.81, B.1)."""
    orientation, at = 1, 2
    while True:
        if data[at] != 0xFF:
            raise ValueError("its header is damaged")
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if 0xD0 <= marker <= 0xD8 or marker == 0x01:  # markers without content
            at += 2
            continue
        (length,) = struct.unpack_from(">H", data, at + 2)
        if marker in (0xD9, 0xDA):
            raise ValueError("its header names no size")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, at + 5)
            if not width or not height:
                raise ValueError("its header names no size")
            return Header("jpeg", height, width, orientation, wide=marker not in (0xC0, 0xC1))
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            orientation = _exif_orientation(bytes(data[at + 10 : at + 2 + length])) or orientation
        at += 2 + length


def _exif_orientation(tiff: bytes) -> int | None:
    """The orientation in the first directory of a TIFF block; None if there is none or it makes no sense."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return None
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (n_entries,) = struct.unpack_from(order + "H", tiff, directory)
        for entry in range(n_entries):
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, directory + 2 + 12 * entry)
            if tag == _EXIF_ORIENTATION:
                return value if 1 <= value <= 8 else None
    except struct.error:
        # Damaged EXIF says nothing about the pixels, and decoders pass over it.
        return None
    return None
