"""What all tests share: one thread, quiet libraries, and property tests that do not depend on the clock."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Read by the libraries when they are loaded. Two threads on a shared core make tiny networks many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# As in an activated environment: messages name programs by their path if they are not on PATH.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"

import hypothesis
import pytest

hypothesis.settings.register_profile(
    "hpsearch",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("hpsearch")


@pytest.fixture(scope="session", autouse=True)
def own_state_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test writes into the user's account of looks at test sets."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="session")
def empty_mlflow_db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs, to be copied into a project as `mlflow.db`: making one takes seconds."""
    from hpsearch.paths import ProjectPaths
    from hpsearch.tracking import mlflow_server

    project = ProjectPaths(tmp_path_factory.mktemp("mlflow"))
    mlflow_server.import_mlflow()
    mlflow_server.create_database(project)
    return project.mlflow_db


@pytest.fixture
def quick_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures that are drawn in no time: for tests of where they go."""
    draw_quickly(monkeypatch)


def draw_quickly(patch: pytest.MonkeyPatch) -> None:
    from hpsearch.report import figures

    patch.setattr(figures, "to_bytes", lambda figure: b"a figure")
    patch.setattr(figures, "draw_curves", lambda points, title: None)
    patch.setattr(figures, "draw_panels", lambda cases, metric, title: None)
