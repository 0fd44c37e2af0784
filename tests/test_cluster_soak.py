"""A study with real servers on a Dask cluster whose workers, scheduler and coordinator are killed many times."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import psutil
import pytest

from hpsearch.paths import ProjectPaths, StudyPaths
from hpsearch.search.optuna_view import OptunaView, sqlite_url
from hpsearch.store.record import StudyRecord
from hpsearch.tracking import MlflowTracker
from tests.search.studies import everything, run, tiny_config, write_tiny_dataset
from tests.servers import Postgres, mlflow_server
from tests.tracking.tracked import Run, read
from tests.workers.dask_cluster import DaskCluster, free_port, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SEED = 17
N_WORKERS, N_TRIALS, N_EPOCHS = 3, 6, 40
SETTINGS = ('study.sampler="random"', 'study.pruner="none"', f"study.trials={N_TRIALS}", f"train.epochs={N_EPOCHS}")
SUSPENDED_S = 60.0
EVENTS = {"kill worker": 12, "kill scheduler": 2, "kill coordinator": 2}


class Disturbances:
    """Kills and suspends parts of a cluster while a study runs on it."""

    def __init__(self, cluster: DaskCluster, study: StudyPaths, command: list[str], log: Path) -> None:
        self._cluster, self._study, self._command, self._log = cluster, study, command, log
        self._random = random.Random(SEED)
        self._suspended: list[psutil.Process] = []
        self._timer: threading.Timer | None = None
        self.coordinator = self._start_coordinator()

    def run(self) -> None:
        """Disturb the study at random epochs until all of `EVENTS` have happened."""
        events = [event for event, n in EVENTS.items() for _ in range(n)]
        self._random.shuffle(events)
        events.insert(0, "suspend worker")
        # One event in each of as many intervals of epochs, so that no fit is lost three times in one epoch.
        interval = N_TRIALS * 2 * N_EPOCHS * 0.9 / len(events)
        for place, event in enumerate(events):
            self._wait_for_epoch((place + self._random.random()) * interval)
            getattr(self, f"_{event.replace(' ', '_')}")()

    def close(self) -> None:
        self._resume()
        self.coordinator.kill()
        self.coordinator.wait()

    def _wait_for_epoch(self, n_epochs: float) -> None:
        def is_there() -> bool:
            assert self.coordinator.poll() is None, self._log.read_text()
            files = self._study.trials.glob("*/*/epochs.jsonl")
            return sum(path.read_bytes().count(b"\n") for path in files) >= n_epochs

        wait_until(is_there, 300.0)

    def _start_coordinator(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(self._command, stdout=log, stderr=log)

    def _victims(self) -> list[psutil.Process]:
        return [each for each in self._cluster.dask_workers() if each not in self._suspended]

    def _kill_worker(self) -> None:
        wait_until(self._victims)
        self._random.choice(self._victims()).kill()

    def _suspend_worker(self) -> None:
        """Suspend a Dask worker with its nanny and its processes, as if its machine were suspended."""
        nanny = self._random.choice(self._victims()).parent()
        assert nanny is not None
        self._suspended = [nanny, *nanny.children(recursive=True)]
        for each in self._suspended:
            each.suspend()
        self._timer = threading.Timer(SUSPENDED_S, self._resume)
        self._timer.start()

    def _resume(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for each in self._suspended:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.resume()

    def _kill_scheduler(self) -> None:
        self._cluster.kill_scheduler()
        time.sleep(self._random.uniform(0, 3))
        self._cluster.start_scheduler()
        # The Dask workers end with their scheduler.
        for _ in range(N_WORKERS):
            self._cluster.add_worker()

    def _kill_coordinator(self) -> None:
        self.coordinator.kill()
        self.coordinator.wait()
        self.coordinator = self._start_coordinator()


@pytest.fixture
def disturbed(tmp_path: Path) -> Iterator[tuple[Postgres, Disturbances, str]]:
    """A study that runs on a cluster and logs to `mlflow server` on PostgreSQL."""
    config = tiny_config(write_tiny_dataset(tmp_path), *SETTINGS)
    (tmp_path / "tiny.toml").write_text(config.to_toml())
    for name in ("dask", "mlflow"):
        (tmp_path / name).mkdir()
    with contextlib.ExitStack() as stack:
        postgres = stack.enter_context(Postgres())
        where = ("--backend-store-uri", postgres.create("mlflow"), "--artifacts-destination", str(tmp_path / "files"))
        uri = stack.enter_context(mlflow_server(tmp_path / "mlflow", free_port(), *where, "--workers", "1"))
        cluster = stack.enter_context(DaskCluster(tmp_path / "dask", N_WORKERS))
        command = [sys.executable, "-m", "hpsearch", "study", "--config", str(tmp_path / "tiny.toml")]
        command += ["--out", str(tmp_path / "project"), "--device", "cpu", "--threads", "1"]
        command += ["--tracking", uri, "--storage", postgres.create("optuna"), "--cluster", cluster.address]
        study = ProjectPaths(tmp_path / "project").study("tiny")
        disturbances = Disturbances(cluster, study, command, tmp_path / "output.log")
        stack.callback(disturbances.close)
        yield postgres, disturbances, uri


def test_a_study_is_exact_after_many_kills_of_workers_scheduler_and_coordinator(
    disturbed: tuple[Postgres, Disturbances, str], tmp_path: Path
) -> None:
    postgres, disturbances, uri = disturbed
    disturbances.run()
    wait_until(lambda: disturbances.coordinator.poll() is not None, 300.0)
    assert disturbances.coordinator.returncode == 0, (tmp_path / "output.log").read_text()
    wait_until(lambda: not processes_of(tmp_path))
    record = StudyRecord.open(ProjectPaths(tmp_path / "project").study("tiny"))
    alone = run(tmp_path / "alone", record.config).record
    assert everything(record) == everything(alone)
    assert [trial.outcome for trial in record.trials()] == ["complete"] * N_TRIALS
    assert not [*record.paths.root.rglob("attempt"), *record.paths.root.rglob("*.tmp")]
    assert "Traceback" not in record.paths.log.read_text() + (tmp_path / "output.log").read_text()
    assert_mlflow_is_exact(read(record.paths.project, "tiny", uri), record, tmp_path / "again")
    OptunaView(record.paths).update()
    assert optuna_values(postgres.url("optuna")) == optuna_values(sqlite_url(record.paths.project.optuna_db))


def processes_of(folder: Path) -> list[psutil.Process]:
    """The processes of hpsearch, on Dask workers of the cluster in `folder`, or left over from such workers."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_ours = process.environ().get("DASK_TEMPORARY_DIRECTORY", "").startswith(str(folder))
            if is_ours and any("hpsearch" in word for word in process.cmdline()[1:5]):
                found.append(process)
    return found


def assert_mlflow_is_exact(runs: dict[str, Run], record: StudyRecord, again: Path) -> None:
    """Check that there is one run per trial, and each metric once per step, with the values of the record."""
    assert set(runs) == {"tiny", *(f"trial {number:04d}" for number in range(N_TRIALS))}
    assert {(run.status, run.parent) for name, run in runs.items() if name != "tiny"} == {("FINISHED", "tiny")}
    values = {name: values_of(run) for name, run in runs.items()}
    for trial in record.trials():
        for fold in range(2):
            expected = {row.epoch: row.held_out.dice for row in record.fit(trial.number, fold).epochs()}
            assert values[f"trial {trial.number:04d}"][f"fold{fold}/dice"] == expected
    # Another MLflow, to which nothing but the finished record is logged.
    database = f"sqlite:///{again}.db"
    MlflowTracker(ProjectPaths(record.paths.project.root), database).view(record.paths).update(is_last=True)
    assert values == {name: values_of(run) for name, run in read(record.paths.project, "tiny", database).items()}


def values_of(run: Run) -> dict[str, dict[int, float]]:
    """Value of each metric at each step. No step may be there twice."""
    for key, points in run.metrics.items():
        assert len({step for step, _, _ in points}) == len(points), key
    return {key: {step: value for step, value, _ in points} for key, points in run.metrics.items()}


def optuna_values(url: str) -> list[tuple[object, ...]]:
    storage = optuna.storages.RDBStorage(url)
    trials = storage.get_all_trials(storage.get_study_id_from_name("tiny"))
    storage.engine.dispose()
    return [(trial.state, trial.value, trial.params, trial.intermediate_values) for trial in trials]
