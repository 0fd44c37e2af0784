"""Pairs are found in every layout, what cannot be paired is named, and the layout follows from what is there."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal
from unicodedata import normalize

import pytest

from hpsearch.config.data import DataConfig
from hpsearch.data.dataset import Dataset, Layout
from hpsearch.data.folds import read_groups
from hpsearch.data.layouts import find_samples
from hpsearch.errors import DatasetError

from .conftest import WriteDataset, tiny_pairs

Form = Literal["NFC", "NFD", "NFKC", "NFKD"]


def touch(root: Path, *names: str) -> None:
    """Files whose names are all that matters."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(os.fsencode(name))


def found(dataset: Dataset) -> dict[str, list[str]]:
    return {split: [sample.id for sample in dataset.split(split)] for split in ("train", "val", "test")}  # type: ignore[arg-type]


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
    with pytest.raises(DatasetError, match="must hold one folder of images and one of masks") as error:
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
    with pytest.raises(DatasetError, match="its folders hold no images"):
        find_samples(DataConfig(root=str(tmp_path)))


def test_folder_above_the_dataset_points_to_it(write_dataset: WriteDataset, tmp_path: Path) -> None:
    write_dataset("archive")
    with pytest.raises(DatasetError, match=f"use --data {tmp_path}/ISIC-2017"):
        find_samples(DataConfig(root=str(tmp_path)))


def test_two_layouts_in_one_folder_are_refused(write_dataset: WriteDataset) -> None:
    config = write_dataset("archive")
    write_dataset("splits")
    with pytest.raises(DatasetError, match="two layouts, ISIC-2017_Test_v2_Data and train"):
        find_samples(config)


def test_test_folder_alone_beside_an_archive_is_no_layout(write_dataset: WriteDataset) -> None:
    config = write_dataset("archive")
    (Path(config.root) / "test").mkdir()
    assert find_samples(config).layout == "archive"


def test_two_folders_for_one_split_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "train/images/a.jpg", "train/masks/a.png", "val/images/a.jpg", "validation/images/a.jpg")
    with pytest.raises(DatasetError, match="holds both val and validation"):
        find_samples(DataConfig(root=str(tmp_path)))


def test_data_without_ground_truth_is_refused(write_dataset: WriteDataset) -> None:
    config = write_dataset("archive")
    shutil.rmtree(Path(config.root) / "ISIC-2017_Validation_Part1_GroundTruth")
    with pytest.raises(DatasetError, match=r"_Validation_Data is there, but the folder .*_Part1_GroundTruth"):
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
        ("mask_a.png", "", r"rename them \(mask_a\.png to a\.png\)"),
        ("outline7.png", "", r"mask of a\.jpg: a\.png or a_mask\.png\), but the masks have names like outline7\.png"),
        ("a_mask.png", "_*", r"data\.mask_suffix = _\* \(taken literally\) the mask of a\.jpg is a_\*\.png"),
        ("b.tif", "", r"b\.tif is a \.tif file, which cannot be read: convert it to PNG or JPEG"),
        (
            "notes.txt",
            "",
            r"outlines, given as --masks, holds no JPEG or PNG file \(\.jpg, \.jpeg, \.jpe, \.jfif, \.png\)",
        ),
    ],
)
def test_names_that_never_match_say_what_to_do(tmp_path: Path, mask: str, suffix: str, advice: str) -> None:
    touch(tmp_path / "photos", "a.jpg")
    touch(tmp_path / "outlines", mask)
    config = DataConfig(images=str(tmp_path / "photos"), masks=str(tmp_path / "outlines"), mask_suffix=suffix)
    with pytest.raises(DatasetError, match=advice):
        find_samples(config)


@pytest.mark.parametrize(
    ("files", "images", "masks"),
    [
        (("a.jpg", "a_mask.png"), "", ""),
        (("a.JFIF", "a_mask.png"), "", ""),
        (("photos/a.jpg", "outlines_gt/a.png"), "/photos", "/outlines_gt"),
    ],
)
def test_own_images_given_as_data_are_pointed_to_their_flags(
    tmp_path: Path, files: tuple[str, ...], images: str, masks: str
) -> None:
    touch(tmp_path, *files)
    with pytest.raises(DatasetError) as error:
        find_samples(DataConfig(root=str(tmp_path)))
    assert str(error.value).endswith(f"use --images {tmp_path}{images} --masks {tmp_path}{masks}")


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


def kinds(dataset: Dataset) -> set[tuple[str, str]]:
    return {(problem.kind, problem.id) for problem in dataset.problems}


def own(folder: Path, **settings: str) -> Dataset:
    return find_samples(DataConfig(images=str(folder / "images"), masks=str(folder / "masks"), **settings))  # type: ignore[arg-type]


class TestNames:
    @pytest.mark.parametrize(
        ("images", "masks"),
        [
            ("train/images/{}.jpg", "train/masks/{}.png"),
            ("ISIC-2017_Training_Data/{}.jpg", "ISIC-2017_Training_Part1_GroundTruth/{}_segmentation.png"),
        ],
    )
    @pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC"), ("NFKC", "NFD")])
    def test_unicode_forms_of_one_name_are_one_name(
        self, tmp_path: Path, images: str, masks: str, forms: tuple[Form, Form]
    ) -> None:
        stems = [f"lésion{number} ÅÖ" for number in range(3)]
        for stem in stems:
            touch(tmp_path, images.format(normalize(forms[0], stem)), masks.format(normalize(forms[1], stem.upper())))
        dataset = find_samples(DataConfig(root=str(tmp_path)))
        assert found(dataset)["train"] == stems
        assert dataset.problems == ()

    def test_ids_are_nfc_and_found_by_lists_and_groups_of_any_form(self, tmp_path: Path) -> None:
        stems = [f"lésion{number}" for number in range(4)]
        for stem in stems:
            touch(tmp_path, f"images/{normalize('NFD', stem)}.JPG", f"masks/{stem}_mask.png")
        listed, groups = tmp_path / "test.txt", tmp_path / "groups.csv"
        listed.write_text(f"{normalize('NFD', stems[1])}.jpg\r\n{stems[2].upper()}\r\n", encoding="utf-8-sig")
        groups.write_text("image,patient\n" + "".join(f"{normalize('NFD', s)}.jpg,p\n" for s in stems))
        dataset = own(tmp_path, test_list=str(listed))
        assert found(dataset)["test"] == [stems[1], stems[2]]
        table = read_groups(groups)
        assert [table[sample.id] for sample in dataset.samples] == ["p"] * 4
        assert "lésion9" not in table

    def test_two_forms_of_one_name_are_two_files_of_one_name(self, tmp_path: Path) -> None:
        touch(tmp_path, "images/é.png", f"images/{normalize('NFD', 'é')}.png", "masks/é.png", "images/a.png")
        touch(tmp_path, "images/b.png", "images/B.png", "masks/b.png", "masks/a.png")
        assert kinds(own(tmp_path)) == {("two files of one name", "é"), ("two files of one name", "B")}

    def test_ids_of_two_splits_that_differ_by_case_get_the_name_of_their_split(self, tmp_path: Path) -> None:
        touch(tmp_path, "train/images/A.jpg", "train/masks/A.png", "test/images/a.jpg", "test/masks/a.png")
        assert found(find_samples(DataConfig(root=str(tmp_path)))) == {
            "train": ["train-A"],
            "val": [],
            "test": ["test-a"],
        }

    @pytest.mark.parametrize(
        ("stem", "shown", "why"),
        [
            (b"l\xe9sion", r"l\xe9sion", "is not UTF-8"),
            (b"\xff\xfe", r"\xff\xfe", "is not UTF-8"),
            (b"two\nlines", r"two\nlines", "has control characters"),
            (b"bell\x07", r"bell\x07", "has control characters"),
            ("line\u2028end".encode(), r"line\u2028end", "has control characters"),
            (b"x" * 230, "x" * 230, "is longer than 200 bytes"),
        ],
    )
    def test_a_name_that_tables_cannot_hold_is_an_error_that_shows_it(
        self, tmp_path: Path, stem: bytes, shown: str, why: str
    ) -> None:
        touch(tmp_path, *(f"{folder}/{name}.png" for folder in ("images", "masks") for name in ("a", "b")))
        for folder in ("images", "masks"):
            (tmp_path / folder / os.fsdecode(stem + b".png")).write_bytes(b"x")
        dataset = own(tmp_path)
        (problem,) = dataset.problems
        assert (problem.kind, problem.id, len(problem.files)) == ("unusable name", shown, 2)
        assert problem.text == f"{tmp_path}/images/{shown}.png: its name {why}: rename it"
        assert {sample.id for sample in dataset.samples} == {"a", "b"}

    @pytest.mark.parametrize(
        "stem",
        ["two  spaces ", "it's", 'a "b"', "#1", "50%", "-rf", "😀👩‍⚕️", "a.b.c", "{0} $HOME `id`", "a;b,c", "皮膚"],
    )
    def test_odd_names_are_names(self, tmp_path: Path, stem: str) -> None:
        touch(tmp_path, f"images/{stem}.png", f"masks/{stem}.png", "images/z.png", "masks/z.png")
        dataset = own(tmp_path)
        assert {sample.id for sample in dataset.samples} == {stem, "z"}
        assert dataset.problems == ()

    @pytest.mark.parametrize("where", ["images", "masks", "root"])
    def test_a_folder_above_whose_name_is_not_utf_8_is_named_in_one_line(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
    ) -> None:
        bad = tmp_path / os.fsdecode(b"l\xe9sions")
        touch(tmp_path, "images/a.png", "masks/a.png")
        touch(bad, "images/a.png", "masks/a.png", "train/images/a.png", "train/masks/a.png")
        monkeypatch.chdir(bad)
        folders = {"images": str(tmp_path / "images"), "masks": str(tmp_path / "masks"), where: where}
        with pytest.raises(DatasetError, match=r"the folder name l\\xe9sions is not UTF-8: rename it") as error:
            find_samples(DataConfig(root=".") if where == "root" else DataConfig(**folders))  # type: ignore[arg-type]
        str(error.value).encode()

    def test_a_folder_inside_whose_name_is_not_utf_8_is_named_in_one_line(self, tmp_path: Path) -> None:
        touch(tmp_path, f"train/{os.fsdecode(b'im' + bytes([0xE9]) + b'ges')}/a.png", "train/masks/a.png")
        with pytest.raises(DatasetError, match=r"the folder name im\\xe9ges is not UTF-8: rename it"):
            find_samples(DataConfig(root=str(tmp_path)))

    @pytest.mark.parametrize("ending", [".jfif", ".JFIF", ".jpe", ".JPG", ".Jpeg"])
    def test_all_endings_of_jpeg_are_read(self, tmp_path: Path, ending: str) -> None:
        touch(tmp_path, f"images/a{ending}", "masks/a.png", f"images/b{ending}", "masks/b.png")
        (tmp_path / "test.txt").write_text(f"a{ending}\n")
        assert found(own(tmp_path, test_list=str(tmp_path / "test.txt"))) == {
            "train": ["b"],
            "val": [],
            "test": ["a"],
        }

    @pytest.mark.parametrize("ending", [".bmp", ".TIF", ".gif", ".webp", ".heic", ".avif", ".jp2", ".dcm", ".svg"])
    def test_other_endings_are_named_as_unsupported(self, tmp_path: Path, ending: str) -> None:
        touch(tmp_path, f"images/a{ending}", "masks/a.png", "images/b.png", "masks/b.png", f"masks/c{ending}")
        dataset = own(tmp_path)
        assert kinds(dataset) == {("unknown format", "a"), ("unknown format", "c")}
        text = f"a{ending} is a {ending.lower()} file, which cannot be read: convert it to PNG or JPEG"
        assert dataset.problems[0].text.endswith(text)


class TestLinks:
    @pytest.mark.parametrize("layout", ["folders", "splits", "archive"])
    def test_a_link_to_nothing_is_an_error_that_names_link_and_target(
        self, write_dataset: WriteDataset, layout: Layout
    ) -> None:
        config = write_dataset(layout)
        samples = find_samples(config).samples
        for path, target in ((samples[1].image, "nowhere.png"), (samples[2].mask, samples[2].mask.name)):
            path.unlink()
            path.symlink_to(target)
        dataset = find_samples(config)
        assert kinds(dataset) == {("dangling link", "ISIC_0000001"), ("dangling link", "ISIC_0000002")}
        assert [problem.text for problem in dataset.problems] == [
            f"{samples[1].image} is a link to nowhere.png, which is not there",
            f"{samples[2].mask} is a link to {samples[2].mask.name}, which leads back to itself",
        ]
        assert len(dataset.samples) == 13

    def test_an_image_that_is_listed_for_the_test_may_have_errors(self, tmp_path: Path) -> None:
        touch(tmp_path, *(f"{folder}/{name}.png" for folder in ("images", "masks") for name in "abc"))
        (tmp_path / "images/b.png").unlink()
        (tmp_path / "images/b.png").symlink_to("nowhere")
        (tmp_path / "test.txt").write_text("b\nc\n")
        dataset = own(tmp_path, test_list=str(tmp_path / "test.txt"))
        assert found(dataset)["test"] == ["c"]
        assert [(problem.kind, problem.split) for problem in dataset.problems] == [("dangling link", "test")]

    def test_links_to_files_are_files(self, tmp_path: Path) -> None:
        touch(tmp_path, "store/1.png", "masks/a.png")
        (tmp_path / "images").mkdir()
        (tmp_path / "images/a.png").symlink_to("../store/1.png")
        assert [sample.id for sample in own(tmp_path).samples] == ["a"]

    def test_a_folder_that_is_a_link_to_nothing_is_named(self, tmp_path: Path) -> None:
        touch(tmp_path, "ISIC-2017_Training_Part1_GroundTruth/a_segmentation.png", "masks/a.png")
        (tmp_path / "ISIC-2017_Training_Data").symlink_to("elsewhere")
        with pytest.raises(DatasetError, match="ISIC-2017_Training_Data is a link to elsewhere, which is not there"):
            find_samples(DataConfig(root=str(tmp_path)))
        (tmp_path / "images").symlink_to("images")
        with pytest.raises(DatasetError, match="images is a link to images, which leads back to itself"):
            own(tmp_path)


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


class TestSeveralMasks:
    @pytest.mark.parametrize(
        ("masks", "more"),
        [
            ("{}_mask.png", ["x1_mask_1.png"]),
            ("{}_mask.png", ["x1_mask1.png", "x1_MASK-2.png"]),
            ("{}_segmentation.png", ["x1_mask.png"]),
            ("{}.png", ["x1_mask_1.png"]),
            ("{}.png", ["x1 (2).png"]),
            ("{}.png", ["x1_2.jpg"]),
            ("{}_mask.png", ["x1_2_mask.png"]),
            ("{}gt.png", ["x1gt2.png"]),
        ],
    )
    def test_an_image_with_several_masks_is_an_error_that_names_all(
        self, tmp_path: Path, masks: str, more: list[str]
    ) -> None:
        for stem in ("x1", "x10", "x2", "y"):
            touch(tmp_path, f"images/{stem}.png", f"masks/{masks.format(stem)}")
        touch(tmp_path / "masks", *more)
        dataset = own(tmp_path)
        assert {sample.id for sample in dataset.samples} == {"x10", "x2", "y"}
        (problem,) = dataset.problems
        assert (problem.kind, problem.id, problem.split) == ("several masks", "x1", "train")
        assert {path.name for path in problem.files} == {"x1.png", masks.format("x1"), *more}
        assert all(path.name in problem.text for path in problem.files)

    @pytest.mark.parametrize(
        "more", [["x (1)_mask_1.png"], ["x (1)_mask_1.png", "x (1)_mask_2.png"], ["x (1)_label.png"]]
    )
    def test_they_are_seen_in_one_folder_with_the_images_too(self, tmp_path: Path, more: list[str]) -> None:
        touch(tmp_path, *(f"x ({number}){mask}.png" for number in range(1, 11) for mask in ("", "_mask")), *more)
        dataset = find_samples(DataConfig(images=str(tmp_path), masks=str(tmp_path)))
        assert len(dataset.samples) == 9
        assert kinds(dataset) == {("several masks", "x (1)")}

    def test_a_mask_belongs_to_the_longest_name_that_it_begins_with(self, tmp_path: Path) -> None:
        for stem in ("im1", "im10", "im1_a"):
            touch(tmp_path, f"images/{stem}.png", f"masks/{stem}_mask.png")
        touch(tmp_path / "masks", "im10_mask_1.png", "im1_a_mask_1.png")
        assert kinds(own(tmp_path)) == {("several masks", "im10"), ("several masks", "im1_a")}

    @pytest.mark.parametrize("stem", ["im10", "im1_c", "other", "im1b"])
    def test_a_mask_whose_image_is_missing_is_nobodys_second_mask(self, tmp_path: Path, stem: str) -> None:
        for name in ("im1", "im2", "im1_b"):
            touch(tmp_path, f"images/{name}.png", f"masks/{name}_mask.png")
        touch(tmp_path / "masks", f"{stem}_mask.png")
        dataset = own(tmp_path)
        assert kinds(dataset) == {("missing image", stem)}
        assert len(dataset.samples) == 3


def test_swapped_folders_are_asked_about(tmp_path: Path) -> None:
    touch(tmp_path, "masks/a.jpg", "masks/b.jpg", "images/a_segmentation.png", "images/b_segmentation.png")
    with pytest.raises(DatasetError, match=r"were --images and --masks swapped\?"):
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
