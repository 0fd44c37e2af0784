import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from hpsearch.config.data import DataConfig
from hpsearch.data import duplicates
from hpsearch.data.cache import Cache, Index, Preparation
from hpsearch.data.dataset import Sample, Split
from hpsearch.data.decode_pool import ImageStats
from hpsearch.data.duplicates import DuplicatePair, find_in_dataset, find_near_duplicates, write_contact_sheet
from hpsearch.data.folds import connected
from hpsearch.data.prepare import Prepared
from tests.data.conftest import Pair, WriteDataset

# Pairs of ISIC-2017 that show one photograph, found by this module with a low threshold and then looked at.
KNOWN_PAIRS = (
    ("ISIC_0012970", "ISIC_0012127"),
    ("ISIC_0012290", "ISIC_0013594"),
    ("ISIC_0012756", "ISIC_0013184"),
    ("ISIC_0012673", "ISIC_0012672"),
    ("ISIC_0000171", "ISIC_0015124"),
    ("ISIC_0000215", "ISIC_0015313"),
    ("ISIC_0014788", "ISIC_0000165"),
    ("ISIC_0000224", "ISIC_0014791"),
    ("ISIC_0000177", "ISIC_0014657"),
    ("ISIC_0000222", "ISIC_0014846"),
    ("ISIC_0000206", "ISIC_0014739"),
    ("ISIC_0000223", "ISIC_0014818"),
    ("ISIC_0000204", "ISIC_0014748"),
    ("ISIC_0000164", "ISIC_0014795"),
    ("ISIC_0014946", "ISIC_0000157"),
    ("ISIC_0000205", "ISIC_0014742"),
    ("ISIC_0000229", "ISIC_0014771"),
    ("ISIC_0000225", "ISIC_0014778"),
)


def scene(seed: int, size: int = 128) -> NDArray[np.uint8]:
    """A dark spot on skin with hairs and pores under a round vignette: alike for all seeds but in its details."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size - 0.5
    gray = 190 - 90 * np.exp(-((x / 0.22) ** 2 + (y / 0.25) ** 2))
    for cells, strength in ((8, 12.0), (16, 14.0), (32, 14.0)):
        noise = Image.fromarray(rng.normal(size=(cells, cells)).astype(np.float32))
        gray = gray + strength * np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC))
    gray = np.where(np.hypot(x, y) > 0.55, 20, gray)
    colored = gray[..., None] * np.array([1.0, 0.8, 0.7])
    return np.clip(colored, 0, 255).astype(np.uint8)


def resized(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def degraded(
    image: NDArray[np.uint8], *, height: int, width: int, quality: int, brightness: float = 1.0
) -> NDArray[np.uint8]:
    """`image` resized, made brighter, written as JPEG, read and brought back to its size."""
    small = np.clip(resized(image, height, width) * brightness, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).save(file, "JPEG", quality=quality)
    return resized(np.asarray(Image.open(file)), *image.shape[:2])


def read(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image)


class Images(Cache):
    """A cache of images (N, H, W, 3) in memory, without masks and files."""

    def __init__(self, images: NDArray[np.uint8], ids: Iterable[str], splits: Iterable[Split] | None = None) -> None:
        self.images = images
        self.ids = tuple(ids)
        samples = tuple(
            Sample(id, Path(), Path(), split)
            for id, split in zip(self.ids, splits or ["train"] * len(self.ids), strict=True)
        )
        # Copies are not byte-identical, so that the search has to find them.
        stats = tuple(ImageStats(*images.shape[1:3], image_sha256=id) for id in self.ids)
        self.index = Index("", "memory", Preparation(*images.shape[1:3], ("resize",)), samples, stats, ())

    def read(self, indices, *, held_out=False):
        return self.images[indices], np.zeros((len(indices), *self.images.shape[1:3]), np.uint8)


def in_one_unit(pairs: Iterable[tuple[str, str]], ids: Sequence[str]) -> list[int]:
    return connected(ids, ids, None, pairs)


def names(pairs: tuple[DuplicatePair, ...]) -> set[tuple[str, str]]:
    return {(pair.a, pair.b) for pair in pairs}


@pytest.fixture(scope="module")
def scenes() -> NDArray[np.uint8]:
    """24 different scenes, (24, 128, 128, 3)."""
    return np.stack([scene(seed) for seed in range(24)])


@pytest.fixture(scope="module")
def ids() -> list[str]:
    return [f"image{number:02d}" for number in range(24)]


def test_scenes_that_only_look_alike_are_no_pair(scenes, ids):
    flat = scenes.reshape(24, -1).astype(float)
    assert np.corrcoef(flat)[np.triu_indices(24, 1)].min() > 0.8
    assert find_near_duplicates([Images(scenes, ids)]) == ()


@pytest.mark.parametrize("orientation", range(8))
def test_copy_is_found_resized_recompressed_brightened_and_turned(scenes, ids, orientation):
    copies = []
    for number in range(6):
        copy = degraded(
            scenes[number], height=70 + 25 * number, width=180, quality=40, brightness=0.9 + 0.04 * number
        )
        turned = np.rot90(copy, orientation // 2)
        copies.append(turned[:, ::-1] if orientation % 2 else turned)
    copied = Images(np.stack(copies), [f"copy{number}" for number in range(6)])
    pairs = find_near_duplicates([Images(scenes, ids), copied])
    assert names(pairs) == {(f"image{number:02d}", f"copy{number}") for number in range(6)}


@pytest.mark.parametrize("orientation", range(8))
def test_copy_that_comes_first_is_found_in_every_orientation(scenes, ids, orientation):
    turned = np.rot90(scenes[3], orientation // 2)
    copy = turned[:, ::-1] if orientation % 2 else turned
    pairs = find_near_duplicates([Images(copy[None], ["copy"]), Images(scenes, ids)])
    assert names(pairs) == {("copy", "image03")}


def test_frame_that_was_cropped_a_little_is_found(scenes, ids):
    copy = resized(scenes[5][3:, 2:-3], 128, 128)
    pairs = find_near_duplicates([Images(scenes, ids), Images(copy[None], ["copy"])])
    assert names(pairs) == {("image05", "copy")}


def test_equal_pixels_have_similarity_one(scenes):
    (pair,) = find_near_duplicates([Images(scenes[[0, 1, 0]], "abc", ["train", "val", "val"])])
    assert (pair.a, pair.b, pair.split_a, pair.split_b) == ("a", "c", "train", "val")
    assert pair.similarity == pytest.approx(1.0, abs=1e-5)
    assert pair.similarity <= 1.0


def test_most_similar_pair_comes_first(scenes):
    worse = degraded(scenes[0], height=70, width=70, quality=30)
    better = degraded(scenes[1], height=128, width=128, quality=90)
    images = np.stack([scenes[0], worse, scenes[1], better])
    pairs = find_near_duplicates([Images(images, ["a", "a-worse", "b", "b-better"])])
    assert [pair.b for pair in pairs] == ["b-better", "a-worse"]
    assert pairs[0].similarity > pairs[1].similarity


def test_pairs_across_pool_and_test_are_marked_and_pairs_within_test_left_out(scenes):
    pool, test = Images(scenes[[0, 1]], "ab", ["train", "val"]), Images(scenes[[0, 2, 2]], "cde", ["test"] * 3)
    pairs = find_near_duplicates([pool, test])
    assert names(pairs) == {("a", "c")}
    assert pairs[0].across
    assert not DuplicatePair("a", "b", "train", "val", 0.9).across


def test_size_of_the_images_may_be_anything(scenes):
    for height, width in ((64, 64), (50, 97), (300, 211)):
        images = np.stack([resized(image, height, width) for image in scenes[[0, 1, 2, 1]]])
        assert names(find_near_duplicates([Images(images, "abcd")])) == {("b", "d")}


def test_constant_images_are_no_pair():
    images = np.stack([np.full((64, 64, 3), value, dtype=np.uint8) for value in (0, 0, 128, 255)])
    assert find_near_duplicates([Images(images, "abcd")]) == ()


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_images_have_no_pairs(scenes, n):
    assert find_near_duplicates([Images(scenes[:n], "a"[:n])]) == ()


def test_many_copies_of_one_photograph_stay_in_one_group(scenes, ids):
    copies = np.repeat(scenes[:1], 60, axis=0)
    all_ids = [*ids, *(f"copy{number:02d}" for number in range(60))]
    units = in_one_unit(names(find_near_duplicates([Images(np.concatenate((scenes, copies)), all_ids)])), all_ids)
    assert set(units[24:]) == {units[0]}
    assert len(set(units)) == 24


def pair(a: str, b: str) -> DuplicatePair:
    return DuplicatePair(a, b, "train", "train", 0.9)


def test_contact_sheet_shows_the_two_images_of_each_pair_side_by_side(tmp_path):
    path = tmp_path / "sheet.png"
    scenes = np.stack([scene(seed, 160) for seed in range(3)])
    pairs = [pair("a", "b"), pair("c", "a"), pair("b", "c"), pair("a", "c"), pair("b", "a")]
    write_contact_sheet(path, pairs, [Images(scenes[:2], "ab"), Images(scenes[2:3], "c")])
    sheet = read(path)
    assert sheet.shape == (6 + 2 * 166, 6 + 4 * 326, 3)
    np.testing.assert_array_equal(sheet[6:166, 6:166], scenes[0])
    np.testing.assert_array_equal(sheet[6:166, 166:326], scenes[1])
    np.testing.assert_array_equal(sheet[6:166, 332:492], scenes[2])
    np.testing.assert_array_equal(sheet[172:332, 6:166], scenes[1])
    assert (sheet[172:332, 332:] == 255).all()


@pytest.fixture
def pairs_with_duplicates(scenes) -> list[Pair]:
    """Scenes 0 to 3 for training, of which 3 shows 1, 4 and 5 for validation, 6 and a copy of 5 for testing."""
    shown = [*scenes[:3], degraded(scenes[1], height=90, width=110, quality=60), *scenes[4:7], scenes[5].copy()]
    shown[-1][0, 0] ^= 1  # not byte-equal: that is refused elsewhere
    splits = ["train"] * 4 + ["val"] * 2 + ["test"] * 2
    mask = np.full((128, 128), 255, dtype=np.uint8)
    mask[:20] = 0
    return [
        Pair(f"ISIC_{number:07d}", split, image, mask)
        for number, (split, image) in enumerate(zip(splits, shown, strict=True))
    ]


@pytest.mark.slow
def test_duplicates_of_a_dataset_are_found_and_drawn(write_dataset: WriteDataset, pairs_with_duplicates, tmp_path):
    config = write_dataset(pairs=pairs_with_duplicates, size=32)
    found = find_in_dataset(config, tmp_path / "cache", with_test=True, sheet=tmp_path / "sheet.png")
    assert [(pair.a, pair.b, pair.across) for pair in found] == [
        ("ISIC_0000005", "ISIC_0000007", True),
        ("ISIC_0000001", "ISIC_0000003", False),
    ]
    assert read(tmp_path / "sheet.png").shape == (6 + 166, 6 + 2 * 326, 3)


@pytest.mark.parametrize(
    ("config", "height", "width"),
    [
        (DataConfig(size=64), 64, 64),
        (DataConfig(size=(80, 100)), 80, 100),
        (DataConfig(size=32), 128, 128),
        (DataConfig(size=48, cache_size=96), 96, 96),
        (DataConfig(size=256, match="crop"), 128, 128),
    ],
)
def test_pool_alone_is_read_from_the_cache_of_the_study_if_that_holds_whole_frames_large_enough(
    monkeypatch, tmp_path, tiny_cache: Cache, config, height, width
):
    asked = []

    def prepare(config: DataConfig, root: Path, *, role: str) -> Prepared:
        asked.append(config)
        return Prepared(tiny_cache.path, tiny_cache.index, (), ())

    monkeypatch.setattr(duplicates, "prepare_pool", prepare)
    find_in_dataset(config, tmp_path, with_test=False, sheet=tmp_path / "sheet.png")
    assert [(config.match, *config.cached_size) for config in asked] == [("resize", height, width)]
    assert not (tmp_path / "sheet.png").exists()


def real_images(root: Path) -> tuple[NDArray[np.uint8], list[str], list[Split]]:
    """All dermoscopic images below `root` as (N, 256, 256, 3), their ids and splits."""
    images, ids, splits = [], [], []
    for split, folder in (("train", "Training"), ("val", "Validation"), ("test", "Test_v2")):
        for path in sorted((root / f"ISIC-2017_{folder}_Data").glob("*.jpg")):
            images.append(read(path))
            ids.append(path.stem)
            splits.append(split)
    return np.stack(images), ids, splits


@pytest.mark.usefixtures("one_decoder")
def test_byte_equal_images_are_pairs_however_flat_and_however_many(write_dataset: WriteDataset, tmp_path):
    """Fifteen flat copies: twelve in the pool, three in the test split."""
    flat = np.full((64, 64, 3), 200, dtype=np.uint8)
    mask = np.eye(64, dtype=np.uint8) * 255
    pairs = [Pair(f"{number:02d}", "test" if number > 11 else "train", flat, mask) for number in range(15)]
    found = find_in_dataset(write_dataset(pairs=pairs, size=64), tmp_path / "cache", with_test=True)
    assert {pair.similarity for pair in found} == {1.0}
    across = {name for pair in found if pair.across for name in (pair.a, pair.b)}
    assert across == {pair.id for pair in pairs}
    assert set(in_one_unit(names(found), [pair.id for pair in pairs])) == {0}
    assert len(found) < 30


@pytest.mark.slow
def test_dataset_without_a_test_split_is_searched_as_well(
    write_dataset: WriteDataset, pairs_with_duplicates, tmp_path
):
    config = write_dataset(pairs=[pair for pair in pairs_with_duplicates if pair.split != "test"], size=32)
    (found,) = find_in_dataset(config, tmp_path / "cache", with_test=True)
    assert (found.a, found.b) == ("ISIC_0000001", "ISIC_0000003")


@pytest.mark.slow
@pytest.mark.skipif("HPSEARCH_ISIC_ROOT" not in os.environ, reason="HPSEARCH_ISIC_ROOT is not set")
def test_duplicates_planted_among_real_images_are_found_and_nothing_else():
    images, ids, splits = real_images(Path(os.environ["HPSEARCH_ISIC_ROOT"]))
    rng = np.random.default_rng(0)
    originals = rng.choice(len(images), 300, replace=False)
    copies = []
    for original in originals:
        height, width = (int(side) for side in rng.integers(64, 600, 2))
        quality, brightness = int(rng.integers(25, 95)), float(rng.uniform(0.85, 1.15))
        copy = degraded(images[original], height=height, width=width, quality=quality, brightness=brightness)
        copies.append(np.rot90(copy, int(rng.integers(4))))
    copy_ids = [f"copy{number}" for number in range(len(copies))]

    pairs = find_near_duplicates([Images(images, ids, splits), Images(np.stack(copies), copy_ids)])

    planted = {(ids[original], copy) for original, copy in zip(originals, copy_ids, strict=True)}
    known_pairs = [pair for pair in KNOWN_PAIRS if set(pair) <= set(ids)]
    all_ids = ids + copy_ids
    true_groups = dict(zip(all_ids, in_one_unit([*planted, *known_pairs], all_ids), strict=True))
    assert len(planted & names(pairs)) / len(planted) >= 0.95
    right = [true_groups[found.a] == true_groups[found.b] for found in pairs]
    assert sum(right) / len(right) >= 0.95
    known = {frozenset(known_pair) for known_pair in KNOWN_PAIRS} - {frozenset(p) for p in names(pairs)}
    assert not {found for found in known if found <= set(ids)}
