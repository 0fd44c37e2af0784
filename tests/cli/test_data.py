from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from hpsearch.cli import group
from tests.search.studies import write_tiny_dataset


def test_check_shows_a_table_by_kind_with_the_first_files(tmp_path: Path) -> None:
    root = write_tiny_dataset(tmp_path)
    masks = sorted((root / "ISIC-2017_Training_Part1_GroundTruth").iterdir())
    for mask in masks[:6]:
        mask.unlink()
    result = CliRunner().invoke(group, ["data", "check", "--data", str(root), "--out", str(tmp_path)])
    lines = result.output.splitlines()
    (row,) = [line.split() for line in lines if line.startswith("error")]
    assert row[:4] == ["error", "missing", "mask", "6"]
    assert sum(mask.name in result.output for mask in masks) == 3
    assert any(line.strip() == "and 3 more (--json lists all)" for line in lines)
    assert any(line.split()[:3] == ["note", "counts", "1"] for line in lines)
