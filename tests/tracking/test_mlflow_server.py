"""Where runs go, and that credentials stay secret."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpsearch.errors import HpsearchError, TrackingError
from hpsearch.paths import ProjectPaths
from hpsearch.tracking import MlflowTracker, make_tracker, mlflow_server
from hpsearch.views import ViewThread
from tests.recorded import FakeStudy
from tests.tracking.tracked import make_study, read, rows_in, view_of


class TestWhere:
    def test_none_means_no_tracker(self, tmp_path: Path) -> None:
        assert make_tracker(ProjectPaths(tmp_path), "none") is None

    def test_a_relative_project_is_tracked_where_it_is(
        self, study: FakeStudy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        study.trial("complete")
        monkeypatch.chdir(study.project.root)
        tracker = MlflowTracker(ProjectPaths(Path()))
        monkeypatch.chdir(tmp_path)
        tracker.view(study.record.paths).update()
        assert "curves.png" in read(study.project)["trial 0000"].files
        assert not (tmp_path / "mlruns").exists()

    def test_the_environment_names_another_database(
        self, study: FakeStudy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, empty_mlflow_db: Path
    ) -> None:
        study.trial("complete")
        shutil.copy(empty_mlflow_db, tmp_path / "other.db")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
        view_of(study).update()
        assert "trial 0000" in read(study.project, uri=f"sqlite:///{tmp_path}/other.db")
        assert read(study.project) == {}
        # What the command line says goes before what the environment says.
        view_of(study, f"sqlite:///{study.project.mlflow_db}").update()
        assert "trial 0000" in read(study.project)

    def test_a_file_store_of_old_is_refused_with_the_way_out(self, tmp_path: Path) -> None:
        (tmp_path / "mlruns" / "0").mkdir(parents=True)
        (tmp_path / "mlruns" / "0" / "meta.yaml").touch()
        with pytest.raises(TrackingError, match="mlflow migrate-filestore --source"):
            make_tracker(ProjectPaths(tmp_path))
        # It is in nobody's way where runs go elsewhere.
        make_tracker(ProjectPaths(tmp_path), "http://127.0.0.1:5000")

    @pytest.mark.parametrize("uri", ["./mlruns", "file:///somewhere", "/somewhere"])
    def test_a_folder_is_no_place_to_track_to(self, tmp_path: Path, uri: str) -> None:
        with pytest.raises(TrackingError, match="give a database"):
            make_tracker(ProjectPaths(tmp_path), uri)

    @pytest.mark.parametrize("folder", ["quo'te\"s <script>&amp;", "ha#sh;at@host:80", "ümläut 皮"])
    def test_a_project_folder_may_have_any_name(
        self, tmp_path: Path, empty_mlflow_db: Path, quick_figures: None, folder: str
    ) -> None:
        study = make_study(tmp_path / folder, empty_mlflow_db, name="ä study+1.0", epochs=1)
        study.trial("complete")
        view_of(study).update()
        assert "curves.png" in read(study.project, "ä study+1.0")["trial 0000"].files

    @pytest.mark.parametrize("folder", ["50% off", "what?", "per%41cent"])
    def test_a_folder_that_sqlalchemy_cannot_name_works_or_is_refused(
        self, tmp_path: Path, empty_mlflow_db: Path, quick_figures: None, folder: str
    ) -> None:
        study = make_study(tmp_path / folder, empty_mlflow_db, epochs=1)
        study.trial("complete")
        refusal = ""
        try:
            view_of(study).update()
        except TrackingError as error:
            refusal = str(error)
        assert ("cannot be in" in refusal) != (rows_in(study.project)["runs"] == 2)
        assert [path.name for path in tmp_path.iterdir()] == [folder]

    def test_importing_tracking_loads_no_heavy_library(self) -> None:
        code = (
            "import sys, hpsearch.tracking; "
            "print([m for m in ('torch', 'mlflow', 'optuna', 'matplotlib', 'pandas') if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        assert done.stdout.strip() == "[]"

    def test_telemetry_is_off_unless_the_environment_says_otherwise(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
        mlflow_server.import_mlflow()
        assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
        monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")
        mlflow_server.import_mlflow()
        assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "false"


def test_the_database_is_made_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = ProjectPaths(tmp_path)
    (tmp_path / ".mlflow.db.1234567.tmp").write_bytes(b"left by a process that was killed")

    def fail(*args: Any) -> None:
        Path(str(args[1]).removeprefix("sqlite:///")).write_bytes(b"half")
        raise OSError("killed")

    monkeypatch.setattr("mlflow.store.tracking.sqlalchemy_store.SqlAlchemyStore.__init__", fail)
    with pytest.raises(HpsearchError):
        mlflow_server.create_database(project)
    assert [path.name for path in tmp_path.iterdir()] == [".mlflow.db.lock"]


class TestCredentials:
    def test_credentials_reach_neither_errors_nor_logs(
        self, study: FakeStudy, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
    ) -> None:
        study.trial("complete")
        tracker = MlflowTracker(study.project, "http://user:secret@127.0.0.1:9/mlflow")
        assert "secret" not in tracker.uri
        with caplog.at_level(logging.DEBUG, "hpsearch"):
            thread = ViewThread(tracker.view(study.record.paths))
            assert thread.close(60) == 1
        with pytest.raises(TrackingError, match=r"127\.0\.0\.1") as caught:
            tracker.view(study.record.paths).update()
        assert "secret" not in str(caught.value)
        assert "127.0.0.1" in caplog.text
        assert "secret" not in caplog.text
        assert "secret" not in "".join(capfd.readouterr())
