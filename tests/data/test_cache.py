"""All kinds of cache return the same, and damage is noticed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from hpsearch.config.data import DataConfig
from hpsearch.data.build import build_cache
from hpsearch.data.cache import INDEX, Cache, Kind, Preparation, open_cache
from hpsearch.data.dataset import Sample, file_sha256
from hpsearch.data.decode import crop, crop_corner, read_pair, resize, resize_mask
from hpsearch.data.decode_pool import Decoders
from hpsearch.data.layouts import find_samples
from hpsearch.data.reading import PLAIN_READING
from hpsearch.errors import CacheError
from tests.cached import images_of, masks_of, sha256_of, splits_of

from .conftest import share_decoder

RESIZE = Preparation(24, 40, ("resize",))
CROP = Preparation(48, 56, ("random crop", "centre crop"), seed=3)


@pytest.fixture(scope="module")
def pool(tiny_archive: Path) -> tuple[Sample, ...]:
    return find_samples(DataConfig(root=str(tiny_archive))).split("train", "val")


@pytest.fixture(scope="module", params=get_args(Kind))
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def caches(
    kind: Kind, pool: tuple[Sample, ...], decoding_process: Decoders, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Preparation, Cache]]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        share_decoder(decoding_process, monkeypatch)
        root = tmp_path_factory.mktemp(kind)
        yield {each: open_cache(build_cache(pool, each, kind, root)) for each in (RESIZE, CROP)}


class TestEveryKind:
    """The contract of the four kinds."""

    def test_describes_its_images(
        self, caches: dict[Preparation, Cache], kind: Kind, pool: tuple[Sample, ...]
    ) -> None:
        cache = caches[RESIZE]
        assert cache.kind == kind
        assert len(cache) == len(pool)
        assert cache.size == (24, 40)
        assert cache.ids == tuple(sample.id for sample in pool)
        assert splits_of(cache) == ("train",) * 8 + ("val",) * 3
        assert sha256_of(cache) == tuple(file_sha256(sample.image) for sample in pool)

    def test_holds_what_decoding_gives(self, caches: dict[Preparation, Cache], pool: tuple[Sample, ...]) -> None:
        images, masks = caches[RESIZE].read(np.arange(len(pool)))
        assert (images.dtype, masks.dtype) == (np.uint8, np.uint8)
        for sample, cached_image, cached_mask in zip(pool, images, masks, strict=True):
            image, mask = read_pair(sample.image, sample.mask, PLAIN_READING)
            assert np.array_equal(cached_image, resize(image, 24, 40).permute(1, 2, 0).numpy())
            assert np.array_equal(cached_mask, resize_mask(mask, 24, 40).numpy())

    def test_reads_in_the_order_asked_for(self, caches: dict[Preparation, Cache]) -> None:
        cache = caches[RESIZE]
        images, masks = cache.read(np.array([5, 0, 10, 0]))
        assert (images.shape, masks.shape) == ((4, 24, 40, 3), (4, 24, 40))
        for row, i in enumerate([5, 0, 10, 0]):
            assert np.array_equal(images[row], images_of(cache)[i])
            assert np.array_equal(masks[row], masks_of(cache)[i])

    def test_reads_nothing_when_nothing_is_asked_for(self, caches: dict[Preparation, Cache]) -> None:
        images, masks = caches[RESIZE].read(np.array([], np.int64))
        assert (images.shape, masks.shape) == ((0, 24, 40, 3), (0, 24, 40))

    def test_index_beyond_the_end_is_an_error(self, caches: dict[Preparation, Cache]) -> None:
        with pytest.raises(IndexError):
            caches[RESIZE].read(np.array([11]))

    def test_what_was_read_is_the_readers_own(self, caches: dict[Preparation, Cache]) -> None:
        images, masks = caches[RESIZE].read(np.array([2]))
        kept = images.copy()
        images[:], masks[:] = 7, 7
        again = caches[RESIZE].read(np.array([2]))
        assert np.array_equal(again[0], kept)
        assert set(np.unique(again[1])) <= {0, 1}
        # torch warns of arrays that it must not write to.
        torch.from_numpy(images)

    def test_held_out_images_are_cropped_in_the_centre(
        self, caches: dict[Preparation, Cache], pool: tuple[Sample, ...]
    ) -> None:
        images, masks = caches[CROP].read(np.arange(len(pool)), held_out=True)
        for sample, cached_image, cached_mask in zip(pool, images, masks, strict=True):
            image, mask = read_pair(sample.image, sample.mask, PLAIN_READING)
            corner = crop_corner((mask.shape[0], mask.shape[1]), (48, 56), None)
            assert np.array_equal(cached_image, crop(image, *corner, 48, 56).permute(1, 2, 0).numpy())
            assert np.array_equal(cached_mask, crop(mask, *corner, 48, 56).numpy())
        training = caches[CROP].read(np.arange(len(pool)))[0]
        assert not np.array_equal(training, images)

    def test_held_out_images_are_the_same_where_nothing_is_cropped(self, caches: dict[Preparation, Cache]) -> None:
        cache = caches[RESIZE]
        assert np.array_equal(cache.read(np.arange(3))[0], cache.read(np.arange(3), held_out=True)[0])

    @pytest.mark.parametrize("preparation", [RESIZE, CROP])
    def test_normalization_is_that_of_the_pixels(
        self, caches: dict[Preparation, Cache], preparation: Preparation
    ) -> None:
        cache, indices = caches[preparation], np.array([0, 3, 4, 9])
        pixels = cache.read(indices)[0].reshape(-1, 3) / 255
        found = cache.normalization(indices, "rgb")
        assert found.mean == pytest.approx(pixels.mean(0), rel=1e-12)
        assert found.std == pytest.approx(pixels.std(0), rel=1e-9)
        gray = pixels @ [0.299, 0.587, 0.114]
        found = cache.normalization(indices, "grayscale")
        assert found.mean == pytest.approx([gray.mean()], rel=1e-12)
        assert found.std == pytest.approx([gray.std()], rel=1e-9)

    def test_sound_pixels_are_not_damaged(self, caches: dict[Preparation, Cache]) -> None:
        assert caches[RESIZE].damaged() == []
        assert caches[CROP].damaged() == []


@pytest.mark.parametrize("wanted", [RESIZE, CROP])
def test_all_kinds_hold_equal_bytes(
    wanted: Preparation, pool: tuple[Sample, ...], tmp_path: Path, one_decoder: Decoders
) -> None:
    caches = [open_cache(build_cache(pool, wanted, kind, tmp_path)) for kind in get_args(Kind)]
    everything = np.arange(len(pool))
    read = {tuple(a.tobytes() for out in (False, True) for a in c.read(everything, held_out=out)) for c in caches}
    assert len(read) == 1
    assert len({cache.key for cache in caches}) == 1
    assert len({cache.path for cache in caches}) == 4


def test_mapped_file_can_be_read_by_anyone(tiny_cache: Cache) -> None:
    assert np.array_equal(np.load(tiny_cache.path / "images.npy"), images_of(tiny_cache))
    assert np.array_equal(np.load(tiny_cache.path / "masks.npy"), masks_of(tiny_cache))


def test_mapped_file_cannot_be_written(tiny_cache: Cache) -> None:
    with pytest.raises(ValueError, match="read-only"):
        tiny_cache._views[0][0][0] = 0


def test_images_of_one_colour_are_not_divided_by_zero(tiny_cache: Cache) -> None:
    n = tiny_cache.size[0] * tiny_cache.size[1]
    flat = replace(tiny_cache.index.stats[0], moments=(10 * n, 0, 0, 100 * n, 0, 0, 0, 0, 0))
    cache = type(tiny_cache)(tiny_cache.path, replace(tiny_cache.index, stats=(flat,) * len(tiny_cache)))
    found = cache.normalization(np.array([0, 1]), "rgb")
    assert found.mean == pytest.approx((10 / 255, 0, 0))
    assert found.std == pytest.approx((1 / 255,) * 3)


def test_an_index_has_the_keys_of_version_0_1(tiny_cache: Cache) -> None:
    table = json.loads((tiny_cache.path / INDEX).read_text().split("\n")[1])
    assert set(table) == {"version", "key", "kind", "preparation", "samples", "facts", "problems"}
    assert set(table["samples"][0]) == {"id", "split", "image", "mask"}
    assert {"foreground", "view_foreground", "mask_values", "image_sha256", "crc"} < set(table["facts"][0])


class TestDamage:
    @pytest.fixture(params=["memmap", "files"])
    def folder(
        self, request: pytest.FixtureRequest, pool: tuple[Sample, ...], tmp_path: Path, one_decoder: Decoders
    ) -> Path:
        return build_cache(pool, RESIZE, request.param, tmp_path)

    def pixels(self, folder: Path) -> Path:
        """A file that holds image 0."""
        return folder / ("images.npy" if folder.name.endswith("memmap") else "000000.npy")

    def test_what_is_no_cache_is_said_to_be_none(self, tmp_path: Path) -> None:
        with pytest.raises(CacheError, match=r"is not a cache: index\.json is missing"):
            open_cache(tmp_path)

    def test_file_that_was_cut_is_noticed(self, folder: Path) -> None:
        path = self.pixels(folder)
        length = path.stat().st_size
        os.truncate(path, length - 1)
        with pytest.raises(CacheError, match=f"{path.name} has {length - 1} bytes, but its index says {length}"):
            open_cache(folder)

    def test_file_that_is_gone_is_noticed(self, folder: Path) -> None:
        self.pixels(folder).unlink()
        with pytest.raises(CacheError, match=r"\.npy has -1 bytes"):
            open_cache(folder)

    def test_index_that_was_edited_is_noticed(self, folder: Path) -> None:
        text = (folder / INDEX).read_text()
        (folder / INDEX).write_text(text.replace("ISIC_0000003", "ISIC_0000033", 1))
        with pytest.raises(CacheError, match="was changed after it was written"):
            open_cache(folder)

    @pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.999])
    def test_index_that_was_cut_is_noticed(self, folder: Path, share: float) -> None:
        text = (folder / INDEX).read_text()
        (folder / INDEX).write_text(text[: int(len(text) * share)])
        with pytest.raises(CacheError, match=r"index\.json (is damaged|was changed)"):
            open_cache(folder)

    def test_index_of_another_version_is_refused(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("hpsearch.data.cache.INDEX_VERSION", 99)
        with pytest.raises(CacheError, match=r"has format \d+, but this hpsearch reads 99"):
            open_cache(folder)

    def test_changed_pixel_is_found_when_looked_for(self, folder: Path) -> None:
        with self.pixels(folder).open("r+b") as file:
            file.seek(-1000 if folder.name.endswith("files") else 200, 2 if folder.name.endswith("files") else 0)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 1]))
        assert [sample.id for sample in open_cache(folder).damaged()] == ["ISIC_0000000"]

    def test_index_says_where_it_came_from(self, folder: Path, pool: tuple[Sample, ...]) -> None:
        _, content, _ = (folder / INDEX).read_text().split("\n")
        assert json.loads(content)["samples"][0]["image"] == str(pool[0].image)


@pytest.mark.parametrize("kind", ["memory", "none"])
def test_image_that_changes_under_a_cache_that_decodes_is_noticed(
    kind: Kind, tiny_archive: Path, tmp_path: Path, one_decoder: Decoders
) -> None:
    shutil.copytree(tiny_archive, tmp_path / "data")
    samples = find_samples(DataConfig(root=str(tmp_path / "data"))).split("train")
    folder = build_cache(samples, RESIZE, kind, tmp_path / "cache")
    shutil.copy(samples[1].mask, samples[0].mask)
    shutil.copy(samples[1].image, samples[0].image)
    with pytest.raises(CacheError, match=r"ISIC_0000000.* changed while it was running"):
        open_cache(folder).read(np.array([0]))
