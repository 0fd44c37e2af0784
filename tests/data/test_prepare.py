"""What `study` and `final` read: right images in the right order, everything wrong refused in one message."""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from hpsearch.config import load
from hpsearch.config.data import DataConfig
from hpsearch.data import build, prepare
from hpsearch.data.cache import open_cache
from hpsearch.data.dataset import Layout
from hpsearch.data.folds import make_folds
from hpsearch.data.prepare import PoolCaches, Prepared, check_contents, locate, prepare_pool, prepare_test
from hpsearch.errors import DatasetError, StorageError
from tests.cached import images_of, sha256_of, splits_of

from .conftest import WriteDataset, draw_pair, pair_paths, tiny_pairs

pytestmark = pytest.mark.usefixtures("one_decoder")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def paths(config: DataConfig, number: int) -> tuple[Path, Path]:
    split = "train" if number < 8 else "val" if number < 11 else "test"
    return pair_paths(Path(config.root), "archive", f"ISIC_{number:07d}", split)  # type: ignore[arg-type]


def numbers(prepared: Prepared) -> list[int]:
    return [int(id.removeprefix("ISIC_")) for id in prepared.index.ids]


def test_a_cache_folder_that_is_a_file_is_named(tiny_archive: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"")
    with pytest.raises(StorageError, match=r"cannot write .*cache: File exists"):
        prepare_pool(DataConfig(root=str(tiny_archive)), tmp_path / "cache")


class TestRoles:
    def test_pool_is_training_before_validation(self, tiny_archive: Path, root: Path) -> None:
        prepared = prepare_pool(DataConfig(root=str(tiny_archive), size=(24, 32)), root)
        assert numbers(prepared) == list(range(11))
        assert (len(prepared.index), prepared.excluded) == (11, ())
        cache = open_cache(prepared.cache_path)
        assert splits_of(cache) == ("train",) * 8 + ("val",) * 3
        assert (cache.ids, cache.key) == (prepared.index.ids, prepared.index.key)
        assert cache.size == (24, 32)

    def test_test_split_has_a_cache_of_its_own(self, tiny_archive: Path, root: Path) -> None:
        config = DataConfig(root=str(tiny_archive), size=24)
        prepared = prepare_test(config, root)
        assert numbers(prepared) == [11, 12, 13, 14]
        assert {sample.split for sample in prepared.index.samples} == {"test"}
        assert prepared.cache_path != prepare_pool(config, root).cache_path

    @pytest.mark.parametrize(
        ("limits", "search", "final", "test"),
        [
            ({"n_search_train": 3}, [0, 1, 2, 8, 9, 10], list(range(11)), [11, 12, 13, 14]),
            ({"n_search_validation": 1}, list(range(9)), list(range(11)), [11, 12, 13, 14]),
            ({"n_search_train": 2, "n_search_validation": 2}, [0, 1, 8, 9], list(range(11)), [11, 12, 13, 14]),
            ({"n_final_train": 9, "n_final_test": 2}, list(range(11)), list(range(9)), [11, 12]),
            ({"n_search_train": 99}, list(range(11)), list(range(11)), [11, 12, 13, 14]),
        ],
    )
    def test_roles_can_be_limited(
        self,
        tiny_archive: Path,
        root: Path,
        limits: dict[str, int],
        search: list[int],
        final: list[int],
        test: list[int],
    ) -> None:
        config = replace(DataConfig(root=str(tiny_archive), size=16), **limits)  # type: ignore[arg-type]
        assert numbers(prepare_pool(config, root)) == search
        assert numbers(prepare_pool(config, root, role="final")) == final
        assert numbers(prepare_test(config, root)) == test

    def test_unlimited_roles_share_one_cache(self, tiny_archive: Path, root: Path) -> None:
        config = DataConfig(root=str(tiny_archive), size=16)
        assert prepare_pool(config, root).cache_path == prepare_pool(config, root, role="final").cache_path

    def test_dataset_without_test_images_can_be_searched(self, write_dataset: WriteDataset, root: Path) -> None:
        config = write_dataset(pairs=tiny_pairs(n_test=0), size=16)
        assert len(prepare_pool(config, root).index) == 11
        with pytest.raises(DatasetError, match="has no test images"):
            prepare_test(config, root)

    def test_search_decodes_no_test_image(self, write_dataset: WriteDataset, root: Path) -> None:
        config = write_dataset(size=16)
        for number in range(11, 15):
            paths(config, number)[0].write_bytes(b"no image %d" % number)
        assert len(prepare_pool(config, root).index) == 11
        with pytest.raises(DatasetError, match="none of the 4 images"):
            prepare_test(config, root)

    def test_colours_share_one_cache(self, tiny_archive: Path, root: Path) -> None:
        config = DataConfig(root=str(tiny_archive), size=16)
        assert (
            prepare_pool(config, root).index.key == prepare_pool(replace(config, color="grayscale"), root).index.key
        )

    def test_cached_size_can_exceed_the_networks(self, tiny_archive: Path, root: Path) -> None:
        config = DataConfig(root=str(tiny_archive), size=16, cache_size=(24, 32))
        assert open_cache(prepare_pool(config, root).cache_path).size == (24, 32)


class TestRefusal:
    def damage(self, config: DataConfig) -> DataConfig:
        """A missing mask (1), an undecodable image (4) and another's mask (9); image 10 is a test image too."""
        paths(config, 1)[1].unlink()
        paths(config, 4)[0].write_bytes(b"no image")
        Image.fromarray(np.zeros((7, 9), np.uint8)).save(paths(config, 9)[1])
        for which in (0, 1):
            shutil.copy(paths(config, 13)[which], paths(config, 10)[which])
        return config

    def test_all_damage_is_refused_in_one_message(self, write_dataset: WriteDataset, root: Path) -> None:
        config = self.damage(write_dataset(size=16))
        with pytest.raises(DatasetError, match="3 images cannot be used") as error:
            prepare_pool(config, root)
        for kind in ("missing mask (1)", "undecodable file (1)", "sizes differ (1)"):
            assert kind in str(error.value)
        assert "image in pool and test" not in str(error.value)
        assert all(f"ISIC_000000{i}" in str(error.value) for i in (1, 4, 9))
        assert "--exclude-bad" in str(error.value)

    def test_second_refusal_is_the_same_and_decodes_nothing(
        self, write_dataset: WriteDataset, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = self.damage(write_dataset(size=16))
        with pytest.raises(DatasetError) as first:
            prepare_pool(config, root)
        monkeypatch.setattr(build, "Decoders", lambda: pytest.fail("it was decoded again"))
        with pytest.raises(DatasetError) as second:
            prepare_pool(config, root)
        assert str(first.value) == str(second.value)

    def test_bad_images_can_be_left_out(
        self, write_dataset: WriteDataset, root: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        config = replace(self.damage(write_dataset(size=16)), exclude_bad=True)
        with caplog.at_level(logging.WARNING):
            prepared = prepare_pool(config, root)
        # Both keep the image that they share.
        assert numbers(prepared) == [0, 2, 3, 5, 6, 7, 8, 10]
        assert sorted(prepared.excluded) == [f"ISIC_{i:07d}" for i in (1, 4, 9)]
        assert sum(message.startswith("left out (") for message in caplog.messages) == 3
        assert numbers(prepare_test(config, root)) == [11, 12, 13, 14]

    def test_leaving_out_decodes_nothing_again(
        self, write_dataset: WriteDataset, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = self.damage(write_dataset(size=16))
        with pytest.raises(DatasetError):
            prepare_pool(config, root)
        monkeypatch.setattr(build, "Decoders", lambda: pytest.fail("it was decoded again"))
        assert len(prepare_pool(replace(config, exclude_bad=True), root).index) == 8

    def test_mended_image_is_taken_in(self, write_dataset: WriteDataset, root: Path) -> None:
        config = write_dataset(size=16)
        whole = paths(config, 4)[0].read_bytes()
        paths(config, 4)[0].write_bytes(b"no image")
        with pytest.raises(DatasetError):
            prepare_pool(config, root)
        paths(config, 4)[0].write_bytes(whole)
        assert len(prepare_pool(config, root).index) == 11

    def test_test_split_is_refused_for_its_own_damage(self, write_dataset: WriteDataset, root: Path) -> None:
        config = write_dataset(size=16)
        paths(config, 12)[1].unlink()
        paths(config, 14)[0].write_bytes(b"no image")
        with pytest.raises(DatasetError, match="2 images cannot be used"):
            prepare_test(config, root)
        assert numbers(prepare_test(replace(config, exclude_bad=True), root)) == [11, 13]

    def test_damage_of_the_test_split_is_noted_before_the_search(
        self, write_dataset: WriteDataset, root: Path
    ) -> None:
        config = write_dataset(size=16)
        paths(config, 12)[1].unlink()
        prepared = prepare_pool(config, root)
        assert len(prepared.index) == 11
        assert any(note.startswith("missing mask in the test split (1)") for note in prepared.notes)

    def test_nothing_but_damage_is_refused_too(self, write_dataset: WriteDataset, root: Path) -> None:
        config = write_dataset(size=16)
        for number in range(11):
            paths(config, number)[1].unlink()
        with pytest.raises(DatasetError, match=r"11 images cannot be used: missing mask \(11\)"):
            prepare_pool(replace(config, exclude_bad=True), root)


@pytest.mark.parametrize("exclude_bad", [False, True])
@pytest.mark.parametrize("layout", ["archive", "splits", "folders"])
def test_an_image_that_pool_and_test_share_is_kept_in_both_and_named(
    write_dataset: WriteDataset, root: Path, layout: Layout, exclude_bad: bool
) -> None:
    pairs = tiny_pairs()
    pairs[13] = replace(pairs[13], image=pairs[2].image, mask=pairs[2].mask)
    config = replace(write_dataset(layout, pairs, size=16), exclude_bad=exclude_bad)
    prepared = prepare_pool(config, root)
    assert (len(prepared.index), prepared.excluded, len(prepare_test(config, root).index)) == (11, (), 4)
    (note,) = (note for note in prepared.notes if note.startswith("image in pool and test (1)"))
    assert "ISIC_0000002 of the pool is the same file as ISIC_0000013 of the test split" in note


class TestMasks:
    @pytest.mark.parametrize("fill", [0, 255])
    def test_a_pool_in_which_there_is_nothing_to_learn_says_so(
        self, write_dataset: WriteDataset, root: Path, fill: int
    ) -> None:
        pairs = [replace(pair, mask=np.full_like(pair.mask, fill)) for pair in tiny_pairs()]
        config = replace(load(None, ["study.folds=2"]), data=write_dataset(pairs=pairs, size=16))
        for role in ("search", "final"):
            with pytest.raises(DatasetError, match=r"11 masks of training and validation .* nothing to learn"):
                PoolCaches(config, root, role=role)
        pairs[3] = tiny_pairs()[3]
        config = replace(config, data=write_dataset(pairs=pairs, size=16))
        assert len(PoolCaches(config, root).scored.index) == 11

    def test_lesions_that_vanish_are_counted_at_every_size(self, write_dataset: WriteDataset, root: Path) -> None:
        pairs = tiny_pairs()
        for number in (2, 5, 13):
            pairs[number] = replace(pairs[number], mask=np.zeros_like(pairs[number].mask))
            pairs[number].mask[20:22, 20:22] = 255
        data = write_dataset(pairs=pairs, size=90)
        config = replace(load(None, ["study.eval_size=90", "data.size=90", "search.data.size=[8, 90]"]), data=data)
        caches = PoolCaches(config, root)
        assert not any("vanishing" in note for note in caches.notes)
        caches.prepare_listed(config)
        (note,) = (note for note in caches.notes if "vanishing" in note)
        assert note.startswith("vanishing lesion (2): ISIC_0000002 has 4 lesion pixels at")
        assert "none at 8x8; also ISIC_0000005" in note
        assert len(caches.notes) == len(set(caches.notes))
        small = prepare_test(replace(data, size=8), root)
        assert any(note.startswith("vanishing lesion (1): ISIC_0000013") for note in small.notes)

    def test_a_test_split_without_any_lesion_is_a_note(self, write_dataset: WriteDataset, root: Path) -> None:
        pairs = [
            replace(pair, mask=np.zeros_like(pair.mask)) if pair.split == "test" else pair for pair in tiny_pairs()
        ]
        config = write_dataset(pairs=pairs, size=16)
        prepared = prepare_test(config, root)
        assert any(note.startswith("none of the 4 test masks has a lesion at 16x16") for note in prepared.notes)
        assert not any("none of the" in note for note in prepare_pool(config, root).notes)

    def test_swapped_folders_are_asked_about(self, write_dataset: WriteDataset, root: Path) -> None:
        config = write_dataset("folders", size=16)
        for path in Path(config.masks).iterdir():
            path.rename(path.with_name(path.name.replace("_outline", "")))
        swapped = replace(config, images=config.masks, masks=config.images)
        with pytest.raises(DatasetError, match=r"check whether --images and --masks are swapped") as error:
            prepare_pool(swapped, root)
        assert "\n" not in str(error.value)


class TestChanges:
    @pytest.mark.parametrize("change", ["replaced", "removed", "added", "mask replaced"])
    def test_changed_dataset_is_noticed_at_the_next_start(
        self, write_dataset: WriteDataset, root: Path, change: str
    ) -> None:
        config = write_dataset(size=16)
        before = prepare_pool(config, root)
        other = draw_pair("other", "train", np.random.default_rng(99))
        image, mask = paths(config, 5)
        if change == "replaced":
            Image.fromarray(other.image).save(image)
            Image.fromarray(other.mask).save(mask)
        elif change == "removed":
            image.unlink()
            mask.unlink()
        elif change == "added":
            shutil.copy(image, image.with_name("ISIC_9999999.png"))
            shutil.copy(mask, mask.with_name("ISIC_9999999_segmentation.png"))
        else:
            Image.fromarray(255 - np.array(Image.open(mask))).save(mask)
        after = prepare_pool(config, root)
        assert after.index.key != before.index.key
        assert len(after.index) == {"removed": 10, "added": 12}.get(change, 11)

    def test_touched_files_change_nothing(self, write_dataset: WriteDataset, root: Path) -> None:
        config = write_dataset(size=16)
        before = prepare_pool(config, root)
        os.utime(paths(config, 5)[0])
        assert prepare_pool(config, root).index.key == before.index.key

    def test_notes_are_told_at_every_start(self, write_dataset: WriteDataset, root: Path) -> None:
        config = write_dataset(size=16)
        Image.fromarray(np.zeros_like(np.array(Image.open(paths(config, 3)[1])))).save(paths(config, 3)[1])
        first, second = prepare_pool(config, root).notes, prepare_pool(config, root).notes
        assert first == second
        assert any(note.startswith("empty mask (1)") for note in first)
        assert any("2000/150/600" in note for note in first)


class TestCrop:
    def test_crops_follow_the_seed(self, tiny_archive: Path, root: Path) -> None:
        config = DataConfig(root=str(tiny_archive), size=32, match="crop")
        caches = [open_cache(prepare_pool(config, root, seed=seed).cache_path) for seed in (0, 1)]
        assert caches[0].key != caches[1].key
        assert not np.array_equal(images_of(caches[0]), images_of(caches[1]))
        everything = np.arange(11)
        for a, b in zip(*(cache.read(everything, held_out=True) for cache in caches), strict=True):
            assert np.array_equal(a, b)

    def test_resized_images_do_not_depend_on_the_seed(self, tiny_archive: Path, root: Path) -> None:
        config = DataConfig(root=str(tiny_archive), size=32)
        assert prepare_pool(config, root, seed=0).index.key == prepare_pool(config, root, seed=1).index.key

    def test_test_images_are_cropped_in_the_centre(self, tiny_archive: Path, root: Path) -> None:
        cache = open_cache(prepare_test(DataConfig(root=str(tiny_archive), size=32, match="crop"), root).cache_path)
        assert cache.index.preparation.views == ("centre crop",)

    def test_an_images_crop_does_not_depend_on_the_others(self, tiny_archive: Path, root: Path) -> None:
        config = DataConfig(root=str(tiny_archive), size=32, match="crop")
        all_images = images_of(open_cache(prepare_pool(config, root).cache_path))
        few = images_of(open_cache(prepare_pool(replace(config, n_search_train=2), root).cache_path))
        assert np.array_equal(few[:2], all_images[:2])


@pytest.mark.parametrize("match", ["resize", "crop"])
def test_one_dataset_gives_equal_caches_and_folds_in_all_layouts(
    write_dataset: WriteDataset, tmp_path: Path, match: Literal["resize", "crop"]
) -> None:
    pairs = tiny_pairs(n_train=11, n_val=0)
    keys, contents, folds = set(), set(), set()
    for layout in ("archive", "splits", "folders"):
        config = replace(write_dataset(layout, pairs, size=16), match=match)
        for prepared in (prepare_pool(config, tmp_path / layout), prepare_test(config, tmp_path / layout)):
            keys.add(prepared.index.key)
            contents.add(tuple((prepared.cache_path / name).read_bytes() for name in ("images.npy", "masks.npy")))
        pool = open_cache(prepare_pool(config, tmp_path / layout).cache_path)
        folds.add(make_folds(pool.ids, splits_of(pool), sha256_of(pool), folds=3, seed=0))
        shutil.rmtree(tmp_path / "ISIC-2017")
    assert len(keys) == 2
    assert len(contents) == 2
    assert len(folds) == 1


def test_validation_split_is_the_same_in_both_layouts_of_the_archive(
    write_dataset: WriteDataset, tmp_path: Path
) -> None:
    archive = prepare_pool(write_dataset("archive", size=16), tmp_path / "a")
    shutil.rmtree(tmp_path / "ISIC-2017")
    splits = prepare_pool(write_dataset("splits", size=16), tmp_path / "b")
    assert archive.index.key == splits.index.key
    for name in ("images.npy", "masks.npy"):
        assert (archive.cache_path / name).read_bytes() == (splits.cache_path / name).read_bytes()


class TestContents:
    def test_all_caches_of_the_data_are_checked(self, write_dataset: WriteDataset, root: Path) -> None:
        config = replace(write_dataset(size=16), n_final_train=5)
        assert check_contents(config, root) == ([], [])
        folders = [
            prepare_pool(config, root).cache_path,
            prepare_pool(config, root, role="final").cache_path,
            prepare_test(config, root).cache_path,
        ]
        assert check_contents(config, root) == (sorted(folders), [])

    def test_change_in_the_middle_of_a_file_is_found(self, write_dataset: WriteDataset, root: Path) -> None:
        # The key reads the first and the last 64 KiB of a file.
        rng = np.random.default_rng(0)
        pairs = tiny_pairs()
        noise = rng.integers(0, 256, (300, 300, 3), dtype=np.uint8)
        big = replace(pairs[2], image=noise, mask=np.eye(300, dtype=np.uint8) * 255)
        config = write_dataset(pairs=[big if pair.id == big.id else pair for pair in pairs], size=16)
        prepared = prepare_pool(config, root)
        path = paths(config, 2)[0]
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        assert prepare_pool(config, root).index.key == prepared.index.key
        folders, problems = check_contents(config, root)
        assert folders == [prepared.cache_path]
        assert [(problem.kind, problem.id) for problem in problems] == [("changed file", "ISIC_0000002")]


class TestSample:
    def test_it_is_drawn_where_the_caches_are(
        self, root: Path, tiny_archive: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        drawn: list[Path] = []

        def draw(folder: Path) -> None:
            drawn.append(folder)
            shutil.copytree(tiny_archive, folder)

        monkeypatch.setattr(prepare, "draw_sample", draw)
        for _ in range(2):
            prepared = prepare_pool(DataConfig(root="sample", size=16), root)
        assert drawn == [root / f"sample-{prepare.SAMPLE_VERSION}" / "ISIC-2017"]
        assert len(prepared.index) == 11
        assert prepared.notes == ()

    @pytest.mark.slow
    def test_it_can_be_prepared(self, root: Path) -> None:
        prepared = prepare_pool(DataConfig(root="sample", size=32), root)
        assert len(prepared.index) == 150
        assert prepared.notes == ()

    def test_failure_to_draw_it_says_why(self, root: Path) -> None:
        root.write_text("no folder")
        with pytest.raises(StorageError, match=r"cannot write .*sample-1"):
            locate(DataConfig(root="sample"), root)

    def test_the_sample_of_a_process_that_was_faster_is_used(
        self, root: Path, tiny_archive: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def draw(folder: Path) -> None:
            shutil.copytree(tiny_archive, folder)
            raise StorageError("Directory not empty")

        monkeypatch.setattr(prepare, "draw_sample", draw)
        assert len(locate(DataConfig(root="sample"), root).samples) == 15


@pytest.mark.slow
@pytest.mark.skipif("HPSEARCH_ISIC_ROOT" not in os.environ, reason="needs real images")
def test_real_images_have_one_known_pair_of_duplicates(root: Path) -> None:
    config = DataConfig(root=os.environ["HPSEARCH_ISIC_ROOT"], size=32)
    prepared = prepare_pool(config, root)
    assert (len(prepared.index), prepared.excluded) == (1550, ())
    assert "duplicate image (1): ISIC_0012970 and ISIC_0012127 are the same image, with 2 masks" in prepared.notes
    cache = open_cache(prepared.cache_path)
    folds = make_folds(cache.ids, splits_of(cache), sha256_of(cache), folds=5, seed=0)
    fold_of = dict(zip(folds.ids, folds.fold_of, strict=True))
    assert fold_of["ISIC_0012970"] == fold_of["ISIC_0012127"]
    assert len(prepare_test(config, root).index) == 600
