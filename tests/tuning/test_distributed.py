"""Several coordinators on one study: a real PostgreSQL, a real MLflow server on it, and whatever may die."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from hpsearch.paths import ProjectPaths
from hpsearch.tuning import chains, coordinators
from hpsearch.tuning.record import StudyRecord
from tests.servers import MlflowServer, Postgres
from tests.tuning.studies import SETTINGS, run, tiny_config, write_tiny_dataset

SPACE = (
    # Wide enough for a repeated suggestion, which would be drawn again, to be out of the question.
    "search.train.lr={low=0.0001, high=0.3, log=true}",
    "search.unet.depth=[1, 2]",
    "search.unet.base_channels=[2, 3, 4]",
    "search.augment.hflip={low=0.0, high=1.0}",
    "search.train.momentum={low=0.0, high=0.95}",
)
N_TRIALS = 24
HEARTBEAT_S, GRACE_S = 1, 8


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def alone(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> StudyRecord:
    """The same study on one machine."""
    return run(tmp_path_factory.mktemp("alone"), tiny_config(dataset, *overrides())).record


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with Postgres() as server:
        yield server


def overrides() -> list[str]:
    return [*SPACE, "study.sampler=random", "study.pruner=none", f"study.trials={N_TRIALS}", "train.epochs=2"]


class Machines:
    """Coordinators as one starts them, a process each."""

    def __init__(self, project: Path, dataset: Path, storage: str, tracking: str) -> None:
        self._project = project
        project.mkdir(parents=True, exist_ok=True)
        settings = [setting for setting in (*SETTINGS, *overrides()) if not setting.startswith("search.")]
        settings += SPACE
        self._command = [sys.executable, "-m", "hpsearch", "study", "--study", "tiny", "--out", str(project)]
        self._command += ["--data", str(dataset), "--storage", storage, "--tracking", tracking, "--workers", "1"]
        self._command += ["--threads", "1", "--heartbeat", str(HEARTBEAT_S), "--grace", str(GRACE_S)]
        self._command += [f"--set={setting}" for setting in settings]
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> subprocess.Popen[bytes]:
        with (self._project / f"output{len(self.processes)}.log").open("wb") as log:
            process = subprocess.Popen(self._command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self.processes.append(process)
        return process

    def __enter__(self) -> Machines:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()

    def output(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self._project.glob("output*.log")))[-6000:]


def values(record: StudyRecord) -> dict[int, Any]:
    """Params and value of every configuration that was finished, by its place among the suggestions."""
    found: dict[int, Any] = {}
    for trial in record.trials():
        if trial.outcome != "lost":
            assert trial.outcome == "full", trial
            assert trial.place not in found, f"configuration {trial.place} was finished twice"
            found[trial.place] = (trial.params, trial.value)
    return found


def check_database(storage: str) -> list[optuna.trial.FrozenTrial]:
    trials = optuna.load_study(study_name="tiny", storage=storage).get_trials()
    states = [chain.state for chain in chains.chains(trials)]
    assert states.count("counted") == N_TRIALS
    assert "open" not in states
    assert not [trial.number for trial in trials if trial.state == optuna.trial.TrialState.RUNNING]
    for chain in chains.chains(trials):
        assert sum(map(chains.is_told, chain.members)) <= 1
    return trials


def finished_runs(tracking: str) -> Counter[str]:
    """How many finished runs MLflow has of each trial that ended full, and one for the study."""
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=tracking)
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], max_results=1000)
    studies = [each for each in found if "hpsearch.trial" not in each.data.tags]
    assert len(studies) == 1
    assert studies[0].info.status == "FINISHED"
    assert {each.data.tags["mlflow.parentRunId"] for each in found if each not in studies} == {studies[0].info.run_id}
    per_trial = Counter(each.data.tags["hpsearch.trial"] for each in found if each not in studies)
    assert set(per_trial.values()) == {1}, per_trial
    return Counter(each.data.tags["outcome"] for each in found if each not in studies)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_three_machines_finish_a_study_as_one_does(
    dataset: Path, alone: StudyRecord, postgres: Postgres, tmp_path: Path
) -> None:
    storage = postgres.create("calm-optuna")
    with (
        MlflowServer(tmp_path / "mlflow", postgres.create("calm-mlflow")) as mlflow,
        Machines(tmp_path / "project", dataset, storage, mlflow.address) as machines,
    ):
        for _ in range(3):
            machines.start()
        assert [process.wait(500) for process in machines.processes] == [0, 0, 0], machines.output()
        record = StudyRecord.open(ProjectPaths(tmp_path / "project").study("tiny"))
        assert values(record) == values(alone)
        assert len(check_database(storage)) == N_TRIALS
        assert finished_runs(mlflow.address) == {"full": N_TRIALS}
    states = coordinators.states(record.paths)
    assert sum(state.n_trials for state in states) == N_TRIALS
    assert all(state.left_at is not None and state.undelivered == 0 for state in states)
    assert "secret" not in "".join(path.read_text() for path in record.paths.root.rglob("*.log"))
