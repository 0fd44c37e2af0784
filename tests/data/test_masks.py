"""Which pixels of a mask are lesion, for every sort of mask: never the background, never silently nothing."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from hpsearch.data.decode import MAX_BYTES, MemoryGate, decode_job
from hpsearch.data.decode_pool import DecodeError, ImageStats, Job
from hpsearch.data.reading import PLAIN_READING, Reading

from .conftest import draw_pair, encode_png

INSIDE = draw_pair("a", "train", np.random.default_rng(0), size=(40, 64)).mask > 0
RED, WHITE, BLACK, BLUE = (255, 0, 0), (255, 255, 255), (0, 0, 0), (0, 0, 255)
GRAY, RGB, PALETTE, GRAY_ALPHA, RGBA = 0, 2, 3, 4, 6

Value = int | tuple[int, ...]


def png(background: Value, lesion: Value, color: int, depth: int = 8, **chunks: bytes) -> bytes:
    """A mask with these two pixel values."""
    samples = np.where(INSIDE[..., None], np.atleast_1d(lesion), np.atleast_1d(background))
    return encode_png(samples, depth, color, [(kind.encode(), content) for kind, content in chunks.items()])


def read(tmp_path: Path, content: bytes, reading: Reading = PLAIN_READING) -> tuple[NDArray[np.uint8], ImageStats]:
    """The mask (H, W) of 0 and 1, and its stats."""
    (tmp_path / "m.png").write_bytes(content)
    Image.new("RGB", INSIDE.shape[::-1]).save(tmp_path / "a.png")
    job = Job(tmp_path / "a.png", tmp_path / "m.png", ("resize",), *INSIDE.shape, reading=reading)
    stats, [(_, mask)] = decode_job(job, MemoryGate(MAX_BYTES))
    assert stats.foreground == mask.sum()
    return mask, stats


def check(tmp_path: Path, content: bytes, values: tuple[str, ...]) -> None:
    """The lesion is where it was drawn, and both values have these names."""
    mask, stats = read(tmp_path, content)
    assert np.array_equal(mask, INSIDE)
    assert stats.mask_values == values


class TestGray:
    @pytest.mark.parametrize(
        ("depth", "low", "high"),
        [
            (1, 0, 1),
            (2, 0, 1),
            (2, 1, 2),
            (4, 3, 12),
            (8, 0, 1),
            (8, 0, 255),
            (8, 100, 101),
            (16, 0, 1),
            (16, 1, 65535),
        ],
    )
    def test_the_larger_value_is_lesion(self, tmp_path: Path, depth: int, low: int, high: int) -> None:
        check(tmp_path, png(low, high, GRAY, depth), (str(low), str(high)))

    def test_a_transparent_background_agrees(self, tmp_path: Path) -> None:
        check(tmp_path, png(0, 255, GRAY, tRNS=b"\0\0"), ("0 with alpha 0", "255 with alpha 255"))

    def test_a_transparent_lesion_contradicts(self, tmp_path: Path) -> None:
        with pytest.raises(
            DecodeError,
            match="has the values 0 with alpha 255 and 255 with alpha 0, and colours and transparency do not agree",
        ) as error:
            read(tmp_path, png(0, 255, GRAY, tRNS=b"\0\xff"))
        assert error.value.kind == "ambiguous mask"

    def test_a_damaged_transparency_is_damage(self, tmp_path: Path) -> None:
        with pytest.raises(DecodeError, match="cannot be decoded: its header is damaged"):
            read(tmp_path, png(0, 255, GRAY, tRNS=b"\0"))


class TestPalette:
    @pytest.mark.parametrize("depth", [1, 2, 4, 8])
    @pytest.mark.parametrize("colors", [(WHITE, RED), (WHITE, BLACK), (BLACK, BLUE), (RED, RED), (BLACK, (0, 0, 1))])
    def test_the_index_is_the_value_whatever_the_colours(
        self, tmp_path: Path, depth: int, colors: tuple[tuple[int, ...], ...]
    ) -> None:
        content = png(0, 1, PALETTE, depth, PLTE=bytes(sample for color in colors for sample in color))
        check(tmp_path, content, ("index 0", "index 1"))

    def test_transparency_of_the_palette_plays_no_part(self, tmp_path: Path) -> None:
        check(tmp_path, png(0, 1, PALETTE, PLTE=bytes(6), tRNS=b"\xff\0"), ("index 0", "index 1"))

    def test_indices_without_colours(self, tmp_path: Path) -> None:
        check(tmp_path, png(0, 7, PALETTE, PLTE=bytes(6)), ("index 0", "index 7"))

    def test_pillows_palettes(self, tmp_path: Path) -> None:
        image = Image.fromarray(INSIDE.astype(np.uint8) * 255).convert("P")
        file = io.BytesIO()
        image.save(file, "PNG")
        mask, _ = read(tmp_path, file.getvalue())
        assert np.array_equal(mask, INSIDE)


class TestColour:
    @pytest.mark.parametrize("depth", [8, 16])
    @pytest.mark.parametrize("background", [WHITE, BLACK, (128, 128, 128)])
    @pytest.mark.parametrize("lesion", [RED, (0, 0, 1), (0, 128, 0)])
    def test_the_coloured_one_is_lesion(
        self, tmp_path: Path, depth: int, background: tuple[int, ...], lesion: tuple[int, ...]
    ) -> None:
        mask, _ = read(tmp_path, png(background, lesion, RGB, depth))
        assert np.array_equal(mask, INSIDE)

    @pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 255), (254, 255)])
    def test_of_two_grays_the_brighter_is_lesion(self, tmp_path: Path, low: int, high: int) -> None:
        check(tmp_path, png((low,) * 3, (high,) * 3, RGB), (str(low), str(high)))

    def test_deep_colours_that_differ_in_their_lower_bits_only(self, tmp_path: Path) -> None:
        check(tmp_path, png((0, 0, 0), (0, 0, 1), RGB, 16), ("0", "#000000000001"))

    def test_of_two_colours_neither_is_chosen(self, tmp_path: Path) -> None:
        with pytest.raises(DecodeError, match=r"m\.png has the values #0000ff and #ff0000, and colours") as error:
            read(tmp_path, png(BLUE, RED, RGB))
        assert error.value.kind == "ambiguous mask"

    def test_a_third_colour_is_too_many(self, tmp_path: Path) -> None:
        samples = np.where(INSIDE[..., None], RED, WHITE)
        samples[0, 5] = BLACK
        with pytest.raises(DecodeError, match=r"more than two values \(255, 0, #ff0000\)") as error:
            read(tmp_path, encode_png(samples, 8, RGB))
        assert error.value.kind == "mask of many values"


class TestTransparency:
    @pytest.mark.parametrize("depth", [8, 16])
    @pytest.mark.parametrize("color", [BLACK, WHITE, RED])
    @pytest.mark.parametrize(("low", "high"), [(0, 255), (0, 1), (100, 200)])
    def test_of_one_colour_the_more_opaque_is_lesion(
        self, tmp_path: Path, depth: int, color: tuple[int, ...], low: int, high: int
    ) -> None:
        mask, _ = read(tmp_path, png((*color, low), (*color, high), RGBA, depth))
        assert np.array_equal(mask, INSIDE)

    @pytest.mark.parametrize("gray", [0, 255])
    def test_gray_with_transparency(self, tmp_path: Path, gray: int) -> None:
        check(tmp_path, png((gray, 0), (gray, 255), GRAY_ALPHA), (f"{gray} with alpha 0", f"{gray} with alpha 255"))

    @pytest.mark.parametrize("alpha", [0, 128, 255])
    def test_alpha_of_one_value_is_passed_over(self, tmp_path: Path, alpha: int) -> None:
        mask, _ = read(tmp_path, png((0, alpha), (255, alpha), GRAY_ALPHA))
        assert np.array_equal(mask, INSIDE)
        mask, _ = read(tmp_path, png((*WHITE, alpha), (*RED, alpha), RGBA))
        assert np.array_equal(mask, INSIDE)

    @pytest.mark.parametrize(
        ("background", "lesion"),
        [
            ((*WHITE, 0), (*RED, 255)),
            ((*BLACK, 0), (*WHITE, 255)),
            ((*BLUE, 0), (*RED, 255)),
            ((*BLACK, 0), (*RED, 1)),
        ],
    )
    def test_colours_that_agree(self, tmp_path: Path, background: tuple[int, ...], lesion: tuple[int, ...]) -> None:
        mask, _ = read(tmp_path, png(background, lesion, RGBA))
        assert np.array_equal(mask, INSIDE)

    @pytest.mark.parametrize(
        ("clear", "opaque"), [((*WHITE, 0), (*BLACK, 255)), ((*RED, 0), (*WHITE, 255)), ((*RED, 0), (*BLACK, 255))]
    )
    def test_colours_that_contradict_are_refused(
        self, tmp_path: Path, clear: tuple[int, ...], opaque: tuple[int, ...]
    ) -> None:
        with pytest.raises(DecodeError, match="colours and transparency do not agree"):
            read(tmp_path, png(clear, opaque, RGBA))

    def test_smooth_borders_are_too_many(self, tmp_path: Path) -> None:
        samples = np.where(INSIDE[..., None], (*RED, 255), (*RED, 0))
        samples[0, 5] = (*RED, 128)
        with pytest.raises(DecodeError, match="more than two values"):
            read(tmp_path, encode_png(samples, 8, RGBA))


class TestOneValue:
    @pytest.mark.parametrize(
        ("value", "color", "full"),
        [
            (0, GRAY, False),
            (1, GRAY, True),
            (BLACK, RGB, False),
            (WHITE, RGB, True),
            (RED, RGB, True),
            ((*RED, 0), RGBA, False),
            ((*BLACK, 255), RGBA, False),
            ((*WHITE, 255), RGBA, True),
            ((255, 0), GRAY_ALPHA, False),
        ],
    )
    def test_alone_it_is_empty_where_it_is_nothing(
        self, tmp_path: Path, value: Value, color: int, full: bool
    ) -> None:
        mask, stats = read(tmp_path, png(value, value, color))
        assert mask.all() == mask.any() == full
        assert len(stats.mask_values) == 1

    @pytest.mark.parametrize(
        ("value", "color", "background", "lesion", "full"),
        [
            (1, GRAY, "1", "2", False),
            (2, GRAY, "1", "2", True),
            (3, GRAY, "1", "2", True),
            (WHITE, RGB, "255", "#ff0000", False),
            (RED, RGB, "255", "#ff0000", True),
            ((*BLACK, 255), RGBA, "0 with alpha 0", "0 with alpha 255", True),
            ((*BLACK, 0), RGBA, "0 with alpha 0", "0 with alpha 255", False),
            ((*BLACK, 255), RGBA, "0 with alpha 255", "255 with alpha 255", False),
        ],
    )
    def test_it_is_what_it_is_in_the_other_masks(
        self, tmp_path: Path, value: Value, color: int, background: str, lesion: str, full: bool
    ) -> None:
        reading = Reading(background=(background,), lesion=(lesion,))
        mask, _ = read(tmp_path, png(value, value, color), reading)
        assert mask.all() == mask.any() == full

    def test_index_0_is_empty_and_index_1_is_full(self, tmp_path: Path) -> None:
        for index in (0, 1):
            mask, stats = read(tmp_path, png(index, index, PALETTE, PLTE=bytes([*WHITE, *BLACK])))
            assert mask.all() == mask.any() == bool(index)
            assert stats.mask_values == (f"index {index}",)


@pytest.mark.parametrize(
    ("background", "lesion", "text"),
    [
        (1, 2, r"has background 1 and lesion 2, but .* masks of the dataset 1 is lesion"),
        (-1, 0, r"has background 0 and lesion 1, but .* masks of the dataset 1 is background"),
    ],
)
def test_masks_that_disagree_are_refused(tmp_path: Path, background: int, lesion: int, text: str) -> None:
    if background < 0:
        content, reading = png(0, 1, GRAY), Reading(background=("1",), lesion=("2",))
    else:
        content, reading = png(background, lesion, GRAY), Reading(background=("0",), lesion=("1",))
    with pytest.raises(DecodeError, match=text) as error:
        read(tmp_path, content, reading)
    assert error.value.kind == "masks disagree"
