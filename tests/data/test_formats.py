"""Sizes come from the first bytes, damaged bytes raise only ValueError, and a new format is one entry."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torchvision.io import ImageReadMode, decode_png

from hpsearch.config.data import DataConfig
from hpsearch.data.decode import read_pair
from hpsearch.data.formats import DAMAGE, FORMATS, Header, ImageFormat, read_header
from hpsearch.data.layouts import find_samples
from hpsearch.data.reading import PLAIN_READING
from hpsearch.inference.predictor import find_images

from .conftest import encode_png, png_chunk

corrupt_exif = pytest.mark.filterwarnings("ignore:Corrupt EXIF|Tag data|Truncated File")


def encode(mode: str, format: str, **options: object) -> bytes:
    """A picture of 20 rows and 30 columns."""
    file = io.BytesIO()
    Image.new(mode, (30, 20)).save(file, format, **options)
    return file.getvalue()


def header_of(content: bytes) -> Header:
    return read_header(io.BytesIO(content))


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_size_of_a_jpeg(mode: str, progressive: bool) -> None:
    header = header_of(encode(mode, "JPEG", progressive=progressive))
    assert header == Header("jpeg", 20, 30, {"L": 1, "RGB": 3, "CMYK": 4}[mode])


@pytest.mark.parametrize(
    ("mode", "channels", "depth"),
    [("1", 1, 1), ("L", 1, 8), ("P", 1, 1), ("LA", 2, 8), ("RGB", 3, 8), ("RGBA", 4, 8), ("I;16", 1, 16)],
)
def test_size_and_channels_of_a_png(mode: str, channels: int, depth: int) -> None:
    expected = Header("png", 20, 30, channels, depth, palette=mode == "P")
    assert header_of(encode(mode, "PNG")) == expected


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    header = header_of(encode("RGB", format, exif=exif))
    assert header.orientation == orientation
    assert header.size(upright=True) == ((30, 20) if orientation >= 5 else (20, 30))
    assert header.size(upright=False) == (20, 30)


def tiff(order: str, *, orientation: int = 6, kind: str = "H") -> bytes:
    """A TIFF block that says nothing but an orientation; `kind` is its type: H short, I long."""
    entry = struct.pack(order + "HHI" + kind, 0x0112, {"H": 3, "I": 4}[kind], 1, orientation).ljust(12, b"\0")
    return (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, 1) + entry


def with_exif(exif: bytes, format: str, *, at_end: bool = False) -> bytes:
    """A picture with this EXIF block; in a PNG before its pixels or after them."""
    image = encode("RGB", format)
    if format == "JPEG":
        segment = b"Exif\0\0" + exif
        return image[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + image[2:]
    chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif + struct.pack(">I", zlib.crc32(b"eXIf" + exif))
    at = len(image) - 12 if at_end else 33
    return image[:at] + chunk + image[at:]


@corrupt_exif
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["H", "I"])
def test_orientation_in_either_byte_order(format: str, order: str, kind: str) -> None:
    assert header_of(with_exif(tiff(order, kind=kind), format)).orientation == 6


@corrupt_exif
@pytest.mark.parametrize("mark", [b"", b"Exif\0\0"])
def test_orientation_behind_the_pixels_of_a_png(mark: bytes) -> None:
    assert header_of(with_exif(mark + tiff("<"), "PNG", at_end=True)).orientation == 6


@corrupt_exif
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("exif", [b"II*\0\xff\xff\xff\xff", b"", b"MM", tiff("<", orientation=9), tiff(">")[:-8]])
def test_damaged_exif_means_upright(format: str, exif: bytes) -> None:
    assert header_of(with_exif(exif, format)).orientation == 1


def test_only_the_bytes_that_matter_are_read() -> None:
    class Counted(io.BytesIO):
        n_read = 0

        def read(self, size: int | None = -1, /) -> bytes:
            content = super().read(size)
            self.n_read += len(content)
            return content

    for format in ("JPEG", "PNG"):
        file = Counted(encode("RGB", format) + bytes(2**20))
        assert read_header(file).size(upright=True) == (20, 30)
        assert file.n_read < 2000


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"not an image", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"it is|its header"):
        header_of(data)


@corrupt_exif
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
        header = header_of(data.tobytes())
    except ValueError:
        return
    assert header.height > 0
    assert header.width > 0


class TestDamagedPng:
    """Damage to a PNG is found, because a mask with other pixels would be a wrong mask."""

    def png(self, mode: str) -> bytes:
        file = io.BytesIO()
        pixels = np.random.default_rng(0).integers(0, 256, (13, 11, 4)).astype(np.uint8)
        Image.fromarray(pixels).convert(mode).save(file, "PNG")
        return file.getvalue()

    def file(self, *chunks: tuple[bytes, bytes]) -> bytes:
        return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*each) for each in chunks)

    def decode(self, content: bytes) -> NDArray[np.uint8]:
        return FORMATS["png"].decode(bytearray(content), read_header(io.BytesIO(content)), True)

    def test_an_interlaced_file_is_sound(self) -> None:
        # 3x3 gray pixels: passes 1, 4, 5, 6 and 7 of Adam7 have pixels, one row of each but two of the sixth.
        rows = b"\0a" + b"\0b" + b"\0cc" + b"\0d\0e" + b"\0fff"
        header = struct.pack(">IIBBBBB", 3, 3, 8, 0, 0, 0, 1)
        for pixels, is_sound in ((rows, True), (rows[:-1], False)):
            file = self.file((b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b""))
            with contextlib.nullcontext() if is_sound else pytest.raises(DAMAGE):
                assert bytes(self.decode(file)[0].flatten().tolist()) == b"adb" + b"fff" + b"cec"

    @pytest.mark.parametrize("mode", ["L", "RGB"])
    def test_no_flipped_bit_in_what_is_decoded_goes_unnoticed(self, mode: str) -> None:
        sound = self.png(mode)
        for place in range(8, len(sound) - 12):  # up to IEND
            damaged = bytearray(sound)
            damaged[place] ^= 1 << place % 8
            with pytest.raises(DAMAGE):
                self.decode(bytes(damaged))

    @pytest.mark.parametrize(
        ("pixels", "is_sound"),
        [
            (zlib.compress(b"\0ab" * 2), True),
            (zlib.compress(b"\0ab" * 2)[:-6], False),
            (zlib.compress(b"\0ab"), False),
            (zlib.compress(b"\5ab" * 2), False),
            (zlib.compress(b"\0ab\5ab"), False),
            (b"no deflate", False),
        ],
    )
    def test_pixels_that_break_off_and_unknown_filters_are_damage(self, pixels: bytes, is_sound: bool) -> None:
        header = struct.pack(">IIBBBBB", 2, 2, 8, 0, 0, 0, 0)
        with contextlib.nullcontext() if is_sound else pytest.raises(DAMAGE):
            self.decode(self.file((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")))


@pytest.mark.filterwarnings("ignore:The image decoding")
@pytest.mark.parametrize("rgb", [True, False])
@pytest.mark.parametrize(
    ("color", "depth"),
    [*((0, depth) for depth in (1, 2, 4, 8, 16)), *((color, depth) for color in (2, 4, 6) for depth in (8, 16))],
)
def test_pixels_of_a_png_are_those_of_an_independent_decoder(color: int, depth: int, rgb: bool) -> None:
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[color]
    samples = np.random.default_rng(0).integers(0, 2**depth, (7, 16, channels))
    content = bytearray(encode_png(samples, depth, color))
    mode = ImageReadMode.RGB if rgb else ImageReadMode.UNCHANGED
    expected = decode_png(torch.frombuffer(content, dtype=torch.uint8), mode)
    pixels = FORMATS["png"].decode(content, read_header(io.BytesIO(content)), rgb)
    assert pixels.dtype == expected.numpy().dtype
    assert np.array_equal(pixels, expected.numpy())


def test_a_format_in_the_table_is_found_read_and_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dummy format of gray bytes: `RAW`, height, width, pixels."""

    def decode(data: bytearray, header: Header, rgb: bool) -> NDArray[np.uint8]:
        planes = np.array(data[5:]).reshape(1, header.height, header.width)
        return planes.repeat(3, axis=0) if rgb else planes

    def header(file: IO[bytes]) -> Header:
        file.seek(3)
        return Header("raw", *file.read(2), channels=1)

    monkeypatch.setitem(FORMATS, "raw", ImageFormat((".tif",), b"RAW", header, decode))
    for folder, pixels in (("images", bytes(range(6))), ("masks", bytes([0, 0, 255] * 2))):
        (tmp_path / folder).mkdir()
        for name in ("a", "b"):
            (tmp_path / folder / f"{name}.tif").write_bytes(b"RAW\x02\x03" + pixels)
    dataset = find_samples(DataConfig(images=str(tmp_path / "images"), masks=str(tmp_path / "masks"), test_share=0.5))
    assert dataset.problems == ()
    assert [sample.id for sample in dataset.samples] == ["a", "b"]
    image, mask = read_pair(dataset.samples[0].image, dataset.samples[0].mask, PLAIN_READING)
    assert image.tolist() == [[[0, 1, 2], [3, 4, 5]]] * 3
    assert mask.tolist() == [[0, 0, 1], [0, 0, 1]]
    assert find_images([tmp_path / "images"]) == [tmp_path / "images" / "a.tif", tmp_path / "images" / "b.tif"]
