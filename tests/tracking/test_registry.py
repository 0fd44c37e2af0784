"""The model of a final is registered with a real MLflow, once, under the study's name."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hpsearch.errors import ExportError, TrackingError
from hpsearch.inference.predictor import Predictor, find_images, predict_files
from hpsearch.paths import ProjectPaths
from hpsearch.tracking import MlflowTracker, mlflow_model
from tests.inference.test_predictor import noise, write_model
from tests.recorded import FakeStudy
from tests.tracking.tracked import all_runs, client, view_of

REQUESTS = (
    "create_logged_model",
    "log_model_artifacts",
    "finalize_logged_model",
    "log_outputs",
    "create_registered_model",
    "create_model_version",
    "set_logged_model_tags",
)


@pytest.fixture
def study(tmp_path: Path, empty_mlflow_db: Path, quick_figures: None) -> FakeStudy:
    """A study whose final has a model."""
    project = tmp_path / "project"
    project.mkdir()
    shutil.copy(empty_mlflow_db, project / "mlflow.db")
    study = FakeStudy(project)
    study.trial("complete")
    study.final(0)
    write_model(study.record.paths.final("trial-0000").model)
    return study


@pytest.fixture
def quick_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing takes seconds, and a process."""

    def pack(weights: Path, folder: Path, *, run_id: str, model_id: str) -> None:
        folder.mkdir()
        shutil.copy(weights, folder / "model.safetensors")
        (folder / "MLmodel").write_text(f"run_id: {run_id}\nmodel_id: {model_id}\n", encoding="utf-8")

    monkeypatch.setattr(mlflow_model, "pack", pack)


def deliver(study: FakeStudy) -> None:
    """Update MLflow as a new process would."""
    view_of(study).update()


def versions(project: ProjectPaths) -> list[Any]:
    return list(client(project).search_model_versions("name = 'fake'"))


def models(study: FakeStudy) -> list[Any]:
    reader = client(study.project)
    return list(reader.search_logged_models([reader.get_experiment_by_name("fake").experiment_id]))


@pytest.mark.usefixtures("quick_pack")
def test_the_model_of_a_final_is_a_version_of_the_studys_model(study: FakeStudy) -> None:
    deliver(study)
    (version,) = versions(study.project)
    (run,) = [run for run in all_runs(study.project) if run.info.run_name == "final of trial 0000"]
    assert version.run_id == run.info.run_id
    assert version.tags["hpsearch.final"] == "trial-0000"
    assert "not a medical device" in version.description
    assert f"{study.record.trial(0).value:.2f}"[:3] in version.description
    (model,) = models(study)
    assert run.outputs.model_outputs[0].model_id == model.model_id
    folder = Path(version.source.removeprefix("file://"))
    assert folder.is_relative_to(study.project.mlruns / "fake")
    assert sorted(path.name for path in folder.iterdir()) == ["MLmodel", "model.safetensors"]
    assert model.model_id in (folder / "MLmodel").read_text(encoding="utf-8")


@pytest.mark.usefixtures("quick_pack")
def test_delivering_again_registers_nothing_more_and_another_final_does(study: FakeStudy) -> None:
    deliver(study)
    deliver(study)
    assert len(versions(study.project)) == 1
    study.trial("complete")
    study.final(1)
    write_model(study.record.paths.final("trial-0001").model)
    deliver(study)
    found = {version.tags["hpsearch.final"]: int(version.version) for version in versions(study.project)}
    assert found == {"trial-0000": 1, "trial-0001": 2}


@pytest.mark.usefixtures("quick_pack")
@pytest.mark.parametrize("request_name", REQUESTS)
@pytest.mark.parametrize("is_done", [False, True])
def test_a_request_that_fails_leaves_one_version_in_the_end(
    study: FakeStudy, request_name: str, is_done: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    original: Callable[..., Any] = getattr(MlflowClient, request_name)

    def fail_once(self: Any, *args: Any, **options: Any) -> Any:
        monkeypatch.setattr(MlflowClient, request_name, original)
        if is_done:
            original(self, *args, **options)
        raise OSError("the server is gone")

    monkeypatch.setattr(MlflowClient, request_name, fail_once)
    with pytest.raises(TrackingError):
        deliver(study)
    deliver(study)
    (version,) = versions(study.project)
    (model,) = models(study)
    assert version.source == model.artifact_location
    assert str(model.status) in ("READY", "LoggedModelStatus.READY")
    (run,) = [run for run in all_runs(study.project) if run.info.run_name == "final of trial 0000"]
    assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]
    assert model_folders(study) == [Path(version.source.removeprefix("file://")).parent]


def model_folders(study: FakeStudy) -> list[Path]:
    """Folders in which MLflow keeps the files of models."""
    return list((study.project.mlruns / "fake" / "models").glob("*"))


def test_a_model_that_cannot_be_packed_leaves_nothing_in_mlflow(
    study: FakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ExportError("it cannot be packed")

    for _ in range(2):
        with monkeypatch.context() as patched:
            patched.setattr(mlflow_model, "pack", fail)
            with pytest.raises(ExportError):
                deliver(study)
    with sqlite3.connect(study.project.mlflow_db) as database:
        assert database.execute("SELECT count(*) FROM logged_models").fetchone() == (0,)
    assert model_folders(study) == versions(study.project) == []


@pytest.mark.usefixtures("quick_pack")
def test_the_models_of_a_project_that_was_copied_are_its_own(study: FakeStudy, tmp_path: Path) -> None:
    deliver(study)
    there = ProjectPaths(tmp_path / "another place")
    shutil.copytree(study.project.root, there.root)
    shutil.rmtree(study.project.root)
    MlflowTracker(there).view(there.study("fake")).update()
    (version,) = versions(there)
    assert version.source.startswith((there.mlruns / "fake").as_uri())
    assert client(there).get_model_version_download_uri("fake", "1") == version.source


@pytest.mark.usefixtures("quick_pack")
def test_rebuilding_registers_the_model_of_the_new_run(study: FakeStudy) -> None:
    deliver(study)
    (run,) = [run for run in all_runs(study.project) if run.info.run_name == "final of trial 0000"]
    view_of(study).rebuild()
    (version,) = versions(study.project)
    assert version.run_id != run.info.run_id


LOAD = """
import sys
import numpy as np
from PIL import Image
import mlflow
model = mlflow.pyfunc.load_model("models:/fake/1")
for path, mask in zip(sys.argv[1:], model.predict(sys.argv[1:]), strict=True):
    Image.fromarray(mask).save(path + ".mask.png")
"""


@pytest.mark.slow
def test_the_registered_model_loads_in_a_fresh_process_and_gives_the_masks_that_predict_writes(
    study: FakeStudy, tmp_path: Path
) -> None:
    deliver(study)
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, shape in enumerate([(50, 70), (41, 20)]):
        Image.fromarray(noise(*shape, seed=number)).save(photos / f"{number}.png")
    images = find_images([photos])
    predictor = Predictor.load(study.record.paths.final("trial-0000").model, device="cpu", threads=1)
    predict_files(predictor, images, tmp_path / "masks")
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{study.project.mlflow_db}"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, images)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    for path in images:
        written = np.asarray(Image.open(tmp_path / "masks" / f"{path.stem}_segmentation.png"))
        assert np.array_equal(np.asarray(Image.open(f"{path}.mask.png")), written)
