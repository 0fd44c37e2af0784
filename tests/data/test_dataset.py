"""Labels of byte-identical images, and problems of samples."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpsearch.data import dataset
from hpsearch.data.dataset import Problem, Sample, file_length, file_sha256, same_bytes


def sample(path: Path) -> Sample:
    return Sample(path.stem, path, path.with_suffix(".mask"), "val")


def test_byte_identical_images_share_a_label_and_others_do_not(tmp_path: Path) -> None:
    for name, content in (("a", b"12"), ("b", b"21"), ("c", b"12"), ("d", b"123")):
        (tmp_path / name).write_bytes(content)
    a, b, c, d, missing = same_bytes([sample(tmp_path / name) for name in ("a", "b", "c", "d", "missing")])
    assert a == c
    assert len({a, b, d, missing}) == 4


def test_only_images_of_equal_length_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in (("a", b"1"), ("b", b"12"), ("c", b"21")):
        (tmp_path / name).write_bytes(content)
    read: list[str] = []
    monkeypatch.setattr(dataset, "sha256_file", lambda path: read.append(path.name) or path.name)
    same_bytes([sample(tmp_path / name) for name in ("a", "b", "c")])
    assert read == ["b", "c"]


def test_files_that_cannot_be_read_have_no_length_and_labels_of_their_own(tmp_path: Path) -> None:
    assert file_length(tmp_path / "a") == -1
    assert file_sha256(tmp_path / "a") != file_sha256(tmp_path / "b")


def test_a_problem_of_a_sample_names_both_files_by_default(tmp_path: Path) -> None:
    each = sample(tmp_path / "a")
    assert each.problem("kind", "text") == Problem("kind", "a", (each.image, each.mask), "text", "val")
    assert each.problem("kind", "text", each.mask).files == (each.mask,)
