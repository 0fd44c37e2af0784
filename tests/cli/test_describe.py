from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from hpsearch.cli.describe import (
    describe_machine,
    describe_params,
    mlflow_command,
    next_command,
    program,
    tracker_of_existing,
)
from hpsearch.paths import ProjectPaths
from hpsearch.workers.jobs import Capacity, ClusterWorker, WorkerSettings
from hpsearch.workers.plan import ExecutionPlan


@pytest.fixture
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment that is not activated, below the current folder."""
    folder = tmp_path / "my env" / "bin"
    folder.mkdir(parents=True)
    for name in ("hpsearch", "mlflow"):
        (folder / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [str(folder / "hpsearch"), "study"])
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_program_that_is_not_on_path_is_named_by_its_path(installation: Path) -> None:
    project = ProjectPaths(Path())
    assert next_command("final --best", "a", project) == f"'{installation}/hpsearch' final --best --study a"
    assert mlflow_command(project) == f"'{installation}/mlflow' ui"
    assert mlflow_command(ProjectPaths("out")) == f"cd out && '{installation}/mlflow' ui"
    assert program("another") == "another"


def test_a_program_on_path_is_named_by_its_name(installation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(installation))
    assert program() == "hpsearch"
    assert mlflow_command(ProjectPaths(Path())) == "mlflow ui"


def test_params_are_named_without_their_section() -> None:
    assert describe_params({"unet.depth": 3, "train.lr": 0.01234, "data.size": (64, 48)}) == (
        "depth=3 lr=0.0123 size=64x48"
    )


def test_a_cluster_is_described_by_its_hosts() -> None:
    capacity = Capacity(device="cpu", precision="bf16", memory_bytes=2**30)
    of_worker = {"device_name": "AMD EPYC", "unit": "a host", "threads": 8, "capacity": capacity}
    cluster = tuple(ClusterWorker(address=f"tcp://{n}", host=f"lab{n % 2}", **of_worker) for n in range(3))
    plan = ExecutionPlan(device="cpu", precision="bf16", workers=(WorkerSettings("cpu", 8),) * 3, memory_bytes=2**30)
    assert describe_machine(dataclasses.replace(plan, machine={"device_name": "a CPU"})).startswith("on a CPU, bf16")
    on_cluster = dataclasses.replace(plan, cluster=cluster)
    assert describe_machine(on_cluster) == "on 2 hosts (AMD EPYC), bf16, 3 workers x 8 threads"


def test_a_project_without_mlflow_is_logged_only_if_tracking_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    project = ProjectPaths(tmp_path)
    assert tracker_of_existing(project, None) is None
    assert capsys.readouterr().out.startswith("not logged to MLflow, because this project is not tracked")
    assert tracker_of_existing(project, "none") is None
    assert tracker_of_existing(project, f"sqlite:///{tmp_path}/other.db") is not None
    project.mlflow_db.touch()
    assert tracker_of_existing(project, None) is not None
    assert capsys.readouterr().out == ""
