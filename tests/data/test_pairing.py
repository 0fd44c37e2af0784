"""Names, links and several masks of one image."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal
from unicodedata import normalize

import pytest

from hpsearch.config.data import DataConfig
from hpsearch.data.dataset import Layout
from hpsearch.data.folds import connected, read_groups
from hpsearch.data.layouts import find_samples
from hpsearch.errors import DatasetError

from .conftest import WriteDataset, found, kinds, own, touch

Form = Literal["NFC", "NFD", "NFKC", "NFKD"]


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
        ids = [sample.id for sample in dataset.samples]
        assert connected(ids, ids, read_groups(groups)) == [0] * 4

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
            f"{samples[1].image} is a link to nowhere.png, which does not exist",
            f"{samples[2].mask} is a link to {samples[2].mask.name}, which points to itself",
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
        with pytest.raises(
            DatasetError, match="ISIC-2017_Training_Data is a link to elsewhere, which does not exist"
        ):
            find_samples(DataConfig(root=str(tmp_path)))
        (tmp_path / "images").symlink_to("images")
        with pytest.raises(DatasetError, match="images is a link to images, which points to itself"):
            own(tmp_path)


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
