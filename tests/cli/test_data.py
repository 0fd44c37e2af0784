from __future__ import annotations

from pathlib import Path

import pytest

from hpsearch.data.config import DataConfig
from hpsearch.data.folds import groups_file, make_folds, read_groups
from hpsearch.data.layouts import find_samples
from tests.cli.test_main import exit_code
from tests.data.conftest import tiny_pairs, write_pairs


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "ISIC-2017"
    write_pairs(folder, "archive", tiny_pairs(4, 2, 2))
    return folder


def test_augment_writes_a_set_beside_the_data_that_keeps_versions_in_one_fold(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("data", "augment", "--data", str(root), "--copies", "2", "--set", "augment.rotate=20") == 0
    target = root.with_name("ISIC-2017_Aug")
    said = capsys.readouterr().out
    assert f"use it with --data {target}" in said
    assert "rotate 20" in said
    config = DataConfig(root=str(target))
    pool = find_samples(config).split("train", "val")
    assert len(pool) == 4 * 3 + 2
    table = groups_file(config)
    assert table is not None
    folds = make_folds(
        [sample.id for sample in pool],
        [sample.split for sample in pool],
        [sample.id for sample in pool],
        folds=3,
        seed=0,
        groups=read_groups(table),
    )
    fold_of = dict(zip(folds.ids, folds.fold_of, strict=True))
    for number in range(4):
        assert len({fold for id, fold in fold_of.items() if id.startswith(f"ISIC_{number:07d}")}) == 1


def test_augment_overwrites_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("data", "augment", "--data", str(root)) == 0
    (mask,) = root.with_name("ISIC-2017_Aug").rglob("ISIC_0000000_aug1_segmentation.png")
    before = mask.read_bytes()
    assert exit_code("data", "augment", "--data", str(root), "--seed", "1") == 1
    assert "exists already" in capsys.readouterr().err
    assert mask.read_bytes() == before


def test_augment_writes_where_it_is_told(root: Path, tmp_path: Path) -> None:
    assert exit_code("data", "augment", "--data", str(root), "--to", str(tmp_path / "more")) == 0
    assert len(find_samples(DataConfig(root=str(tmp_path / "more"))).samples) == 4 * 2 + 4


def test_groups_are_found_only_in_an_augmented_set(root: Path) -> None:
    (root / "groups.csv").write_text("image,original\n")
    assert groups_file(DataConfig(root=str(root))) is None
    assert groups_file(DataConfig(root=str(root), groups="mine.csv")) == Path("mine.csv")
