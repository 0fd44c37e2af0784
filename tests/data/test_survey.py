"""Orientation, full scale and values of masks are decided once, by the whole pool, and hold for every image."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from hpsearch.config import StudyConfig
from hpsearch.config.data import AugmentConfig, DataConfig
from hpsearch.data import survey as module
from hpsearch.data.cache import Preparation, cache_key, open_cache
from hpsearch.data.dataset import Dataset, _fingerprint
from hpsearch.data.export_augmented import export_augmented
from hpsearch.data.integrity import check, describe
from hpsearch.data.layouts import find_samples
from hpsearch.data.prepare import check_contents, prepare_pool, prepare_test
from hpsearch.data.reading import PLAIN_READING, Reading
from hpsearch.data.survey import Survey, decide, decide_reading, survey
from hpsearch.errors import ConfigError, DatasetError
from hpsearch.typed_json import from_json
from tests.cached import images_of, masks_of

from .conftest import Pair, WriteDataset, draw_pair, pair_paths, tiny_pairs, write_oriented, write_pairs

pytestmark = pytest.mark.usefixtures("one_decoder")

Exif = Literal["auto", "apply", "ignore"]


def files(config: DataConfig, number: int) -> tuple[Path, Path]:
    """The files of image `number`: 0 to 7 are of the training split, 8 to 10 validation, 11 to 14 test."""
    split = "train" if number < 8 else "val" if number < 11 else "test"
    return pair_paths(Path(config.root), "archive", f"ISIC_{number:07d}", split)  # type: ignore[arg-type]


def pixels_of(path: Path) -> NDArray[Any]:
    with Image.open(path) as image:
        return np.array(image)


def orient(config: DataConfig, number: int, orientation: int, format: str = "png") -> None:
    """Store an image with an orientation; its mask stays drawn on the upright picture."""
    path = files(config, number)[0]
    upright = pixels_of(path)
    path.unlink()
    write_oriented(path.with_suffix(f".{format}"), upright, orientation)


def of_size(height: int, width: int) -> list[Pair]:
    """Pairs like `tiny_pairs`, all of one size."""
    rng = np.random.default_rng(1)
    return [draw_pair(pair.id, pair.split, rng, size=(height, width)) for pair in tiny_pairs()]


def kinds(config: DataConfig) -> dict[str, str]:
    """Errors and notes of `data check`: their kinds, and one line for each."""
    report = check(find_samples(config), config=config)
    return {problem.kind: problem.text for problem in (*report.notes, *report.errors)}


class TestDecision:
    @pytest.fixture
    def dataset(self, tiny_archive: Path) -> Dataset:
        return find_samples(DataConfig(root=str(tiny_archive)))

    @pytest.mark.parametrize(
        ("n_apply", "n_ignore", "setting", "exif", "reason"),
        [
            (0, 0, "auto", "apply", "by default"),
            (3, 0, "auto", "apply", "because the sizes of 3 pairs match only then"),
            (0, 1, "auto", "ignore", "because the sizes of 1 pair match only then"),
            (1, 4, "auto", "ignore", "because the sizes of 4 pairs match only then"),
            (2, 2, "auto", "apply", "because the sizes of 2 pairs match only then"),
            (3, 0, "ignore", "ignore", 'because data.exif = "ignore"'),
            (0, 3, "apply", "apply", 'because data.exif = "apply"'),
        ],
    )
    def test_the_majority_of_proofs_or_the_setting_decides(
        self, dataset: Dataset, n_apply: int, n_ignore: int, setting: Exif, exif: str, reason: str
    ) -> None:
        found = Survey(n_pairs=9, n_oriented=5, n_apply=n_apply, n_ignore=n_ignore)
        rules, (note,) = decide(found, DataConfig(exif=setting), dataset)
        assert (rules.exif, rules.exif_reason) == (exif, reason)
        done = "applied" if exif == "apply" else "ignored"
        assert f"5 of 9 training and validation pairs have an EXIF orientation; it is {done} {reason}" in note.text

    @pytest.mark.parametrize(
        ("highest", "max_value"),
        [(1, 255), (255, 255), (256, 1023), (1024, 4095), (4096, 16383), (16384, 65535), (65535, 65535)],
    )
    def test_the_smallest_full_scale_that_holds_the_pool_is_taken(
        self, dataset: Dataset, highest: int, max_value: int
    ) -> None:
        found = Survey(n_pairs=9, n_deep=2, highest=highest)
        assert decide(found, DataConfig(), dataset)[0].max_value == max_value
        reading, (note,) = decide(found, DataConfig(max_value=3000), dataset)
        assert reading.max_value == 3000
        assert f"and values up to {highest}: full scale is 3000" in note.text

    def test_a_value_is_what_most_masks_say(self, dataset: Dataset) -> None:
        found = Survey(n_pairs=11, masks=(("0", "1", 1), ("1", "2", 3), ("0", "255", 2), ("255", "300", 2)))
        reading, _ = decide(found, DataConfig(), dataset)
        assert (reading.background, reading.lesion) == (("0", "1", "255"), ("2", "255", "300"))

    def test_nothing_special_is_nothing_to_say(self, dataset: Dataset) -> None:
        reading, notes = decide_reading(dataset, DataConfig())
        assert reading == replace(PLAIN_READING, background=("0",), lesion=("255",))
        assert notes == []

    def test_full_scales_that_cannot_be_are_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"data\.max_value must be 0 .* got 254"):
            DataConfig(max_value=254)


class TestOrientation:
    @pytest.mark.parametrize("format", ["png", "jpg"])
    def test_an_oriented_dataset_is_cached_as_its_upright_copy(
        self, write_dataset: WriteDataset, tmp_path: Path, format: str
    ) -> None:
        plain = write_pairs(tmp_path / "plain", "archive", tiny_pairs(), size=32)
        config = write_dataset(size=32)
        for number in range(15):
            orient(config, number, number % 8 + 1, format)
        for prepare in (prepare_pool, prepare_test):
            cache = open_cache(prepare(config, tmp_path / "cache").cache_path)
            expected = open_cache(prepare(plain, tmp_path / "cache").cache_path)
            assert cache.ids == expected.ids
            assert np.array_equal(masks_of(cache), masks_of(expected))
            difference = np.abs(images_of(cache).astype(int) - images_of(expected))
            assert difference.max() == 0 if format == "png" else difference.mean() < 2

    def test_the_pool_decides_for_limited_roles_and_the_test_split(
        self, write_dataset: WriteDataset, tmp_path: Path
    ) -> None:
        """The one image whose size proves anything is neither among those searched nor a test image."""
        config = write_dataset(pairs=of_size(48, 48), size=32)
        for number in (0, 12):
            orient(config, number, 6)
        path, mask = files(config, 7)
        write_oriented(path, pixels_of(path)[:40], 6)
        # Drawn on the pixels as they are stored.
        Image.fromarray(np.rot90(pixels_of(mask)[:40])).save(mask)
        limited = replace(config, n_search_train=2)
        for prepared in (prepare_pool(limited, tmp_path), prepare_test(limited, tmp_path)):
            assert prepared.index.preparation.reading.exif == "ignore"
            cache = open_cache(prepared.cache_path)
            assert cache.index.preparation.reading == prepared.index.preparation.reading
        ignored = replace(config, exif="ignore")
        assert np.array_equal(
            images_of(cache), images_of(open_cache(prepare_test(ignored, tmp_path / "b").cache_path))
        )
        applied = replace(config, exif="apply", exclude_bad=True)
        assert not np.array_equal(
            images_of(cache), images_of(open_cache(prepare_test(applied, tmp_path / "b").cache_path))
        )

    def test_pairs_that_contradict_the_majority_are_errors(self, write_dataset: WriteDataset, tmp_path: Path) -> None:
        config = write_dataset(pairs=of_size(40, 56))
        for number in range(3):
            orient(config, number, 8)
        path, mask = files(config, 2)
        Image.fromarray(np.rot90(pixels_of(mask))).save(mask)
        found = kinds(config)
        assert "it is applied because the sizes of 2 pairs match only then" in found["EXIF orientation"]
        assert f"{mask} is 56x40, its image is 40x56" in found["sizes differ"]
        text = (
            "they match only with the EXIF orientation ignored, but it is applied because the sizes of 2 pairs match"
        )
        assert text in found["sizes differ"]
        with pytest.raises(DatasetError, match="1 image cannot be used: sizes differ"):
            prepare_pool(config, tmp_path)
        assert prepare_pool(replace(config, exclude_bad=True), tmp_path).excluded == (path.stem,)

    def test_half_a_turn_proves_nothing_and_the_setting_decides(
        self, write_dataset: WriteDataset, tmp_path: Path
    ) -> None:
        config = write_dataset(pairs=of_size(40, 56), size=32)
        upright = images_of(open_cache(prepare_pool(config, tmp_path).cache_path)).copy()
        for number in range(11):
            orient(config, number, 3)
        prepared = prepare_pool(config, tmp_path)
        assert np.array_equal(images_of(open_cache(prepared.cache_path)), upright)
        (note,) = (note for note in prepared.notes if "EXIF" in note)
        assert "it is applied by default" in note
        ignored = prepare_pool(replace(config, exif="ignore"), tmp_path)
        assert ignored.index.key != prepared.index.key
        assert np.array_equal(images_of(open_cache(ignored.cache_path))[:, ::-1, ::-1], upright)

    def test_an_augmented_copy_is_read_as_it_was_made(self, write_dataset: WriteDataset, tmp_path: Path) -> None:
        config = write_dataset(pairs=of_size(48, 48))
        for number in range(11):
            orient(config, number, 6)
        dataset = find_samples(config)
        study = StudyConfig(data=replace(config, exif="ignore"), augment=AugmentConfig(hflip=0, vflip=1))
        target = export_augmented(dataset, study)
        copy = find_samples(DataConfig(root=str(target)))
        assert decide_reading(copy, config)[0].exif == "ignore"
        assert decide_reading(copy, replace(config, exif="apply"))[0].exif == "apply"
        original, changed = files(config, 0)[0], copy.samples[1].image
        assert np.array_equal(pixels_of(changed), pixels_of(original)[::-1])


class TestDepth:
    def deepen(self, config: DataConfig, number: int, factor: int) -> None:
        path = files(config, number)[0]
        Image.fromarray(pixels_of(path)[..., 0].astype(np.uint16) * factor).save(path)

    def test_twelve_bits_in_sixteen_are_cached_as_their_eight(
        self, write_dataset: WriteDataset, tmp_path: Path
    ) -> None:
        gray = [replace(pair, image=np.repeat(pair.image[..., :1], 3, 2)) for pair in tiny_pairs()]
        plain = write_pairs(tmp_path / "plain", "archive", gray, size=32)
        config = write_dataset(pairs=gray, size=32)
        # Images of eight bits in between are as they are.
        for number in range(0, 15, 2):
            self.deepen(config, number, 16)
        for prepare in (prepare_pool, prepare_test):
            cache = open_cache(prepare(config, tmp_path / "cache").cache_path)
            assert np.array_equal(
                images_of(cache), images_of(open_cache(prepare(plain, tmp_path / "cache").cache_path))
            )
            assert cache.index.preparation.reading.max_value == 4095

    def test_the_pool_decides_for_limited_roles_and_the_test_split(
        self, write_dataset: WriteDataset, tmp_path: Path
    ) -> None:
        config = write_dataset(size=32)
        for number, factor in ((0, 1), (7, 64), (12, 1)):
            self.deepen(config, number, factor)
        limited = replace(config, n_search_train=2)
        assert prepare_pool(limited, tmp_path).index.preparation.reading.max_value == 16383
        assert prepare_test(limited, tmp_path).index.preparation.reading.max_value == 16383

    def test_a_test_image_above_full_scale_is_an_error(self, write_dataset: WriteDataset, tmp_path: Path) -> None:
        config = write_dataset(size=32)
        self.deepen(config, 0, 1)
        self.deepen(config, 12, 256)
        assert prepare_pool(config, tmp_path).index.preparation.reading.max_value == 255
        with pytest.raises(DatasetError, match=r"value above full scale .* above the full scale 255"):
            prepare_test(config, tmp_path)
        assert len(prepare_test(replace(config, max_value=65535), tmp_path).index) == 4

    def test_a_deep_test_image_of_a_pool_without_any_is_an_error(
        self, write_dataset: WriteDataset, tmp_path: Path
    ) -> None:
        config = write_dataset(size=32)
        self.deepen(config, 12, 256)
        with pytest.raises(DatasetError, match="value above full scale"):
            prepare_test(config, tmp_path)

    def test_images_that_become_constant_are_named(self, write_dataset: WriteDataset) -> None:
        config = write_dataset()
        for number, factor in ((0, 1), (3, 256)):
            self.deepen(config, number, factor)
        path = files(config, 0)[0]
        Image.fromarray(pixels_of(path) // 2).save(path)
        assert kinds(config)["constant image"] == f"{path} has only one colour after decoding"


class TestMasks:
    def paint(self, config: DataConfig, change: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
        """Write every mask anew, from where its lesion is."""
        for number in range(15):
            path = files(config, number)[1]
            Image.fromarray(change(pixels_of(path) > 0)).save(path)

    def test_a_mask_of_the_datasets_background_alone_is_empty(
        self, write_dataset: WriteDataset, tmp_path: Path
    ) -> None:
        config = write_dataset(size=32)
        self.paint(config, lambda inside: np.where(inside, 2, 1).astype(np.uint8))
        for number in (1, 12):
            path = files(config, number)[1]
            Image.fromarray(np.ones_like(pixels_of(path))).save(path)
        pool, test = prepare_pool(config, tmp_path), prepare_test(config, tmp_path)
        for prepared, index in ((pool, 1), (test, 1)):
            counts = masks_of(open_cache(prepared.cache_path)).sum((1, 2))
            assert counts[index] == 0
            assert np.delete(counts, index).min() > 0
        report = check(find_samples(config))
        assert [problem.id for problem in report.notes if problem.kind == "empty mask"] == [
            "ISIC_0000001",
            "ISIC_0000012",
        ]
        lines = "\n".join(describe(report.notes))
        assert "13 masks: lesion is 2, background is 1, such as" in lines
        assert "2 masks: 1 everywhere: empty, such as" in lines

    def test_a_white_mask_among_red_on_white_is_empty(self, write_dataset: WriteDataset, tmp_path: Path) -> None:
        config = write_dataset(size=32)
        red = np.array([255, 0, 0], np.uint8)
        self.paint(config, lambda inside: np.where(inside[..., None], red, 255).astype(np.uint8))
        path = files(config, 1)[1]
        Image.fromarray(np.full_like(pixels_of(path), 255)).save(path)
        prepared = prepare_pool(config, tmp_path)
        assert masks_of(open_cache(prepared.cache_path))[1].sum() == 0
        assert any("10 masks: lesion is #ff0000, background is 255" in note for note in prepared.notes)

    def test_each_sort_of_mask_is_counted(self, write_dataset: WriteDataset) -> None:
        config = write_dataset()
        for number in range(3):
            path = files(config, number)[1]
            image = Image.fromarray((pixels_of(path) > 0).astype(np.uint8), "P")
            image.putpalette([255, 255, 255, 200, 0, 0])
            image.save(path)
        assert "3 masks: lesion is index 1, background is index 0, such as" in kinds(config)["mask values"]

    def test_usual_masks_are_not_mentioned(self, write_dataset: WriteDataset) -> None:
        config = write_dataset()
        for number, mask in ((0, 0), (1, 255)):
            path = files(config, number)[1]
            Image.fromarray(np.full_like(pixels_of(path), mask)).save(path)
        path = files(config, 2)[1]
        Image.fromarray((pixels_of(path) > 0).astype(np.uint8)).save(path)
        assert kinds(config).keys() == {"counts", "empty mask", "full mask"}

    def test_masks_that_disagree_are_errors(self, write_dataset: WriteDataset) -> None:
        config = write_dataset()
        self.paint(config, lambda inside: inside.astype(np.uint8))
        path = files(config, 4)[1]
        Image.fromarray(pixels_of(path) + 1).save(path)
        report = check(find_samples(config))
        assert [(problem.kind, problem.id) for problem in report.errors] == [("masks disagree", "ISIC_0000004")]

    def test_where_as_many_masks_say_one_thing_as_the_other_all_are_errors(self, write_dataset: WriteDataset) -> None:
        config = write_dataset()
        self.paint(config, lambda inside: inside.astype(np.uint8))
        for number in range(15):
            path = files(config, number)[1]
            mask = pixels_of(path)
            Image.fromarray(np.ones_like(mask) if number == 0 else mask + number % 2).save(path)
        report = check(find_samples(config))
        assert {problem.kind for problem in report.errors} == {"masks disagree"}
        assert len(report.errors) == 15


class TestMemory:
    def refuse(self, *_: object) -> Any:
        pytest.fail("the files were decoded")

    def test_a_survey_is_kept_until_a_file_changes(
        self, write_dataset: WriteDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = write_dataset()
        pool = find_samples(config).split("train", "val")
        first = survey(pool, tmp_path / "cache")
        assert first.masks == (("0", "255", 11),)
        with monkeypatch.context() as patched:
            patched.setattr(module, "_survey", self.refuse)
            assert survey(pool, tmp_path / "cache") == first
        path = files(config, 9)[1]
        Image.fromarray((pixels_of(path) > 0).astype(np.uint8)).save(path)
        assert survey(pool, tmp_path / "cache").masks == (("0", "1", 1), ("0", "255", 10))

    def test_a_damaged_survey_is_made_again(self, write_dataset: WriteDataset, tmp_path: Path) -> None:
        pool = find_samples(write_dataset()).split("train", "val")
        first = survey(pool, tmp_path / "cache")
        (path,) = (tmp_path / "cache").glob("survey-*.json")
        for damage in ("{", path.read_text().replace("255", "254"), "{}"):
            path.write_text(damage)
            assert survey(pool, tmp_path / "cache") == first

    def test_without_a_place_it_is_made_each_time(self, write_dataset: WriteDataset, tmp_path: Path) -> None:
        pool = find_samples(write_dataset()).split("train", "val")
        (tmp_path / "cache").write_text("not a folder")
        assert survey(pool, tmp_path / "cache") == survey(pool, None)

    def test_damaged_files_are_passed_over(self, write_dataset: WriteDataset) -> None:
        config = write_dataset()
        files(config, 0)[0].write_bytes(b"no image")
        files(config, 1)[1].unlink()
        assert survey(find_samples(config).split("train", "val"), None).masks == (("0", "255", 10),)

    def test_contents_are_checked_by_the_same_decision(self, write_dataset: WriteDataset, tmp_path: Path) -> None:
        config = write_dataset(size=16)
        orient(config, 0, 3)
        folder = prepare_pool(config, tmp_path).cache_path
        assert check_contents(config, tmp_path) == ([folder], [])


class TestKeys:
    def test_a_plain_dataset_keeps_the_key_that_it_had_in_0_1(self, tiny_archive: Path) -> None:
        samples = find_samples(DataConfig(root=str(tiny_archive))).split("train", "val")
        preparation = Preparation(24, 32, ("random crop", "centre crop"), seed=3)
        head = [1, {"height": 24, "width": 32, "views": ["random crop", "centre crop"], "seed": 3}]
        digest = hashlib.sha256(json.dumps(head).encode())
        for s in samples:
            digest.update(json.dumps([s.id, s.split, _fingerprint(s.image), _fingerprint(s.mask)]).encode())
        usual = replace(preparation, reading=Reading(background=("0",), lesion=("255",)))
        assert cache_key(samples, preparation) == cache_key(samples, usual) == digest.hexdigest()[:24]

    def test_every_decision_that_changes_pixels_changes_the_key(self, tiny_archive: Path) -> None:
        samples = find_samples(DataConfig(root=str(tiny_archive))).split("train")
        readings = [
            PLAIN_READING,
            Reading("ignore"),
            Reading(n_oriented=1),
            Reading(max_value=255),
            Reading(max_value=4095),
            Reading(background=("1",), lesion=("2",)),
            Reading(background=("0",), lesion=("index 1",)),
        ]
        keys = {cache_key(samples, Preparation(16, 16, ("resize",), reading=reading)) for reading in readings}
        assert len(keys) == len(readings)

    def test_a_reading_survives_json(self) -> None:
        reading = Reading("ignore", "by default", 3, 4095, ("0", "1"), ("255",))
        assert from_json(Reading, json.loads(json.dumps(asdict(reading)))) == reading
