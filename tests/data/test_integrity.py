"""Every kind of damage is found and reported completely; what is merely odd is noted."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpsearch.config.data import DataConfig
from hpsearch.data.build import build_cache
from hpsearch.data.cache import Preparation, open_cache
from hpsearch.data.dataset import Problem
from hpsearch.data.integrity import CheckReport, check, check_stored, describe, refusal
from hpsearch.data.layouts import find_samples

from .conftest import WriteDataset, pair_paths, png_bomb

pytestmark = pytest.mark.usefixtures("one_decoder")


def image_and_mask(config: DataConfig, number: int) -> tuple[Path, Path]:
    """The files of image `number`: 0 to 7 are of the training split, 8 to 10 validation, 11 to 14 test."""
    split = "train" if number < 8 else "val" if number < 11 else "test"
    return pair_paths(Path(config.root), "archive", f"ISIC_{number:07d}", split)  # type: ignore[arg-type]


def rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:  # type: ignore[type-arg]
    Image.fromarray(change(np.array(Image.open(path)))).save(path)


def found(report: CheckReport, kind: str) -> list[str]:
    return [problem.id for problem in (*report.errors, *report.notes) if problem.kind == kind]


def test_sound_dataset_has_no_errors(write_dataset: WriteDataset) -> None:
    report = check(find_samples(write_dataset()))
    assert report.errors == ()
    assert report.counts == {"train": 8, "val": 3, "test": 4}
    assert len(report.sizes) == 15
    assert report.overview()[0] == "15 pairs can be used: 8 train, 3 val, 4 test"


def test_progress_is_told_of_every_image(write_dataset: WriteDataset) -> None:
    told: list[tuple[int, int]] = []
    check(find_samples(write_dataset()), progress=lambda done, total: told.append((done, total)))
    assert told == [(done, 15) for done in range(1, 16)]


class TestErrors:
    def test_missing_mask(self, write_dataset: WriteDataset) -> None:
        config = write_dataset()
        image_and_mask(config, 3)[1].unlink()
        image_and_mask(config, 12)[1].unlink()
        assert found(check(find_samples(config)), "missing mask") == ["ISIC_0000003", "ISIC_0000012"]

    def test_missing_image(self, write_dataset: WriteDataset) -> None:
        config = write_dataset()
        image_and_mask(config, 9)[0].unlink()
        assert found(check(find_samples(config)), "missing image") == ["ISIC_0000009"]

    @pytest.mark.parametrize("which", [0, 1])
    def test_undecodable_file(self, write_dataset: WriteDataset, which: int) -> None:
        config = write_dataset()
        path = image_and_mask(config, 5)[which]
        path.write_bytes(path.read_bytes()[:-100])
        report = check(find_samples(config))
        assert found(report, "undecodable file") == ["ISIC_0000005"]
        assert str(path) in report.errors[0].text

    def test_sizes_that_differ(self, write_dataset: WriteDataset) -> None:
        config = write_dataset()
        rewrite(image_and_mask(config, 2)[1], lambda mask: mask[:-1])
        assert found(check(find_samples(config)), "sizes differ") == ["ISIC_0000002"]

    def test_mask_of_many_values(self, write_dataset: WriteDataset) -> None:
        config = write_dataset()
        rewrite(
            image_and_mask(config, 2)[1], lambda mask: mask // 2 + (np.arange(mask.shape[1]) % 2).astype(np.uint8)
        )
        assert found(check(find_samples(config)), "mask of many values") == ["ISIC_0000002"]

    def test_absurd_size(self, write_dataset: WriteDataset) -> None:
        config = write_dataset()
        image_and_mask(config, 0)[0].write_bytes(png_bomb(100_000))
        report = check(find_samples(config))
        assert found(report, "absurd size") == ["ISIC_0000000"]
        assert "100000x100000" in report.errors[0].text

    def test_all_kinds_are_reported_together(self, write_dataset: WriteDataset) -> None:
        config = write_dataset()
        image_and_mask(config, 0)[1].unlink()
        image_and_mask(config, 1)[0].write_bytes(b"")
        rewrite(image_and_mask(config, 2)[1], lambda mask: mask[:-1])
        rewrite(
            image_and_mask(config, 13)[1], lambda mask: mask // 2 + (np.arange(mask.shape[1]) % 2).astype(np.uint8)
        )
        report = check(find_samples(config))
        assert {(problem.kind, problem.id, problem.split) for problem in report.errors} == {
            ("missing mask", "ISIC_0000000", "train"),
            ("undecodable file", "ISIC_0000001", "train"),
            ("sizes differ", "ISIC_0000002", "train"),
            ("mask of many values", "ISIC_0000013", "test"),
        }
        assert report.counts == {"train": 5, "val": 3, "test": 3}
        assert len(describe(report.errors)) == 4


class TestNotes:
    def test_counts_unlike_the_official_ones(self, write_dataset: WriteDataset) -> None:
        lines = describe(check(find_samples(write_dataset())).notes)
        assert any(
            x == "8/3/4 training/validation/test pairs, where the official ISIC-2017 has 2000/150/600" for x in lines
        )

    def test_own_folders_are_not_compared_with_the_official_counts(self, write_dataset: WriteDataset) -> None:
        report = check(find_samples(write_dataset("folders")))
        assert found(report, "counts") == []
        assert any("set aside as the test split: 4 of these 15 images" in line for line in describe(report.notes))

    @pytest.mark.parametrize(("mask_of", "text"), [(9, "one mask"), (2, "2 masks")])
    def test_duplicates_in_the_pool(self, write_dataset: WriteDataset, mask_of: int, text: str) -> None:
        config = write_dataset()
        rewrite(image_and_mask(config, 2)[0], lambda image: image[:40, :40])
        rewrite(image_and_mask(config, 2)[1], lambda mask: mask[:40, :40])
        shutil.copy(image_and_mask(config, 2)[0], image_and_mask(config, 9)[0])
        if mask_of == 9:
            shutil.copy(image_and_mask(config, 2)[1], image_and_mask(config, 9)[1])
        else:
            Image.fromarray(255 - np.array(Image.open(image_and_mask(config, 2)[1]))).save(
                image_and_mask(config, 9)[1]
            )
        report = check(find_samples(config))
        assert report.errors == ()
        assert found(report, "duplicate image") == ["ISIC_0000002"]
        assert any(
            f"ISIC_0000002 and ISIC_0000009 are the same image, with {text}" in line
            for line in describe(report.notes)
        )

    def test_duplicates_in_the_test_split_leak_nothing(self, write_dataset: WriteDataset) -> None:
        config = write_dataset()
        for which in (0, 1):
            shutil.copy(image_and_mask(config, 12)[which], image_and_mask(config, 13)[which])
        report = check(find_samples(config))
        assert report.errors == ()
        assert found(report, "duplicate image") == []

    @pytest.mark.parametrize("other_mask", [False, True])
    def test_images_in_pool_and_test(self, write_dataset: WriteDataset, other_mask: bool) -> None:
        config = write_dataset()
        for number in (3, 9, 13):
            for which in (0, 1):
                shutil.copy(image_and_mask(config, 12)[which], image_and_mask(config, number)[which])
        if other_mask:
            rewrite(image_and_mask(config, 9)[1], lambda mask: 255 - mask)
        report = check(find_samples(config))
        assert report.errors == ()
        shared = [problem for problem in report.notes if problem.kind == "image in pool and test"]
        (note,) = shared
        assert note.files == tuple(image_and_mask(config, number)[0] for number in (3, 9, 12, 13))
        text = "ISIC_0000003 and ISIC_0000009 of the pool are the same file as ISIC_0000012 and ISIC_0000013"
        assert f"{text} of the test split, with {'2 masks' if other_mask else 'one mask'}" in note.text

    @pytest.mark.parametrize(("value", "kind"), [(0, "empty mask"), (255, "full mask")])
    def test_empty_and_full_masks(self, write_dataset: WriteDataset, value: int, kind: str) -> None:
        config = write_dataset()
        rewrite(image_and_mask(config, 4)[1], lambda mask: np.full_like(mask, value))
        report = check(find_samples(config))
        assert report.errors == ()
        assert found(report, kind) == ["ISIC_0000004"]

    def test_lesions_that_vanish_at_the_size_of_training(self, write_dataset: WriteDataset) -> None:
        config = write_dataset()
        for number, value in ((4, 0), (12, 0), (5, 255)):
            rewrite(image_and_mask(config, number)[1], lambda mask: with_one_pixel(np.full_like(mask, value)))  # noqa: B023
        report = check(find_samples(config), config=replace(config, size=8))
        assert report.errors == ()
        assert found(report, "vanishing lesion") == ["ISIC_0000004", "ISIC_0000012"]
        assert found(report, "vanishing skin") == ["ISIC_0000005"]
        assert any(
            "ISIC_0000004 has 1 lesion pixels at" in line and "none at 8x8" in line for line in describe(report.notes)
        )
        assert found(check(find_samples(config)), "vanishing lesion") == []


class TestNothingToLearn:
    """A pool without any lesion, or with nothing else."""

    def fill(self, config: DataConfig, numbers: Iterable[int], value: int) -> None:
        for number in numbers:
            rewrite(image_and_mask(config, number)[1], lambda mask: np.full_like(mask, value))

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (0, "none of the 11 masks of training and validation has a lesion"),
            (255, "all 11 masks .* contain only lesion"),
        ],
    )
    def test_a_pool_of_one_kind_of_mask_is_an_error(self, write_dataset: WriteDataset, value: int, text: str) -> None:
        config = write_dataset()
        self.fill(config, range(10), value)
        assert check(find_samples(config), config=replace(config, size=32)).errors == ()
        self.fill(config, [10], value)
        for given in (replace(config, size=32), None):
            (error,) = check(find_samples(config), config=given).errors
            assert error.kind == "nothing to learn"
            assert re.search(text, error.text)

    def test_a_pool_whose_lesions_all_vanish_is_an_error_with_both_counts(self, write_dataset: WriteDataset) -> None:
        config = write_dataset()
        self.fill(config, range(11), 0)
        for number in range(4):
            rewrite(image_and_mask(config, number)[1], with_one_pixel)
        (error,) = check(find_samples(config), config=replace(config, size=8)).errors
        assert "at 8x8, so there is nothing to learn: 4 of them have both" in error.text
        assert check(find_samples(config)).errors == ()

    def test_a_test_split_without_lesions_is_a_note(self, write_dataset: WriteDataset) -> None:
        config = write_dataset()
        self.fill(config, range(11, 15), 0)
        report = check(find_samples(config), config=replace(config, size=32))
        assert report.errors == ()
        assert [note.text for note in report.notes if note.kind == "no lesion in the test split"] == [
            "none of the 4 test masks has a lesion at 32x32: Dice then only counts false positives, that is how many "
            "images are predicted to be free of lesions"
        ]


def test_masks_of_many_values_ask_whether_the_folders_were_swapped(write_dataset: WriteDataset) -> None:
    config = write_dataset("folders")
    for path in Path(config.masks).iterdir():
        path.rename(path.with_name(path.name.replace("_outline", "")))
    swapped = replace(config, images=config.masks, masks=config.images)
    errors = check(find_samples(swapped)).errors
    assert {error.kind for error in errors} == {"mask of many values"}
    assert errors[0].text.endswith("check whether --images and --masks are swapped")


def with_one_pixel(mask: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    mask = mask.copy()
    mask[20, 20] = 255 - mask[20, 20]
    return mask


def test_report_is_plain_json(write_dataset: WriteDataset) -> None:
    config = write_dataset()
    image_and_mask(config, 0)[1].unlink()
    table = json.loads(json.dumps(check(find_samples(config)).to_dict()))
    assert table["counts"] == {"train": 7, "val": 3, "test": 4}
    assert table["errors"][0]["kind"] == "missing mask"
    assert table["errors"][0]["files"] == [str(image_and_mask(config, 0)[0])]


def test_refusal_names_the_first_of_each_kind_and_the_way_out() -> None:
    def problem(kind: str, i: int) -> Problem:
        return Problem(kind, f"i{i}", (), f"text {i}", "train")

    problems = [problem("missing mask", i) for i in range(5)] + [problem("sizes differ", 7)]
    text = str(refusal(problems, "--data here"))
    assert text.startswith("6 images cannot be used: missing mask (5): text 0; also i1, i2 and 2 more. sizes differ")
    assert "`hpsearch data check --data here --json`" in text
    assert "--exclude-bad" in text
    assert "\n" not in text
    assert describe([]) == []


class TestContents:
    def test_unchanged_files_are_as_they_were(self, write_dataset: WriteDataset, tmp_path: Path) -> None:
        samples = find_samples(write_dataset()).split("train", "val")
        assert (
            check_stored(open_cache(build_cache(samples, Preparation(16, 16, ("resize",)), "memmap", tmp_path))) == []
        )

    @pytest.mark.parametrize("which", [0, 1])
    def test_changed_files_are_named(self, write_dataset: WriteDataset, tmp_path: Path, which: int) -> None:
        config = write_dataset()
        samples = find_samples(config).split("train", "val")
        cache = open_cache(build_cache(samples, Preparation(16, 16, ("resize",)), "memmap", tmp_path / "cache"))
        path = image_and_mask(config, 6)[which]
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        (problem,) = check_stored(cache)
        assert (problem.kind, problem.id, problem.files) == ("changed file", "ISIC_0000006", (path,))

    def test_damaged_cache_is_named(self, write_dataset: WriteDataset, tmp_path: Path) -> None:
        samples = find_samples(write_dataset()).split("train", "val")
        folder = build_cache(samples, Preparation(16, 16, ("resize",)), "memmap", tmp_path / "cache")
        masks = np.load(folder / "masks.npy", "r+")
        masks[7, 3, 3] ^= 1
        masks.flush()
        (problem,) = check_stored(open_cache(folder))
        assert (problem.kind, problem.id, problem.files) == ("damaged cache", "ISIC_0000007", (folder,))
