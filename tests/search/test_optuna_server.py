"""Optuna's view in a real PostgreSQL database."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

from hpsearch.errors import StorageError
from hpsearch.paths import ProjectPaths
from hpsearch.search.optuna_view import OptunaView, sqlite_url
from tests.recorded import FakeStudy
from tests.search.studies import tiny_config, write_tiny_dataset
from tests.servers import PASSWORD, Postgres

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with Postgres() as server:
        yield server


@pytest.fixture
def url(server: Postgres, tmp_path: Path) -> str:
    return server.create(tmp_path.name)


def shown(url: str, study: str = "fake") -> list[tuple[object, ...]]:
    """State, value and intermediate values of each trial in the database."""
    storage = optuna.storages.RDBStorage(url)
    trials = storage.get_all_trials(storage.get_study_id_from_name(study))
    storage.engine.dispose()
    return [
        (trial.state, trial.value, trial.params, trial.distributions, trial.intermediate_values, trial.user_attrs)
        for trial in trials
    ]


def test_postgresql_has_the_trials_of_hpsearch_db_also_after_a_restart(
    server: Postgres, url: str, tmp_path: Path
) -> None:
    study = FakeStudy(tmp_path)
    for outcome in ("complete", "pruned", "infeasible", "diverged"):
        study.trial(outcome)  # type: ignore[arg-type]
    view = OptunaView(study.record.paths, url)
    begun = study.begin()
    view.update()
    assert not study.project.optuna_db.exists()
    study.fold(begun, 0)
    study.fold(begun, 1)
    study.end(begun)
    server.stop()
    with pytest.raises(StorageError, match=r"^postgresql\+psycopg://\*\*\*@127\.0.* Connection refused") as raised:
        view.update()
    assert PASSWORD not in str(raised.value)
    assert view.n_behind() == 1
    server.start()
    view.update()
    OptunaView(study.record.paths).update()
    assert shown(url) == shown(sqlite_url(study.project.optuna_db))
    assert len(shown(url)) == 5


def test_a_study_whose_server_is_down_is_complete_and_track_fills_the_database(
    server: Postgres, url: str, tmp_path: Path
) -> None:
    config = tiny_config(write_tiny_dataset(tmp_path), "study.folds=2")
    (tmp_path / "tiny.toml").write_text(config.to_toml())
    project = tmp_path / "project"

    def hpsearch(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "hpsearch", *arguments, "--out", str(project), "--storage", url]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    server.stop()
    study = ("study", "--config", "tiny.toml", "--device", "cpu", "--workers", "1", "--threads", "1")
    done = hpsearch(*study)
    assert done.returncode == 0
    (note,) = [line for line in done.stdout.splitlines() if "Optuna's database" in line]
    assert "Connection refused" in note
    assert "Update it with `hpsearch track` (and the same --storage)" in note
    missed = hpsearch("track")
    assert (missed.returncode, len(missed.stderr.splitlines())) == (1, 1)
    server.start()
    filled = hpsearch("track")
    assert (filled.returncode, filled.stderr) == (0, "")
    assert not (project / "hpsearch.db").exists()
    OptunaView(ProjectPaths(project).study("tiny")).update()
    assert shown(url, "tiny") == shown(sqlite_url(project / "hpsearch.db"), "tiny")
    assert len(shown(url, "tiny")) == config.study.trials
    texts = [done.stdout, done.stderr, missed.stderr, filled.stdout]
    files = [path for path in project.rglob("*") if path.is_file()]
    assert {project / "mlflow.db", project / "studies/tiny/study.log"} <= set(files)
    assert not [path for path in files if PASSWORD.encode() in path.read_bytes()]
    assert not [text for text in texts if PASSWORD in text]
