"""Pairs are found in every layout, what cannot be paired is named, and the layout follows from what is there."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from hpsearch.config.data import DataConfig
from hpsearch.data.layouts import find_samples
from hpsearch.errors import DatasetError

from .conftest import WriteDataset, found, own, tiny_pairs, touch

Form = Literal["NFC", "NFD", "NFKC", "NFKD"]


def test_archive_is_found_in_the_order_of_splits_and_ids(tiny_archive: Path) -> None:
    dataset = find_samples(DataConfig(root=str(tiny_archive)))
    assert dataset.layout == "archive"
    assert dataset.problems == ()
    assert [sample.split for sample in dataset.samples] == ["train"] * 8 + ["val"] * 3 + ["test"] * 4
    assert [sample.id for sample in dataset.samples] == [f"ISIC_{i:07d}" for i in range(15)]
    sample = dataset.samples[0]
    assert sample.image == tiny_archive / "ISIC-2017_Training_Data" / "ISIC_0000000.png"
    assert sample.mask == tiny_archive / "ISIC-2017_Training_Part1_GroundTruth" / "ISIC_0000000_segmentation.png"


def test_odd_spellings_of_the_archive(tmp_path: Path) -> None:
    touch(
        tmp_path / "ISIC-2017_Training_Data",
        *("ISIC_3.JPG", "ISIC_1.jpeg", "ISIC_2.png", "ISIC_1_superpixels.png", "ISIC_2_Superpixels.PNG"),
        *(".DS_Store", "._ISIC_1.jpg", "notes.txt", "ISIC-2017_Training_Data_metadata.csv"),
    )
    touch(
        tmp_path / "ISIC-2017_Training_Part1_GroundTruth",
        *("ISIC_1_Segmentation.png", "ISIC_2_segmentation.PNG", "isic_3_SEGMENTATION.png", ".DS_Store"),
    )
    dataset = find_samples(DataConfig(root=str(tmp_path)))
    assert found(dataset) == {"train": ["ISIC_1", "ISIC_2", "ISIC_3"], "val": [], "test": []}
    assert dataset.problems == ()


def test_archive_unpacked_into_folders_of_its_own_names(tmp_path: Path) -> None:
    data, truth = "ISIC-2017_Training_Data", "ISIC-2017_Training_Part1_GroundTruth"
    touch(tmp_path, f"{data}/{data}/a.jpg", f"{truth}/{truth}/a_segmentation.png")
    assert found(find_samples(DataConfig(root=str(tmp_path))))["train"] == ["a"]


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Validation"])
@pytest.mark.parametrize(
    ("images", "masks"), [("images", "masks"), ("Data", "GroundTruth"), ("x", "labels"), ("img", "gt")]
)
def test_one_folder_per_split(tmp_path: Path, val: str, images: str, masks: str) -> None:
    for split in ("train", val, "test"):
        touch(tmp_path / split, f"{images}/{split}1.jpg", f"{masks}/{split}1.png")
    dataset = find_samples(DataConfig(root=str(tmp_path)))
    assert dataset.layout == "splits"
    assert found(dataset) == {"train": ["train1"], "val": [f"{val}1"], "test": ["test1"]}


def test_ids_that_are_in_several_splits_get_the_name_of_theirs(tmp_path: Path) -> None:
    for split in ("train", "val"):
        touch(tmp_path / split, "images/1.jpg", "masks/1.png")
    touch(tmp_path / "train", "images/2.jpg", "masks/2.png")
    assert found(find_samples(DataConfig(root=str(tmp_path)))) == {
        "train": ["2", "train-1"],
        "val": ["val-1"],
        "test": [],
    }


@pytest.mark.parametrize("inside", [["images"], ["images", "masks", "labels"], ["a", "b"], ["a", "b", "masks"]])
def test_folders_that_are_not_one_of_images_and_one_of_masks_are_refused(tmp_path: Path, inside: list[str]) -> None:
    for folder in inside:
        (tmp_path / "train" / folder).mkdir(parents=True)
    with pytest.raises(DatasetError, match="must contain one folder of images and one of masks") as error:
        find_samples(DataConfig(root=str(tmp_path)))
    assert all(folder in str(error.value) for folder in inside)


def test_nothing_there_says_how_to_get_a_dataset(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="--data sample") as error:
        find_samples(DataConfig(root=str(tmp_path / "ISIC-2017")))
    assert "hpsearch data download" in str(error.value)
    assert str(tmp_path / "ISIC-2017") in str(error.value)


def test_empty_folders_are_no_dataset(tmp_path: Path) -> None:
    for name in ("ISIC-2017_Training_Data", "ISIC-2017_Training_Part1_GroundTruth"):
        (tmp_path / name).mkdir()
    with pytest.raises(DatasetError, match="its folders contain no images"):
        find_samples(DataConfig(root=str(tmp_path)))


def test_two_layouts_in_one_folder_are_refused(write_dataset: WriteDataset) -> None:
    config = write_dataset("archive")
    write_dataset("splits")
    with pytest.raises(DatasetError, match="two layouts, ISIC-2017_Training_Data and train"):
        find_samples(config)


def test_test_folder_alone_beside_an_archive_is_no_layout(write_dataset: WriteDataset) -> None:
    config = write_dataset("archive")
    (Path(config.root) / "test").mkdir()
    assert find_samples(config).layout == "archive"


def test_two_folders_for_one_split_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "train/images/a.jpg", "train/masks/a.png", "val/images/a.jpg", "validation/images/a.jpg")
    with pytest.raises(DatasetError, match="contains both val and validation"):
        find_samples(DataConfig(root=str(tmp_path)))


def test_data_without_ground_truth_is_refused(write_dataset: WriteDataset) -> None:
    config = write_dataset("archive")
    shutil.rmtree(Path(config.root) / "ISIC-2017_Validation_Part1_GroundTruth")
    with pytest.raises(DatasetError, match=r"_Validation_Data exists, but .*_Part1_GroundTruth"):
        find_samples(config)


def test_everything_that_cannot_be_paired_is_named(tmp_path: Path) -> None:
    touch(
        tmp_path / "train",
        *("images/a.jpg", "images/b.jpg", "images/c.jpg", "images/c.png", "images/d.tif", "images/e.jpg"),
        *("masks/a.png", "masks/c.png", "masks/d.png", "masks/e.png", "masks/e.jpg", "masks/z.png"),
    )
    dataset = find_samples(DataConfig(root=str(tmp_path)))
    assert found(dataset)["train"] == ["a"]
    assert {(problem.kind, problem.id) for problem in dataset.problems} == {
        ("missing mask", "b"),
        ("two files of one name", "c"),
        ("unknown format", "d"),
        ("two files of one name", "e"),
        ("missing image", "z"),
    }
    assert all(problem.files and str(problem.files[0]) in problem.text for problem in dataset.problems)


def test_own_folders_are_matched_by_the_suffix_that_most_masks_have(tmp_path: Path) -> None:
    touch(tmp_path / "photos", "a1.jpg", "a10.jpg", "b.png", "c.JPEG")
    touch(tmp_path / "outlines", "a1-Mask.png", "a10-mask.png", "b-mask.png")
    dataset = find_samples(DataConfig(images=str(tmp_path / "photos"), masks=str(tmp_path / "outlines")))
    assert dataset.layout == "folders"
    assert sorted(sample.id for sample in dataset.samples) == ["a1", "a10", "b"]
    assert all(sample.mask.stem.lower() == f"{sample.id}-mask" for sample in dataset.samples)
    assert [(problem.kind, problem.id) for problem in dataset.problems] == [("missing mask", "c")]


def test_own_suffix_can_be_given(tmp_path: Path) -> None:
    touch(tmp_path / "photos", "a.jpg", "b.jpg")
    touch(tmp_path / "outlines", "a_one.png", "a_two.png", "b_one.png", "b_two.png")
    config = DataConfig(images=str(tmp_path / "photos"), masks=str(tmp_path / "outlines"), mask_suffix="_two")
    dataset = find_samples(config)
    assert {sample.mask.name for sample in dataset.samples} == {"a_two.png", "b_two.png"}
    assert dataset.problems == ()


@pytest.mark.parametrize("suffix", ["", "_mask"])
def test_images_and_masks_can_lie_in_one_folder(tmp_path: Path, suffix: str) -> None:
    touch(tmp_path, "a.png", "a_mask.png", "b.png", "b_mask.png", "c.png")
    dataset = find_samples(DataConfig(images=str(tmp_path), masks=str(tmp_path), mask_suffix=suffix))
    assert {(sample.image.name, sample.mask.name) for sample in dataset.samples} == {
        ("a.png", "a_mask.png"),
        ("b.png", "b_mask.png"),
    }
    assert [(problem.kind, problem.id) for problem in dataset.problems] == [("missing mask", "c")]


@pytest.mark.parametrize(
    ("mask", "suffix", "advice"),
    [
        ("mask_a.png", "", r"the masks have names such as mask_a\.png\. Rename them"),
        (
            "outline7.png",
            "",
            r"the mask of a\.jpg would be a_mask\.png, but the masks have names such as outline7\.png",
        ),
        ("a_mask.png", "_*", r"the mask of a\.jpg would be a_\*\.png, but the masks have names such as a_mask\.png"),
        (
            "notes.txt",
            "",
            r"outlines, given as --masks, contains no JPEG or PNG file \(\.jpg, \.jpeg, \.jpe, \.jfif, \.png\)",
        ),
    ],
)
def test_names_that_never_match_say_what_to_do(tmp_path: Path, mask: str, suffix: str, advice: str) -> None:
    touch(tmp_path / "photos", "a.jpg")
    touch(tmp_path / "outlines", mask)
    config = DataConfig(images=str(tmp_path / "photos"), masks=str(tmp_path / "outlines"), mask_suffix=suffix)
    with pytest.raises(DatasetError, match=advice):
        find_samples(config)


def test_masks_of_an_unknown_format_alone_are_errors_of_their_images(tmp_path: Path) -> None:
    touch(tmp_path, "photos/a.jpg", "outlines/b.tif")
    dataset = find_samples(DataConfig(images=str(tmp_path / "photos"), masks=str(tmp_path / "outlines")))
    assert {(problem.kind, problem.id) for problem in dataset.problems} == {
        ("missing mask", "a"),
        ("unknown format", "b"),
    }


def test_own_images_given_as_data_are_pointed_to_their_flags(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "a_mask.png", "photos/a.jpg", "outlines_gt/a.png")
    with pytest.raises(DatasetError, match="--images DIR --masks DIR, or --data sample"):
        find_samples(DataConfig(root=str(tmp_path)))


def test_a_dataset_knows_its_flags(tmp_path: Path) -> None:
    touch(tmp_path, "my photos/a.jpg", "masks/a.png", "set/train/images/a.jpg", "set/train/masks/a.png")
    own = find_samples(DataConfig(images=str(tmp_path / "my photos"), masks=str(tmp_path / "masks")))
    assert own.flags == f"--images '{tmp_path}/my photos' --masks {tmp_path}/masks"
    assert find_samples(DataConfig(root=str(tmp_path / "set"))).flags == f"--data {tmp_path}/set"


def test_what_is_no_file_is_no_image(tmp_path: Path) -> None:
    touch(tmp_path, "train/images/a.jpg", "train/masks/a.png")
    (tmp_path / "train/images/b.jpg").mkdir()
    os.mkfifo(tmp_path / "train/images/c.jpg")
    dataset = find_samples(DataConfig(root=str(tmp_path)))
    assert found(dataset)["train"] == ["a"]
    assert dataset.problems == ()


def test_own_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        DatasetError, match=r"there is no folder .*photos: --images \(data\.images\) must name a folder"
    ):
        find_samples(DataConfig(images=str(tmp_path / "photos"), masks=str(tmp_path)))


def own_images(folder: Path, n: int) -> DataConfig:
    touch(folder, *(f"photos/x{i:03d}.jpg" for i in range(n)), *(f"masks/x{i:03d}.png" for i in range(n)))
    return DataConfig(images=str(folder / "photos"), masks=str(folder / "masks"))


def test_test_share_of_own_images_is_drawn_from_their_names(tmp_path: Path) -> None:
    first = find_samples(own_images(tmp_path / "a", 50))
    second = find_samples(own_images(tmp_path / "b", 50))
    assert found(first) == found(second)
    assert len(first.split("test")) == 10
    assert len(find_samples(replace(own_images(tmp_path / "a", 50), test_share=0.5)).split("test")) == 25


def test_added_image_moves_few_others_between_the_splits(tmp_path: Path) -> None:
    before = set(found(find_samples(own_images(tmp_path, 100)))["test"])
    after = set(found(find_samples(own_images(tmp_path, 101)))["test"])
    assert len(before ^ after) <= 2


def test_copies_of_one_own_image_fall_on_one_side(tmp_path: Path) -> None:
    config = own_images(tmp_path, 40)
    for i in range(20):
        shutil.copy(tmp_path / f"photos/x{i:03d}.jpg", tmp_path / f"photos/x{i + 20:03d}.jpg")
    splits = {sample.id: sample.split for sample in find_samples(config).samples}
    assert set(splits.values()) == {"train", "test"}
    assert all(splits[f"x{i:03d}"] == splits[f"x{i + 20:03d}"] for i in range(20))


def test_groups_of_own_images_fall_on_one_side(tmp_path: Path) -> None:
    config = own_images(tmp_path, 40)
    groups = tmp_path / "groups.csv"
    groups.write_text("image,patient\n" + "".join(f"x{i:03d},{i % 10}\n" for i in range(40)))
    splits = {sample.id: sample.split for sample in find_samples(replace(config, groups=str(groups))).samples}
    assert sum(split == "test" for split in splits.values()) == 8
    assert all(splits[f"x{i:03d}"] == splits[f"x{i % 10:03d}"] for i in range(40))


def test_test_split_of_own_images_can_be_listed(tmp_path: Path) -> None:
    config = own_images(tmp_path, 10)
    (tmp_path / "test.txt").write_text("x003\n\nx007.jpg\n")
    dataset = find_samples(replace(config, test_list=str(tmp_path / "test.txt")))
    assert found(dataset)["test"] == ["x003", "x007"]
    assert len(dataset.split("train")) == 8


def test_listed_image_that_is_not_there_is_named(tmp_path: Path) -> None:
    config = own_images(tmp_path, 10)
    (tmp_path / "test.txt").write_text("x003\nx099\n")
    with pytest.raises(DatasetError, match="'x099'"):
        find_samples(replace(config, test_list=str(tmp_path / "test.txt")))


def test_one_dataset_is_found_alike_in_all_layouts(write_dataset: WriteDataset, tmp_path: Path) -> None:
    pairs = tiny_pairs(n_val=0)
    datasets = []
    for layout in ("archive", "splits", "folders"):
        datasets.append(find_samples(write_dataset(layout, pairs)))
        shutil.rmtree(tmp_path / "ISIC-2017")
    assert [dataset.layout for dataset in datasets] == ["archive", "splits", "folders"]
    assert found(datasets[0]) == found(datasets[1]) == found(datasets[2])


class TestFolders:
    def test_what_is_no_folder_is_named_in_one_line(self, tmp_path: Path) -> None:
        touch(tmp_path, "images/a.png", "masks")
        with pytest.raises(DatasetError, match=r"masks is a file, not a folder: --masks \(data\.masks\) must name"):
            own(tmp_path)
        with pytest.raises(DatasetError, match="masks is a file, not a folder"):
            find_samples(DataConfig(root=str(tmp_path / "masks")))
        for path in (tmp_path / ("x" * 300), tmp_path / ("x/" * 3000)):
            for config in (DataConfig(root=str(path)), DataConfig(images=str(path), masks=str(tmp_path))):
                with pytest.raises(DatasetError, match="File name too long"):
                    find_samples(config)

    def test_a_folder_that_cannot_be_listed_is_named_in_one_line(
        self, write_dataset: WriteDataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = write_dataset("folders")
        closed = Path(config.masks)

        def refuse(path: str | Path) -> object:
            if Path(path) == closed:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return scandir(path)

        scandir = os.scandir
        monkeypatch.setattr(os, "scandir", refuse)
        with pytest.raises(DatasetError, match="outlines cannot be listed: Permission denied"):
            find_samples(config)


def test_swapped_folders_are_asked_about(tmp_path: Path) -> None:
    touch(tmp_path, "masks/a.jpg", "masks/b.jpg", "images/a_segmentation.png", "images/b_segmentation.png")
    with pytest.raises(DatasetError, match=r"check whether --images and --masks are swapped"):
        own(tmp_path)


@pytest.mark.parametrize(("n_listed", "text"), [(0, "lists none of the 3 images"), (3, "lists all of the 3 images")])
def test_a_test_list_of_no_image_or_of_every_image_is_refused(tmp_path: Path, n_listed: int, text: str) -> None:
    touch(tmp_path / "photos", "a.jpg", "b.jpg", "c.jpg")
    touch(tmp_path / "outlines", "a.png", "b.png", "c.png")
    (tmp_path / "list.txt").write_text("\n".join("abc"[:n_listed]))
    config = DataConfig(
        images=str(tmp_path / "photos"), masks=str(tmp_path / "outlines"), test_list=str(tmp_path / "list.txt")
    )
    with pytest.raises(DatasetError, match=text):
        find_samples(config)
