"""Sizes are read from the first bytes, and damaged bytes give nothing but a ValueError."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hpsearch.data.headers import Header, read_header


def encode(mode: str, format: str, **options: object) -> bytes:
    """A picture of 20 rows and 30 columns."""
    file = io.BytesIO()
    Image.new(mode, (30, 20)).save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_size_of_a_jpeg(mode: str, progressive: bool) -> None:
    header = read_header(encode(mode, "JPEG", progressive=progressive))
    assert header == Header("jpeg", 20, 30, wide=progressive)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "I;16"])
def test_size_of_a_png(mode: str) -> None:
    assert read_header(encode(mode, "PNG")) == Header("png", 20, 30, wide=mode == "I;16")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_a_jpeg(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    header = read_header(encode("RGB", "JPEG", exif=exif))
    assert header.orientation == orientation
    assert header.turned_size == ((30, 20) if orientation >= 5 else (20, 30))


@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_in_either_byte_order(order: str) -> None:
    mark = b"II" if order == "<" else b"MM"
    tiff = mark + struct.pack(order + "HIHHHIHH", 42, 8, 1, 0x0112, 3, 1, 6, 0)
    segment = b"Exif\0\0" + tiff
    jpeg = encode("RGB", "JPEG")
    assert (
        read_header(jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + jpeg[2:]).orientation
        == 6
    )


def test_damaged_exif_means_upright() -> None:
    segment = b"Exif\0\0II*\0\xff\xff\xff\xff"
    jpeg = encode("RGB", "JPEG")
    assert (
        read_header(jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + jpeg[2:]).orientation
        == 1
    )


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"not an image", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"it is|its header"):
        read_header(data)


@given(
    start=st.sampled_from([encode("RGB", "JPEG"), encode("RGB", "PNG")]),
    cut=st.integers(0, 200),
    changes=st.lists(st.tuples(st.integers(0, 199), st.integers(0, 255)), max_size=6),
)
def test_damaged_bytes_give_a_header_or_a_value_error(start: bytes, cut: int, changes: list[tuple[int, int]]) -> None:
    data = np.frombuffer(start[:cut], np.uint8).copy()
    for at, value in changes:
        if at < len(data):
            data[at] = value
    try:
        header = read_header(data.tobytes())
    except ValueError:
        return
    assert header.height > 0
    assert header.width > 0
