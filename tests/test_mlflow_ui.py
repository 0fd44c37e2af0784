"""The real `mlflow ui`, started as the README says, shows every trial."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from hpsearch.final import run_final
from hpsearch.paths import ProjectPaths
from hpsearch.tracking import make_tracker
from hpsearch.tuning.planning import MachineChoice
from tests.tuning.studies import run, tiny_config, write_tiny_dataset

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> ProjectPaths:
    """A study of three trials and a final, tracked as by default."""
    found = ProjectPaths(tmp_path_factory.mktemp("project"))
    config = tiny_config(write_tiny_dataset(found.root), "study.pruner=none", "study.sampler=random")
    run(found.root, config, tracker=make_tracker(found))
    run_final(found, machine=MachineChoice("cpu", 1, 1), tracker=make_tracker(found))
    return found


@pytest.fixture(scope="module")
def address(project: ProjectPaths) -> Iterator[str]:
    """A plain `mlflow ui` of the project folder on a free port of 127.0.0.1; all it started is ended afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("mlflow")), "ui", "--port", str(port)],
        cwd=project.root,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 180
        while True:
            assert process.poll() is None, "mlflow ui ended"
            assert time.monotonic() < deadline, "mlflow ui does not answer"
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ask(address: str, path: str, **body: Any) -> dict[str, Any]:
    """MLflow's REST API: GET without a body, POST with one."""
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(
        f"{address}/api/2.0/mlflow/{path}", data=data, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        table: dict[str, Any] = json.load(answer)
    return table


def runs(address: str) -> dict[str, dict[str, Any]]:
    """Runs of the study `tiny` by name."""
    experiment = ask(address, "experiments/get-by-name?experiment_name=tiny")["experiment"]["experiment_id"]
    found = ask(address, "runs/search", experiment_ids=[experiment], max_results=100)["runs"]
    return {run["info"]["run_name"]: run for run in found}


def test_every_trial_is_there_with_its_params_and_metrics(project: ProjectPaths, address: str) -> None:
    record = run(
        project.root, tiny_config(project.root / "ISIC-2017", "study.pruner=none", "study.sampler=random")
    ).record
    found = runs(address)
    trials = {name: each for name, each in found.items() if name.startswith("trial")}
    assert len(trials) == 3
    for trial in record.trials():
        each = trials[f"trial {trial.number:04d}"]
        params = {param["key"]: param["value"] for param in each["data"]["params"]}
        assert float(params["train.lr"]) == trial.params["train.lr"]
        assert int(params["unet.depth"]) == trial.params["unet.depth"]
        metrics = {metric["key"]: metric["value"] for metric in each["data"]["metrics"]}
        assert metrics["cv/dice_mean"] == pytest.approx(trial.value, abs=1e-12)
        assert len([key for key in metrics if key.startswith("fold")]) == 16
        assert each["info"]["status"] == "FINISHED"


def test_each_metric_step_is_there_once_at_its_recorded_time(project: ProjectPaths, address: str) -> None:
    run_id = runs(address)["trial 0000"]["info"]["run_id"]
    history = ask(address, f"metrics/get-history?run_id={run_id}&metric_key=fold1/dice")["metrics"]
    rows = [json.loads(line) for line in project.study("tiny").trial(0).fold(1).epochs.read_text().splitlines()]
    assert [int(point["step"]) for point in history] == [1, 2]
    assert [int(point["timestamp"]) for point in history] == [round(row["time"] * 1000) for row in rows]
    assert [point["value"] for point in history] == [row["held_out"]["dice"] for row in rows]


def test_the_study_is_the_parent_and_the_final_a_child(address: str) -> None:
    found = runs(address)
    tags = {name: {tag["key"]: tag["value"] for tag in each["data"]["tags"]} for name, each in found.items()}
    parents = [name for name, each in tags.items() if "mlflow.parentRunId" not in each]
    assert len(parents) == 1
    parent = found[parents[0]]["info"]["run_id"]
    assert {each["mlflow.parentRunId"] for name, each in tags.items() if name != parents[0]} == {parent}
    final = next(each for name, each in found.items() if name.startswith("final"))
    keys = {metric["key"] for metric in final["data"]["metrics"]}
    assert {"test/dice", "test/jaccard", "test/official/dice"} <= keys


def test_curves_panels_and_scores_are_artifacts_that_can_be_opened(address: str) -> None:
    run_id = runs(address)["trial 0000"]["info"]["run_id"]
    files = {file["path"] for file in ask(address, f"artifacts/list?run_id={run_id}")["files"]}
    assert {"curves.png", "panels.png", "scores.csv", "trial.toml", "folds.json"} <= files
    with urllib.request.urlopen(f"{address}/get-artifact?run_uuid={run_id}&path=curves.png", timeout=60) as answer:
        assert answer.read(8) == b"\x89PNG\r\n\x1a\n"


def test_a_deleted_database_is_rebuilt_from_the_record(project: ProjectPaths, tmp_path: Path) -> None:
    moved = ProjectPaths(tmp_path / "moved")
    shutil.copytree(project.root, moved.root)
    moved.mlflow_db.unlink()
    tracker = make_tracker(moved)
    tracker.catch_up(moved.study("tiny"), stopped=True)
    assert tracker.undelivered(moved.study("tiny")) == 0
    with closing(sqlite3.connect(moved.mlflow_db)) as database:
        names = {name for (name,) in database.execute("SELECT name FROM runs")}
    assert {"trial 0000", "trial 0001", "trial 0002"} < names
