"""Studies on a cluster whose workers have different amounts of memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import LocalCluster

from hpsearch.cli.status import _worker_rows
from hpsearch.config import StudyConfig
from hpsearch.errors import WorkerError
from hpsearch.paths import ProjectPaths
from hpsearch.report import tables
from hpsearch.report.rows import study_rows
from hpsearch.search.autotune import MachineChoice
from hpsearch.search.callbacks import StudyCallback
from hpsearch.search.status import StudyStatus, study_status
from hpsearch.store.record import StudyRecord
from hpsearch.training.rows import EpochRow
from hpsearch.typed_json import from_json
from hpsearch.workers import dask_connection, dask_workers
from hpsearch.workers.jobs import Capacity
from hpsearch.workers.plan import MEMORY_SHARE, ExecutionPlan, predicted_bytes
from tests.search.in_process import Watched, workers_in_process
from tests.search.studies import everything, run, tiny_config, write_tiny_dataset
from tests.workers.dask_cluster import wait_until

LARGE = 16
SETTINGS = (
    *("study.sampler=random", "study.pruner=none", "study.trials=4", "search.unet.depth=[1]"),
    f"search.unet.base_channels=[2, {LARGE}]",
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> StudyConfig:
    return tiny_config(write_tiny_dataset(tmp_path_factory.mktemp("data")), *SETTINGS)


def needed(config: StudyConfig, n_channels: int) -> int:
    capacity = Capacity(device="cpu", precision="float32", memory_bytes=0)
    return int(predicted_bytes(config.with_params({"unet.base_channels": n_channels}), capacity) / MEMORY_SHARE) + 1


@pytest.fixture
def watched() -> Iterator[Watched]:
    with workers_in_process() as watched:
        yield watched


@pytest.fixture
def cluster(watched: Watched, config: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalCluster]:
    """The Dask worker 0 has memory for small networks only, and the Dask worker 1 for all."""

    async def find_device(name: str, dask_worker: Any) -> dict[str, Any]:
        memory_bytes = needed(config, LARGE if dask_worker.name else 2)
        capacity = {"device": "cpu", "precision": "float32", "memory_bytes": memory_bytes}
        host = f"host{dask_worker.name}"
        return {"host": host, "device_name": "AMD EPYC", "unit": host, "threads": 1, "capacity": capacity}

    monkeypatch.setattr(dask_workers, "find_device", find_device)
    monkeypatch.setattr(dask_workers, "MEMORY_UNIT", 1)
    monkeypatch.setattr(dask_connection, "FOLLOW_S", 0.1)
    options: dict[str, Any] = {"processes": False, "dashboard_address": ":0", "memory_limit": 0}
    with LocalCluster(n_workers=2, threads_per_worker=1, **options) as cluster:
        yield cluster


class AtEpoch(StudyCallback):
    """Calls a function after an epoch that a condition selects, once."""

    def __init__(self, select: Callable[[int], bool], act: Callable[[], object]) -> None:
        self._select, self._act, self.is_done = select, act, False
        self.messages: list[str] = []
        self.n_connected: list[int] = []
        """Number of workers in each plan that was reported."""

    def epoch_ended(self, trial: int, fold: int, row: EpochRow) -> None:
        if not self.is_done and self._select(trial):
            self.is_done = True
            self._act()

    def replanned(self, plan: ExecutionPlan) -> None:
        self.n_connected.append(len(plan.workers))

    def message(self, text: str) -> None:
        self.messages.append(text)


def on(cluster: LocalCluster, timeout_s: float = 30.0) -> MachineChoice:
    return MachineChoice("cpu", 0, 1, cluster.scheduler_address, timeout_s)


def is_large(record: StudyRecord, number: int) -> bool:
    return bool(record.trial(number).params["unet.base_channels"] == LARGE)


def workers_of_large(record: StudyRecord) -> set[str]:
    trials = [trial for trial in record.trials() if trial.params["unet.base_channels"] == LARGE]
    return {name.partition(":")[0] for trial in trials for name in trial.workers.values()}


def test_a_trial_that_needs_the_larger_worker_runs_there_with_the_values_of_one_machine(
    cluster: LocalCluster, config: StudyConfig, tmp_path: Path
) -> None:
    record = run(tmp_path / "cluster", config, machine=on(cluster)).record
    assert workers_of_large(record) == {"host1"}
    assert {name for trial in record.trials() for name in trial.workers} == {"0", "1"}
    assert everything(record) == everything(run(tmp_path / "alone", config).record)
    plan = from_json(ExecutionPlan, record.plan() or {})
    memory = {worker.host: worker.capacity.memory_bytes for worker in plan.cluster}
    assert memory == {"host0": needed(config, 2), "host1": needed(config, LARGE)}

    table = tables.hosts(study_rows(record))
    assert table.head == ("host", "device", "workers", "fits", "images/s")
    assert [line[0] for line in table.lines] == ["host0", "host1"]
    assert sum(int(line[3]) for line in table.lines) == 8
    assert all(float(line[4]) > 0 and line[2] == "1" for line in table.lines)


def test_a_trial_that_fits_no_worker_is_infeasible_because_of_the_largest_one(
    cluster: LocalCluster, config: StudyConfig, tmp_path: Path
) -> None:
    larger = tiny_config(Path(config.data.root), *SETTINGS, f"search.unet.base_channels=[2, {LARGE}, 64]")
    trials = run(tmp_path, larger, machine=on(cluster)).record.trials()
    outcomes = {trial.params["unet.base_channels"]: trial.outcome for trial in trials}
    assert outcomes == {2: "complete", LARGE: "complete", 64: "infeasible"}
    (reason,) = {trial.reason for trial in trials if trial.outcome == "infeasible"}
    assert "the largest worker has 0.0 GiB" in reason


def test_a_trial_waits_for_a_worker_that_is_large_enough_and_ends_as_infeasible_after_the_timeout(
    cluster: LocalCluster, config: StudyConfig, tmp_path: Path
) -> None:
    record = StudyRecord(ProjectPaths(tmp_path).study("tiny"), config)

    def lose_the_larger() -> None:
        cluster.sync(cluster.workers[1].close)

    callback = AtEpoch(lambda number: is_large(record, number), lose_the_larger)
    ended = run(tmp_path, config, machine=on(cluster, 3.0), callback=callback).record
    outcomes = {trial.outcome for trial in ended.trials() if is_large(record, trial.number)}
    assert outcomes == {"infeasible"}
    assert callback.n_connected[0] == 1
    small = [trial.outcome for trial in ended.trials() if not is_large(record, trial.number)]
    assert small == ["complete"] * 4
    first = next(trial for trial in ended.trials() if trial.outcome == "infeasible")
    assert first.ended_at is not None
    assert first.ended_at - first.began_at > 3.0
    assert workers_of_large(ended) <= {"host1"}
    # While it waited, no worker was fitting it.
    assert first.failures.keys().isdisjoint(first.workers)


def test_the_workers_of_an_earlier_run_count_for_the_timeout(
    cluster: LocalCluster, config: StudyConfig, tmp_path: Path
) -> None:
    one = tiny_config(Path(config.data.root), *SETTINGS, "study.trials=1")
    record = run(tmp_path, one, machine=on(cluster)).record
    cluster.sync(cluster.workers[1].close)
    record.paths.holder.write_text("the coordinator")
    with on(cluster, 3.0).open_pool(record.paths, record, lambda: None, lambda text: None) as pool:
        assert {each.host: each.is_connected for each in pool.machines.values()} == {"host0": True, "host1": False}
        wait_until(lambda: [*pool.events(0.1)] != [None] and len(pool.machines) == 1, 10.0)


def test_a_lost_worker_that_comes_back_in_time_continues_its_trial(
    cluster: LocalCluster, config: StudyConfig, tmp_path: Path
) -> None:
    record = StudyRecord(ProjectPaths(tmp_path).study("tiny"), config)

    def replace_the_larger() -> None:
        cluster.sync(cluster.workers[1].close)
        cluster.scale(3)

    callback = AtEpoch(lambda number: is_large(record, number), replace_the_larger)
    ended = run(tmp_path, config, machine=on(cluster), callback=callback).record
    assert callback.is_done
    assert {trial.outcome for trial in ended.trials()} == {"complete"}
    assert workers_of_large(ended) == {"host1", "host2"} or workers_of_large(ended) == {"host2"}


def test_a_refit_that_fits_no_worker_ends_the_run_and_costs_the_trial_nothing(
    cluster: LocalCluster, config: StudyConfig, tmp_path: Path
) -> None:
    settings = (f"unet.base_channels={LARGE}", f"search.unet.base_channels=[{LARGE}]", "study.trials=2")
    two = tiny_config(Path(config.data.root), *SETTINGS, *settings, "study.confirm=2")
    record = StudyRecord(ProjectPaths(tmp_path).study("tiny"), two)
    lose = AtEpoch(
        lambda number: record.shortlist() is not None and is_large(record, number),
        lambda: cluster.sync(cluster.workers[1].close),
    )
    with pytest.raises(
        WorkerError, match=r"^the refit of trial \d needs about .* worker has .*: start a larger worker"
    ):
        run(tmp_path, two, machine=on(cluster, 3.0), callback=lose)
    assert {trial.outcome for trial in record.trials()} == {"complete"}
    assert not any(each.outcome for each in record.replicate_records() if is_large(record, each.trial))


def test_the_status_names_the_worker_of_each_fit_and_the_idle_ones(
    cluster: LocalCluster, config: StudyConfig, tmp_path: Path
) -> None:
    shown: list[StudyStatus] = []

    def look() -> None:
        shown.append(study_status(ProjectPaths(tmp_path), "tiny"))

    run(tmp_path, config, machine=on(cluster), callback=AtEpoch(lambda number: number == 0, look))
    (status,) = shown
    names = {worker.host: worker.name for worker in status.cluster}
    rows = {row[0].partition(" ")[0]: row[1:] for row in _worker_rows(status)}
    assert {*rows} == {*names.values()}
    (fit,) = [each for each in status.open_fits if each.trial == 0 and each.row is not None]
    row = rows[fit.worker]
    assert row[0] == f"trial 0, fold {fit.fold + 1} of 2, epoch 1 of 2"
    assert fit.row is not None
    assert row[1] == f"{fit.row.scores.dice:.4f}"
    assert row[2].endswith(" images/s")
    idle = dataclasses.replace(status, open_fits=())
    assert [row[1] for row in _worker_rows(idle)] == ["idle", "idle"]
    # After the study, no worker is connected.
    assert study_status(ProjectPaths(tmp_path), "tiny").cluster == ()


def test_the_status_of_one_machine_names_its_workers(config: StudyConfig, watched: Watched, tmp_path: Path) -> None:
    shown: list[StudyStatus] = []
    callback = AtEpoch(lambda number: number == 0, lambda: shown.append(study_status(ProjectPaths(tmp_path), "tiny")))
    record = run(tmp_path, config, callback=callback).record
    (row,) = _worker_rows(shown[0])
    assert row[:2] == ("worker 1", "trial 0, fold 1 of 2, epoch 1 of 2")
    assert tables.hosts(study_rows(record)).lines == []
