"""Pixels come out right from every sort of JPEG and PNG, images and masks stay aligned, and damage is named."""

from __future__ import annotations

import hashlib
import struct
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch.nn.functional import interpolate

from hpsearch.data.decode import (
    MAX_BYTES,
    MemoryGate,
    crop,
    crop_corner,
    decode_job,
    open_pair,
    read_image,
    read_pair,
    resize,
    resize_mask,
)
from hpsearch.data.decode_pool import DecodeError, ImageStats, Job, Pixels
from hpsearch.data.reading import PLAIN_READING, Reading
from hpsearch.errors import DatasetError

from .conftest import draw_pair, encode_png, png_bomb


def smooth(height: int, width: int, channels: int = 3) -> NDArray[np.uint8]:
    """A picture that JPEG hardly changes."""
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows / (9 + c)) * np.cos(columns / (11 + 2 * c)) for c in range(channels)]
    return (127 + 100 * np.stack(waves, -1)).astype(np.uint8)


def save(path: Path, pixels: NDArray[np.generic], mode: str | None = None, **options: object) -> Path:
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def run(
    image: Path, mask: Path, *views: str, size: tuple[int, int] = (16, 24), seed: str = ""
) -> tuple[ImageStats, list[Pixels]]:
    job = Job(image, mask, views, *size, seed)  # type: ignore[arg-type]
    return decode_job(job, MemoryGate(MAX_BYTES))


def pair(tmp_path: Path, height: int = 40, width: int = 60) -> tuple[Path, Path]:
    """An image and its mask, without loss."""
    drawn = draw_pair("a", "train", np.random.default_rng(0), size=(height, width))
    return save(tmp_path / "a.png", drawn.image), save(tmp_path / "m.png", drawn.mask)


class TestReading:
    @pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
    @pytest.mark.parametrize("progressive", [False, True])
    def test_jpeg_of_any_colours_becomes_rgb(self, tmp_path: Path, mode: str, progressive: bool) -> None:
        picture = Image.fromarray(smooth(50, 70)).convert(mode)
        picture.save(tmp_path / "a.jpg", quality=98, progressive=progressive)
        read = read_image(tmp_path / "a.jpg", PLAIN_READING)
        assert (read.shape, read.dtype) == ((3, 50, 70), torch.uint8)
        expected = np.asarray(picture.convert("RGB")).astype(int)
        assert np.abs(read.permute(1, 2, 0).numpy().astype(int) - expected).mean() < 3

    def test_png_is_read_without_loss(self, tmp_path: Path) -> None:
        picture = smooth(50, 70)
        read = read_image(save(tmp_path / "a.png", picture), PLAIN_READING)
        assert np.array_equal(read.permute(1, 2, 0).numpy(), picture)

    @pytest.mark.parametrize("mode", ["RGBA", "P", "L", "LA"])
    def test_png_of_any_colours_becomes_rgb(self, tmp_path: Path, mode: str) -> None:
        picture = Image.fromarray(smooth(20, 30)).convert(mode)
        picture.save(tmp_path / "a.png")
        read = read_image(tmp_path / "a.png", PLAIN_READING)
        assert np.array_equal(read.permute(1, 2, 0).numpy(), np.asarray(picture.convert("RGB")))

    @pytest.mark.parametrize("bits", [1, 2, 4])
    @pytest.mark.parametrize("palette", [False, True])
    def test_few_bits_are_gray_levels_or_colours(self, tmp_path: Path, bits: int, palette: bool) -> None:
        samples = np.random.default_rng(0).integers(0, 2**bits, (20, 32), dtype=np.uint8)
        colors = np.random.default_rng(1).integers(0, 256, (2**bits, 3), dtype=np.uint8)
        chunks = [(b"PLTE", colors.tobytes())] if palette else []
        (tmp_path / "a.png").write_bytes(encode_png(samples, bits, 3 if palette else 0, chunks))
        expected = colors[samples] if palette else np.repeat(samples[..., None] * (255 // (2**bits - 1)), 3, 2)
        read = read_image(tmp_path / "a.png", PLAIN_READING).permute(1, 2, 0).numpy()
        assert np.array_equal(read, expected)

    def test_content_counts_and_not_the_name(self, tmp_path: Path) -> None:
        picture = smooth(20, 30)
        save(tmp_path / "a.png", picture).rename(tmp_path / "a.jpg")
        assert np.array_equal(read_image(tmp_path / "a.jpg", PLAIN_READING).permute(1, 2, 0).numpy(), picture)


class TestMoreThanEightBits:
    @pytest.mark.parametrize("channels", [1, 2, 3, 4])
    @pytest.mark.parametrize(("max_value", "shift"), [(255, 0), (1023, 2), (4095, 4), (16383, 6), (65535, 8)])
    def test_full_scale_is_divided_evenly(self, tmp_path: Path, channels: int, max_value: int, shift: int) -> None:
        deep = np.random.default_rng(0).integers(0, max_value + 1, (20, 30, channels), dtype=np.uint16)
        deep[0, :2, 0] = 0, max_value
        (tmp_path / "a.png").write_bytes(encode_png(deep, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels]))
        read = read_image(tmp_path / "a.png", Reading(max_value=max_value)).permute(1, 2, 0).numpy()
        colors = deep[..., :3] if channels > 2 else np.repeat(deep[..., :1], 3, 2)
        assert np.array_equal(read, colors >> shift)
        assert (read[0, 0, 0], read[0, 1, 0]) == (0, 255)

    def test_any_full_scale_becomes_255(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a.png", np.arange(3001, dtype=np.uint16)[None])
        read = read_image(path, Reading(max_value=3000))[0, 0].tolist()
        assert read == [value * 256 // 3001 for value in range(3001)]
        assert (read[0], read[-1]) == (0, 255)

    def test_value_above_full_scale_is_refused_with_both_values(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a.png", np.array([[0, 5000]], np.uint16))
        with pytest.raises(DatasetError, match=r"a\.png has the value 5000, above the full scale 4095"):
            read_image(path, Reading(max_value=4095))

    def test_full_scale_is_255_where_the_pool_has_no_more_than_eight_bits(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a.png", np.array([[0, 200]], np.uint16))
        assert read_image(path, PLAIN_READING)[0, 0].tolist() == [0, 200]
        save(path, np.array([[0, 256]], np.uint16))
        with pytest.raises(DatasetError, match=r"a\.png has the value 256, above the full scale 255"):
            read_image(path, PLAIN_READING)

    def test_eight_bits_are_as_they_are(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a.png", smooth(20, 30))
        assert torch.equal(read_image(path, Reading(max_value=4095)), read_image(path, PLAIN_READING))


class TestMasks:
    """The rule itself is tested in test_masks.py."""

    @pytest.mark.parametrize(("value", "expected"), [(0, 0), (1, 1), (128, 1), (255, 1)])
    def test_mask_of_one_value_is_empty_or_full(self, tmp_path: Path, value: int, expected: int) -> None:
        image = save(tmp_path / "a.png", smooth(20, 30))
        mask = save(tmp_path / "m.png", np.full((20, 30), value, np.uint8))
        assert set(read_pair(image, mask, PLAIN_READING)[1].unique().tolist()) == {expected}

    def test_mask_of_three_values_is_damage(self, tmp_path: Path) -> None:
        values = np.zeros((20, 30), np.uint8)
        values[3:9], values[5, 5] = 255, 128
        image, mask = save(tmp_path / "a.png", smooth(20, 30)), save(tmp_path / "m.png", values)
        with pytest.raises(
            DatasetError, match=r"m\.png has more than two values \(0, 255, 128\): save it as PNG with two values"
        ):
            read_pair(image, mask, PLAIN_READING)

    @pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
    def test_jpeg_mask_of_exactly_two_values(self, tmp_path: Path, mode: str) -> None:
        inside = np.zeros((32, 48), bool)
        inside[8:24, 16:32] = True
        image = save(tmp_path / "a.png", smooth(32, 48))
        mask = save(tmp_path / "m.jpg", np.where(inside, 255, 0).astype(np.uint8), mode, quality=100, subsampling=0)
        assert np.array_equal(read_pair(image, mask, PLAIN_READING)[1].numpy(), inside)

    def test_palette_that_breaks_off_is_damage(self, tmp_path: Path) -> None:
        values = np.random.default_rng(0).integers(0, 2, (64, 64), dtype=np.uint8)
        image, mask = save(tmp_path / "a.png", smooth(64, 64)), tmp_path / "m.png"
        content = encode_png(values, 8, 3, [(b"PLTE", bytes(6))])
        mask.write_bytes(content[: len(content) // 2])
        with pytest.raises(DatasetError, match=r"m\.png cannot be decoded"):
            read_pair(image, mask, PLAIN_READING)


class TestDamage:
    def test_sizes_that_differ_are_both_named(self, tmp_path: Path) -> None:
        image = save(tmp_path / "a.png", smooth(20, 30))
        mask = save(tmp_path / "m.png", np.zeros((20, 31), np.uint8))
        with pytest.raises(DatasetError, match=r"m\.png is 20x31, its image is 20x30"):
            read_pair(image, mask, PLAIN_READING)

    @pytest.mark.parametrize("format", ["jpg", "png"])
    @pytest.mark.parametrize("share", [0, 0.02, 0.5, 0.95])
    def test_file_that_breaks_off_is_undecodable(self, tmp_path: Path, format: str, share: float) -> None:
        path = save(tmp_path / f"a.{format}", np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(DatasetError, match=rf"a\.{format} cannot be decoded"):
            read_image(path, PLAIN_READING)

    def test_text_is_undecodable(self, tmp_path: Path) -> None:
        (tmp_path / "a.jpg").write_text("<html>404</html>")
        with pytest.raises(DatasetError, match=r"a\.jpg cannot be decoded: it is neither JPEG nor PNG"):
            read_image(tmp_path / "a.jpg", PLAIN_READING)

    def test_a_decoders_reason_is_given_without_its_own_sources(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a.jpg", smooth(40, 50))
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(DatasetError, match=r"a\.jpg cannot be decoded: [A-Z]") as error:
            read_image(path, PLAIN_READING)
        assert ".cpp" not in str(error.value)

    def test_file_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match=r"there is no file .*a\.jpg"):
            read_image(tmp_path / "a.jpg", PLAIN_READING)

    def test_absurd_size_is_refused_before_anything_is_decoded(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "a.png").write_bytes(png_bomb(60_000))
        monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda *_: pytest.fail("it was decoded"))
        with pytest.raises(DatasetError, match="60000x60000 pixels"):
            read_image(tmp_path / "a.png", PLAIN_READING)

    def test_size_behind_a_long_description_is_found(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a.jpg", smooth(20, 30))
        comment = b"\xff\xfe" + struct.pack(">H", 65000) + bytes(64998)
        data = path.read_bytes()
        path.write_bytes(data[:2] + 3 * comment + data[2:])
        assert read_image(path, PLAIN_READING).shape == (3, 20, 30)

    def test_kinds_of_damage_have_names(self, tmp_path: Path) -> None:
        with pytest.raises(DecodeError) as error:
            open_pair(tmp_path / "none.png", tmp_path / "none.png", PLAIN_READING)
        assert error.value.kind == "unreadable file"

    def test_too_little_memory_is_no_damage(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

        monkeypatch.setattr("torchvision.io.decode_jpeg", fail)
        with pytest.raises(MemoryError, match="allocate"):
            read_image(save(tmp_path / "a.jpg", smooth(20, 30)), PLAIN_READING)


class TestOrientation:
    def oriented(self, tmp_path: Path, orientation: int, format: str = "png", name: str = "a") -> Path:
        """40 rows of 60 stored pixels."""
        exif = Image.Exif()
        exif[0x0112] = orientation
        return save(tmp_path / f"{name}.{format}", smooth(40, 60), exif=exif, quality=98)

    @pytest.mark.parametrize("format", ["png", "jpg"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_it_is_applied_as_viewers_do(self, tmp_path: Path, format: str, orientation: int) -> None:
        path = self.oriented(tmp_path, orientation, format)
        with Image.open(path) as stored:
            expected = np.asarray(ImageOps.exif_transpose(stored)).astype(int)
        read = read_image(path, PLAIN_READING).permute(1, 2, 0).numpy().astype(int)
        assert read.shape == expected.shape
        # No two JPEG decoders agree in every pixel.
        assert np.abs(read - expected).mean() < (0.5 if format == "jpg" else 1e-9)

    @pytest.mark.parametrize("format", ["png", "jpg"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_it_is_ignored(self, tmp_path: Path, format: str, orientation: int) -> None:
        read = read_image(self.oriented(tmp_path, orientation, format), Reading("ignore"))
        assert torch.equal(read, read_image(self.oriented(tmp_path, 1, format, "b"), PLAIN_READING))

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_a_turned_image_is_cached_as_its_upright_copy(self, tmp_path: Path, orientation: int) -> None:
        path = self.oriented(tmp_path, orientation)
        upright = read_image(path, PLAIN_READING).permute(1, 2, 0).numpy()
        copy = save(tmp_path / "upright.png", upright)
        mask = save(tmp_path / "m.png", np.zeros(upright.shape[:2], np.uint8))
        stats, [(pixels, _)] = run(path, mask, "resize")
        _, [(expected, _)] = run(copy, mask, "resize")
        assert np.array_equal(pixels, expected)
        assert (stats.height, stats.width) == upright.shape[:2]

    def test_a_masks_own_orientation_is_treated_the_same_way(self, tmp_path: Path) -> None:
        inside = draw_pair("a", "train", np.random.default_rng(0), size=(40, 60)).mask
        exif = Image.Exif()
        exif[0x0112] = 6
        mask = save(tmp_path / "m.png", inside, exif=exif)
        image = self.oriented(tmp_path, 6)
        assert np.array_equal(read_pair(image, mask, PLAIN_READING)[1].numpy() * 255, np.rot90(inside, -1))
        assert np.array_equal(read_pair(image, mask, Reading("ignore"))[1].numpy() * 255, inside)

    @pytest.mark.parametrize(
        ("exif", "size", "text"),
        [
            ("apply", (40, 60), "ignored, but it is applied by default"),
            ("ignore", (60, 40), "applied, but it is ignored by default"),
        ],
    )
    def test_a_pair_against_the_decision_is_refused(
        self, tmp_path: Path, exif: Literal["apply", "ignore"], size: tuple[int, int], text: str
    ) -> None:
        mask = save(tmp_path / "m.png", np.zeros(size, np.uint8))
        with pytest.raises(DatasetError, match=f"match only with the EXIF orientation {text}"):
            read_pair(self.oriented(tmp_path, 6), mask, Reading(exif))


class TestResize:
    @pytest.mark.parametrize("size", [(16, 24), (40, 24), (16, 60), (64, 90), (200, 100), (40, 60)])
    def test_is_torchs_antialiased_resize(self, size: tuple[int, int]) -> None:
        image = torch.from_numpy(smooth(40, 60)).permute(2, 0, 1)
        expected = interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]
        assert torch.equal(resize(image, *size), expected)

    @pytest.mark.parametrize("size", [(16, 24), (64, 90)])
    def test_is_near_an_independent_one(self, size: tuple[int, int]) -> None:
        picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        other = np.asarray(Image.fromarray(picture).resize(size[::-1], Image.Resampling.BILINEAR)).astype(int)
        ours = resize(torch.from_numpy(picture).permute(2, 0, 1), *size).permute(1, 2, 0).numpy().astype(int)
        assert np.abs(ours - other).max() <= 1

    def test_a_pixel_of_which_half_is_lesion_is_lesion(self) -> None:
        stripes = torch.tensor([1, 0], dtype=torch.uint8).repeat(16, 8)
        small = resize_mask(stripes, 16, 8)
        assert bool((small[:, 1:-1] == 1).all())

    @pytest.mark.parametrize("size", [(16, 24), (33, 17), (90, 130)])
    def test_mask_is_where_half_of_the_area_is_lesion(self, size: tuple[int, int]) -> None:
        mask = torch.from_numpy(draw_pair("a", "train", np.random.default_rng(0), size=(80, 100)).mask // 255)
        average = interpolate(mask[None, None].double(), size=size, mode="bilinear", antialias=True)[0, 0]
        made = resize_mask(mask, *size)
        assert set(made.unique().tolist()) == {0, 1}
        clear = (average - 0.5).abs() > 0.01
        assert torch.equal(made[clear] == 1, average[clear] > 0.5)

    @pytest.mark.parametrize("factor", [2, 5, 10])
    def test_border_of_the_mask_stays_where_it_is_in_the_image(self, factor: int) -> None:
        mask = torch.zeros(100, 100, dtype=torch.uint8)
        mask[30:70, 20:60] = 1
        expected = torch.zeros(100 // factor, 100 // factor, dtype=torch.uint8)
        expected[30 // factor : 70 // factor, 20 // factor : 60 // factor] = 1
        made = resize_mask(mask, 100 // factor, 100 // factor)
        # Only a corner can round off: a pixel there averages less than half.
        assert (made != expected).sum() <= 4
        assert torch.equal(made[50 // factor], expected[50 // factor])
        assert torch.equal(made[:, 40 // factor], expected[:, 40 // factor])

    def test_area_of_the_lesion_is_kept(self) -> None:
        mask = torch.from_numpy(draw_pair("a", "train", np.random.default_rng(3), size=(300, 400)).mask // 255)
        share = mask.double().mean().item()
        assert resize_mask(mask, 64, 64).double().mean().item() == pytest.approx(share, rel=0.02)


class TestCrop:
    def test_inside_it_is_a_part_of_the_image(self) -> None:
        image = torch.from_numpy(smooth(40, 60)).permute(2, 0, 1)
        assert torch.equal(crop(image, 5, 7, 16, 24), image[:, 5:21, 7:31])

    @pytest.mark.parametrize("size", [(50, 70), (100, 30), (300, 200)])
    def test_beyond_the_border_it_is_the_mirror_image(self, size: tuple[int, int]) -> None:
        picture = smooth(40, 60, 1)[..., 0]
        top, left = crop_corner((40, 60), size, None)
        before = (max(0, -top), max(0, -left))
        after = (max(0, size[0] - 40 - before[0]), max(0, size[1] - 60 - before[1]))
        padded = np.pad(picture, list(zip(before, after, strict=True)), mode="reflect")
        expected = padded[max(0, top) :, max(0, left) :][: size[0], : size[1]]
        assert np.array_equal(crop(torch.from_numpy(picture), top, left, *size).numpy(), expected)

    def test_one_row_is_repeated(self) -> None:
        assert crop(torch.tensor([[1, 2, 3]]), -1, 0, 3, 3).tolist() == [[1, 2, 3]] * 3

    def test_corners_cover_all_places_and_no_others(self) -> None:
        rng = np.random.default_rng(0)
        corners = {crop_corner((20, 11), (18, 11), rng) for _ in range(100)}
        assert corners == {(0, 0), (1, 0), (2, 0)}

    def test_centre(self) -> None:
        assert crop_corner((21, 10), (10, 20), None) == (5, -5)

    def test_image_and_mask_are_cropped_alike(self, tmp_path: Path) -> None:
        place = np.zeros((40, 60), np.uint8)
        place[11:29, 17:43] = 255
        image = save(tmp_path / "a.png", np.repeat(place[..., None], 3, -1))
        mask = save(tmp_path / "m.png", place)
        for seed in range(5):
            _, pixels = run(image, mask, "random crop", "centre crop", seed=str(seed))
            for cropped, truth in pixels:
                assert np.array_equal(cropped[..., 0] // 255, truth)

    def test_place_depends_on_the_seed_alone(self, tmp_path: Path) -> None:
        image, mask = pair(tmp_path)
        made = [
            run(image, mask, "random crop", seed=seed)[1][0][0].tobytes() for seed in ("0:a", "0:a", "0:b", "1:a")
        ]
        assert made[0] == made[1]
        assert len(set(made)) == 3


class TestJobs:
    def test_stats_are_those_of_the_files_and_pixels(self, tmp_path: Path) -> None:
        image, mask = pair(tmp_path)
        stats, [(pixels, truth)] = run(image, mask, "resize")
        assert (stats.height, stats.width) == (40, 60)
        assert stats.image_sha256 == hashlib.sha256(image.read_bytes()).hexdigest()
        assert stats.mask_sha256 == hashlib.sha256(mask.read_bytes()).hexdigest()
        assert stats.foreground == (np.asarray(Image.open(mask)) > 0).sum()
        assert stats.crc == zlib.crc32(pixels.tobytes() + truth.tobytes())
        r, g, b = pixels.reshape(-1, 3).astype(int).T
        expected = [x.sum() for x in (r, g, b, r * r, g * g, b * b, r * g, r * b, g * b)]
        assert list(stats.moments) == [int(x) for x in expected]

    @pytest.mark.parametrize("color", [(205, 160, 140), (0, 0, 0)])
    def test_an_image_of_one_colour_is_constant(self, tmp_path: Path, color: tuple[int, int, int]) -> None:
        image = np.full((40, 60, 3), color, np.uint8)
        mask = save(tmp_path / "m.png", np.zeros((40, 60), np.uint8))
        assert run(save(tmp_path / "a.png", image), mask)[0].is_constant
        image[39, 59, 2] += 1
        assert not run(save(tmp_path / "a.png", image), mask)[0].is_constant

    def test_without_views_it_is_only_checked(self, tmp_path: Path) -> None:
        image, mask = pair(tmp_path)
        stats, pixels = run(image, mask)
        assert pixels == []
        assert stats.moments == ()

    def test_unmeasured_pixels_are_the_same(self, tmp_path: Path) -> None:
        image, mask = pair(tmp_path)
        job = Job(image, mask, ("resize",), 16, 24, measure=False)
        stats, _ = decode_job(job, MemoryGate(MAX_BYTES))
        assert stats.crc == run(image, mask, "resize")[0].crc
        assert (stats.moments, stats.image_sha256) == ((), "")
