"""Names from outside, whatever they hold: they are text everywhere, and nothing is reachable from other machines."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import psutil
import pytest
from PIL import Image

from hpsearch import config as configs
from hpsearch.paths import ProjectPaths
from hpsearch.report.page import write_report
from hpsearch.search.callbacks import NullCallback
from hpsearch.tracking import MlflowTracker
from tests.data.conftest import tiny_pairs
from tests.search.studies import SETTINGS, run
from tests.tracking.tracked import read

NAMES = (
    "it's a lesion",
    'a "quoted" one',
    "<script>alert(1)<script>",
    "x'); DROP TABLE trials;--",
    "Größe ü 皮膚",
    " two  spaces ",
    "%s {0} $HOME `id`",
    "-rf",
    "a,b;c",
    "plain",
)


class _Ports(NullCallback):
    """Notes the addresses at which the study's processes listen."""

    def __init__(self) -> None:
        self.listening: set[str] = set()

    def epoch_ended(self, trial: int, fold: int, row: object) -> None:
        me = psutil.Process()
        for process in (me, *me.children(recursive=True)):
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    self.listening.add(connection.laddr.ip)


@pytest.mark.slow
def test_names_are_text_from_the_images_to_the_report(tmp_path: Path, empty_mlflow_db: Path) -> None:
    for folder in ("photos 'n' more", "outlines"):
        (tmp_path / folder).mkdir()
    tested = ("another 'one'", "the <last>")
    for name, pair in zip((*NAMES, *tested), tiny_pairs(len(NAMES) + 2, 0, 0), strict=True):
        Image.fromarray(pair.image).save(tmp_path / "photos 'n' more" / f"{name}.png")
        Image.fromarray(pair.mask).save(tmp_path / "outlines" / f"{name}.png")
    project = ProjectPaths(tmp_path / "a project; 'quoted' ü")
    project.root.mkdir()
    shutil.copy(empty_mlflow_db, project.mlflow_db)
    listed = tmp_path / "test list.txt"
    listed.write_text("\n".join(tested))
    folders = [f"data.images='''{tmp_path}/photos 'n' more'''", f"data.masks='{tmp_path}/outlines'"]
    config = configs.load(
        None, [*folders, *SETTINGS, "study.trials=1", "study.pruner=none", f"data.test_list={listed}"]
    )
    ports = _Ports()
    record = run(project.root, config, name="Größe + ü 2", tracker=MlflowTracker(project), callback=ports).record

    assert sorted(record.folds.ids) == sorted(NAMES)
    assert record.trial(0).outcome == "complete"
    tracked = read(project, "Größe + ü 2")
    table = next(content for run in tracked.values() for name, content in run.files.items() if name == "scores.csv")
    text = table.decode() if isinstance(table, bytes) else str(table)
    assert all(name.replace('"', '""') in text for name in NAMES)
    with sqlite3.connect(project.optuna_db) as database:
        assert database.execute("SELECT study_name FROM studies").fetchall() == [("Größe + ü 2",)]
    page = write_report(record).read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert ports.listening <= {"127.0.0.1"}
