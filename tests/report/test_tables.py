from __future__ import annotations

from pathlib import Path

import pytest

from hpsearch.report import tables
from hpsearch.report.rows import study_rows
from tests.recorded import FakeStudy


@pytest.fixture
def study(tmp_path: Path) -> FakeStudy:
    study = FakeStudy(tmp_path, n_images=20)
    study.trial(**{"train.lr": 0.01, "unet.depth": 3, "unet.base_channels": 8})
    study.trial(**{"train.lr": 0.05, "unet.depth": 4, "unet.base_channels": 16})
    return study


def test_the_ranking_has_a_column_for_every_searched_setting(study: FakeStudy) -> None:
    rows = study_rows(study.record)
    table = tables.ranking(rows)
    names = [name.partition(".")[2].replace("_", " ") for name in rows.config.search]
    assert table.head == (*tables.COLUMNS, *names)
    assert {"trial", "mean", "95 % interval", "sd of folds", "over folds (t)", "time"} <= set(tables.COLUMNS)
    assert [line[0] for line in table.lines] == [str(row.number) for row in rows.complete]
    assert all(len(line) == len(table.head) for line in table.lines)


def test_a_column_is_one_entry(study: FakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tables.COLUMNS, "depth twice", lambda row, _: str(2 * row.params["unet.depth"]))
    rows = study_rows(study.record)
    table = tables.ranking(rows)
    place = table.head.index("depth twice")
    assert [line[place] for line in table.lines] == [str(2 * row.params["unet.depth"]) for row in rows.complete]
