"""A study on record in a project that has an MLflow database."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recorded import FakeStudy
from tests.tracking.tracked import make_study


@pytest.fixture(autouse=True)
def no_address_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def study(tmp_path: Path, empty_mlflow_db: Path, quick_figures: None) -> FakeStudy:
    """An empty study in a project that has a database."""
    return make_study(tmp_path / "project", empty_mlflow_db)
