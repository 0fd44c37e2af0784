"""Several coordinators on one study: a real PostgreSQL, a real MLflow server on it, and whatever may die."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpsearch.store.record import StudyRecord
from hpsearch.tuning import chains, coordinators
from tests.search.studies import run, write_tiny_dataset
from tests.servers import MlflowServer, Postgres
from tests.tuning.machines import N_TRIALS, NERVOUS, Machines, check_database, config, disturb, finished_runs, values


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def alone(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> StudyRecord:
    """The same study on one machine."""
    return run(tmp_path_factory.mktemp("alone"), config(dataset)).record


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with Postgres() as server:
        yield server


@pytest.mark.slow
@pytest.mark.timeout(1800)
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
        assert [process.wait(900) for process in machines.processes] == [0, 0, 0], machines.output()
        record = machines.record
        assert values(record) == values(alone)
        trials = check_database(storage)
        assert not any(chains.history(trial) for trial in trials)
        assert finished_runs(mlflow.address) == {"full": N_TRIALS}
    states = coordinators.states(record.paths)
    assert sum(state.n_trials for state in states) == N_TRIALS
    assert all(state.left_at is not None and state.undelivered == 0 for state in states)
    assert "secret" not in "".join(path.read_text() for path in record.paths.root.rglob("*.log"))


@pytest.mark.distributed
@pytest.mark.timeout(3600)
def test_kills_suspensions_and_crashed_servers_lose_nothing_and_finish_nothing_twice(
    dataset: Path, alone: StudyRecord, postgres: Postgres, tmp_path: Path
) -> None:
    storage = postgres.create("faults-optuna")
    with (
        MlflowServer(tmp_path / "mlflow", postgres.create("faults-mlflow")) as mlflow,
        Machines(tmp_path / "project", dataset, storage, mlflow.address, *NERVOUS) as machines,
    ):
        # The long form has more kills: `python benchmarks/distributed.py faults`.
        happened = disturb(machines, postgres, mlflow, n_kills=4, rng=random.Random(0))
        assert happened == {"kill": 4, "stop": 1, "postgres": 2, "mlflow": 2}
        assert values(machines.record) == values(alone)
        check_database(storage)
        assert finished_runs(mlflow.address)["full"] == N_TRIALS
