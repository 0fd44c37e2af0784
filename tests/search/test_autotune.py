from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from hpsearch.config import StudyConfig
from hpsearch.data.prepare import PoolCaches
from hpsearch.errors import ConfigError
from hpsearch.search import autotune as planning
from hpsearch.search.autotune import MachineChoice, choose_sharing, fastest_alone, make_plan, plan_for_one_fit
from hpsearch.store.record import StudyRecord
from hpsearch.typed_json import from_json, to_json
from hpsearch.workers import plan as plans
from hpsearch.workers.jobs import (
    Capacity,
    ClusterWorker,
    Failed,
    Finished,
    Job,
    MeasuredStep,
    MeasureJob,
    Measurement,
    Report,
    WorkerSettings,
)
from hpsearch.workers.local_pool import LocalPool
from hpsearch.workers.plan import ExecutionPlan
from tests.search.studies import run, tiny_config, write_tiny_dataset

GIB = 2**30


class FakeRecord:
    """As much of a study as a plan is made of."""

    def __init__(self, config: StudyConfig) -> None:
        self.config = config
        self.written: dict[str, Any] | None = None

    def plan(self) -> dict[str, Any] | None:
        return self.written

    def write_plan(self, plan: dict[str, Any]) -> None:
        self.written = plan


class FakeCaches:
    def paths(self, config: StudyConfig) -> tuple[Path, Path | None]:
        return Path("somewhere"), None


class FakePool(LocalPool):
    """Notes which workers were wanted; starts none."""

    def __init__(self) -> None:
        super().__init__(Path())
        self.wanted: list[list[WorkerSettings]] = []

    def resize(self, settings: Sequence[WorkerSettings]) -> None:
        self.wanted.append(list(settings))


class Machine:
    """Answers what is measured of a machine that does not exist."""

    def __init__(
        self,
        rates: Mapping[int | tuple[int, int], float],
        *,
        device: str = "cpu",
        n_devices: int = 1,
        memory_bytes: int = 64 * GIB,
    ) -> None:
        self.rates = rates
        self.step_s = 0.05
        self.found = Measurement(
            device=device,
            n_devices=n_devices,
            memory_bytes=memory_bytes,
            precision="bf16",
            steps=(MeasuredStep(10**9, 1e-3, 5e-4),),
            machine={"torch": "2.15"},
        )
        self.threads: list[tuple[int, int]] = []
        """Workers and threads per worker in the order in which they were watched."""

    def run_job(self, pool: LocalPool, job: Job, **_: Any) -> Finished:
        return Finished(measurement=self.found)

    def run_jobs_together(self, pool: LocalPool, jobs: Sequence[MeasureJob], check: object) -> list[Report]:
        if jobs[0].seconds == 0.0:
            return self._timed(self.step_s / jobs[0].steps[0].config.train.batch_size, len(jobs))
        self.threads.append((len(jobs), jobs[0].threads))
        rate = self.rates.get(self.threads[-1], self.rates.get(len(jobs)))
        if rate is None:
            return [Failed(error="OutOfMemoryError", text="too large")] * len(jobs)
        return self._timed(len(jobs) / rate, len(jobs))

    def _timed(self, image_s: float, n_workers: int) -> list[Report]:
        found = dataclasses.replace(self.found, steps=(MeasuredStep(10**9, image_s, image_s),))
        return [Finished(measurement=found)] * n_workers


MakePlan = Callable[..., tuple[ExecutionPlan, Machine]]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> MakePlan:
    """Makes the plan of a tiny study on a machine with so many cores."""

    def make(
        machine: Machine, choice: MachineChoice | None = None, *overrides: str, cores: int = 2
    ) -> tuple[ExecutionPlan, Machine]:
        monkeypatch.setattr(planning, "available_cores", lambda: cores)
        monkeypatch.setattr(planning, "run_job", machine.run_job)
        monkeypatch.setattr(planning, "run_jobs_together", machine.run_jobs_together)
        record = FakeRecord(tiny_config(Path("data"), *overrides))
        plan = make_plan(
            cast("StudyRecord", record), cast("PoolCaches", FakeCaches()), choice or MachineChoice(), FakePool()
        )
        assert record.written == to_json(plan)
        return plan, machine

    return make


def test_more_workers_must_be_worth_it() -> None:
    assert choose_sharing({(1, 4): 100.0, (2, 2): 110.0}) == 1
    assert choose_sharing({(1, 4): 100.0, (2, 2): 120.0}) == 2
    assert choose_sharing({(1, 4): 100.0, (2, 2): 120.0, (4, 1): 130.0}) == 2
    assert choose_sharing({(1, 4): 100.0, (2, 2): 110.0, (4, 1): 130.0}) == 4
    assert choose_sharing({}) == 1


def test_a_single_fit_gets_the_threads_that_one_worker_trained_fastest_with() -> None:
    assert fastest_alone({(1, 2): 3.0, (2, 1): 90.0}, 2) == 1
    assert fastest_alone({(1, 16): 100.0, (2, 8): 180.0, (4, 4): 250.0}, 16) == 16
    assert fastest_alone({(1, 2): 50.0, (1, 1): 50.0}, 2) == 2
    assert fastest_alone({}, 8) == 8


def test_two_workers_of_one_thread_replace_one_of_two_where_they_are_faster(planned: MakePlan) -> None:
    plan, machine = planned(Machine({1: 100.0, 2: 190.0}))
    assert plan.workers == (WorkerSettings("cpu", 1),) * 2
    assert machine.threads == [(1, 2), (2, 1)]
    assert plan.memory_bytes == 32 * GIB
    assert plan.machine["images_per_s"] == "1 x 2: 100.0, 2 x 1: 190.0"


def test_one_worker_stays_alone_where_two_are_no_faster(planned: MakePlan) -> None:
    plan, _ = planned(Machine({1: 180.0, 2: 190.0}))
    assert plan.workers == (WorkerSettings("cpu", 2),)
    assert plan.memory_bytes == 64 * GIB


def test_many_cores_are_shared_by_four_workers_at_most(planned: MakePlan) -> None:
    plan, machine = planned(Machine({1: 100.0, 2: 200.0, 4: 400.0}), cores=16)
    assert machine.threads == [(1, 16), (2, 8), (4, 4)]
    assert plan.workers == (WorkerSettings("cpu", 4),) * 4


def test_what_the_user_asks_for_is_not_measured(planned: MakePlan) -> None:
    plan, machine = planned(Machine({1: 9.0, 2: 1.0}), MachineChoice("cpu", 2, 1))
    assert plan.workers == (WorkerSettings("cpu", 1),) * 2
    assert plan.memory_bytes == 32 * GIB
    assert machine.threads == []


@pytest.mark.parametrize(("rates", "threads"), [({(1, 4): 1.0, (1, 2): 9.0, (1, 1): 8.0}, 2), ({(1, 4): 9.0}, 4)])
def test_the_threads_of_a_single_worker_are_measured(
    planned: MakePlan, rates: dict[int | tuple[int, int], float], threads: int
) -> None:
    plan, machine = planned(Machine(rates), MachineChoice("cpu", 1, 0), cores=4)
    assert machine.threads == [(1, 4), (1, 2), (1, 1)]
    assert plan.workers == (WorkerSettings("cpu", threads),)
    assert plan.alone == plan.workers[0]


def test_a_long_step_fills_the_device_by_itself(planned: MakePlan) -> None:
    machine = Machine({1: 1.0, 2: 9.0})
    machine.step_s = 5.0
    plan, _ = planned(machine)
    assert len(plan.workers) == 1
    assert machine.threads == []


def test_small_fits_share_each_gpu_while_they_fit_its_memory(planned: MakePlan) -> None:
    rates = {1: 100.0, 2: 190.0, 4: 350.0}
    plan, _ = planned(Machine(rates, device="cuda", n_devices=2), cores=16)
    assert [worker.device for worker in plan.workers] == ["cuda:0", "cuda:1"] * 4
    assert plan.memory_bytes == 16 * GIB
    config = tiny_config(Path("data"))
    one = max(plans.predicted_bytes(each, plan) for each in plans.measured_configs(config))
    little = int(3 * one / plans.MEMORY_SHARE)
    plan, _ = planned(Machine(rates, device="cuda", memory_bytes=little), cores=16)
    assert len(plan.workers) == 2


def test_workers_that_cannot_be_measured_are_not_used(planned: MakePlan) -> None:
    plan, machine = planned(Machine({1: 100.0, 2: 190.0}, device="cuda"), cores=8)
    assert machine.threads[-1] == (4, 2)
    assert len(plan.workers) == 2


def test_a_plan_without_a_measured_single_fit_gives_it_what_each_worker_gets() -> None:
    def alone(*workers: WorkerSettings, **measured: int) -> WorkerSettings:
        return ExecutionPlan(device="cpu", precision="bf16", workers=workers, memory_bytes=GIB, **measured).alone

    two = WorkerSettings("cuda:0", 3), WorkerSettings("cuda:1", 3)
    assert alone(*two) == two[0]
    assert alone(*two, alone_threads=6) == WorkerSettings("cuda:0", 6)
    assert alone(WorkerSettings("cpu", 1), alone_threads=6) == WorkerSettings("cpu", 1)


def test_a_stored_plan_keeps_its_threads_when_one_worker_is_wanted(planned: MakePlan) -> None:
    rates = {1: 3.0, 2: 90.0}
    stored, _ = planned(Machine(rates))
    assert stored.workers == (WorkerSettings("cpu", 1),) * 2
    record = FakeRecord(tiny_config(Path("data")))
    record.write_plan(to_json(stored))
    caches = cast("PoolCaches", FakeCaches())
    for choice in (MachineChoice("cpu", 1), MachineChoice("cpu", 2), MachineChoice()):
        plan = make_plan(cast("StudyRecord", record), caches, choice, FakePool())
        assert set(plan.workers) == {WorkerSettings("cpu", 1)}


def test_a_final_that_is_given_threads_leaves_the_studys_plan_as_it_is(planned: MakePlan) -> None:
    stored, _ = planned(Machine({1: 100.0, 2: 190.0}))
    record = FakeRecord(tiny_config(Path("data")))
    record.write_plan(to_json(stored))

    def workers_of(choice: MachineChoice) -> tuple[WorkerSettings, ...]:
        return plan_for_one_fit(
            cast("StudyRecord", record), cast("PoolCaches", FakeCaches()), choice, FakePool()
        ).workers

    assert workers_of(MachineChoice()) == (WorkerSettings("cpu", 2),)
    assert workers_of(MachineChoice(threads=3)) == (WorkerSettings("cpu", 3),)
    assert record.written == to_json(stored)


def cluster_of(*threads: int, device: str = "cpu") -> FakePool:
    pool = FakePool()
    capacity = Capacity(device=device, precision="bf16", memory_bytes=64 * GIB)
    for index, n in enumerate(threads):
        host, address = f"lab{index}", f"tcp://lab{index}:9000"
        worker: dict[str, Any] = {"address": address, "host": host, "device_name": "", "unit": host, "threads": n}
        pool.machines = {**pool.machines, address: ClusterWorker(**worker, capacity=capacity)}
    return pool


def test_each_machine_of_a_cluster_is_one_worker_and_all_have_the_same_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(planning, "run_job", Machine({}, device="cuda", n_devices=8).run_job)
    caches, pool = cast("PoolCaches", FakeCaches()), cluster_of(8, 4, 8, device="cuda")
    for choice, workers in (
        (MachineChoice(), (WorkerSettings("cuda", 4),) * 3),
        (MachineChoice(n_workers=2), (WorkerSettings("cuda", 4),) * 2),
        (MachineChoice(n_workers=9, threads=6), (WorkerSettings("cuda", 6),) * 3),
    ):
        record = FakeRecord(tiny_config(Path("data")))
        plan = make_plan(cast("StudyRecord", record), caches, choice, pool)
        assert plan.workers == workers
        # Workers on different machines do not share their memory.
        assert plan.memory_bytes == 64 * GIB
        assert plan.cluster == tuple(pool.machines.values())
    assert pool.wanted[0] == [WorkerSettings("cuda", 4)] * 3


def test_only_rates_that_were_measured_are_logged(planned: MakePlan, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    planned(Machine({}))
    assert "images per second" not in caplog.text
    planned(Machine({1: 3.0, 2: 90.0}))
    assert "images per second by workers x threads on a device: 1 x" in caplog.text


def test_a_stored_plan_keeps_its_threads_on_a_cluster(planned: MakePlan) -> None:
    stored, _ = planned(Machine({1: 3.0, 2: 90.0}))
    record = FakeRecord(tiny_config(Path("data")))
    record.write_plan(to_json(stored))
    caches, pool = cast("PoolCaches", FakeCaches()), cluster_of(8, 8, 8)
    plan = make_plan(cast("StudyRecord", record), caches, MachineChoice(), pool)
    assert plan.workers == (WorkerSettings("cpu", 1),) * 3
    assert plan.cluster == tuple(pool.machines.values())
    assert record.written == to_json(plan)


def test_one_machine_continues_a_study_of_a_cluster_with_one_worker_and_the_same_threads() -> None:
    record, pool = FakeRecord(tiny_config(Path("data"))), cluster_of(8, 8, 8)
    workers = (WorkerSettings("cpu", 8),) * 3
    plan = ExecutionPlan(device="cpu", precision="bf16", workers=workers, memory_bytes=GIB)
    record.write_plan(to_json(plan))
    caches, choice = cast("PoolCaches", FakeCaches()), MachineChoice(cluster="tcp://lab:8786")
    found = make_plan(cast("StudyRecord", record), caches, choice, pool)
    assert (found.workers, found.cluster, found.scheduler) == (workers, (*pool.machines.values(),), "tcp://lab:8786")
    found = make_plan(cast("StudyRecord", record), caches, MachineChoice(), FakePool())
    assert (found.workers, found.cluster, found.scheduler) == (workers[:1], (), "")


@pytest.mark.parametrize("address", ["tcp://lab:8786", "tls://10.0.0.1:1", "tcp://[fe80::1%eth0]:8786", "lab:8786"])
def test_the_address_of_a_scheduler_is_accepted(address: str) -> None:
    assert MachineChoice(cluster=address).cluster == address


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:8786x", "http://127.0.0.1:8787", "tcp://lab", "tcp://:8786", "tcp://lab:99999", "tcp://a:b@lab:8786"],
)
def test_another_address_is_refused(address: str) -> None:
    shown = address.replace("a:b@", "***@")
    with pytest.raises(ConfigError, match=f"^--cluster {re.escape(shown)}: expected an address such as tcp://"):
        MachineChoice(cluster=address)


def test_a_dask_worker_that_was_lost_gets_no_worker() -> None:
    record, pool = FakeRecord(tiny_config(Path("data"))), cluster_of(8, 8)
    lost = {address: dataclasses.replace(each, is_connected=False) for address, each in [*pool.machines.items()][:1]}
    pool.machines = {**pool.machines, **lost}
    plan = ExecutionPlan(device="cpu", precision="bf16", workers=(WorkerSettings("cpu", 8),) * 2, memory_bytes=GIB)
    record.write_plan(to_json(plan))
    found = make_plan(cast("StudyRecord", record), cast("PoolCaches", FakeCaches()), MachineChoice(), pool)
    assert (found.workers, len(found.cluster)) == ((WorkerSettings("cpu", 8),), 2)


@pytest.mark.slow
def test_a_study_measures_how_to_share_the_cores_and_keeps_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "available_cores", lambda: 2)
    config = tiny_config(write_tiny_dataset(tmp_path), "study.trials=1")
    summary = run(tmp_path, config, machine=MachineChoice())
    plan = from_json(ExecutionPlan, summary.record.plan() or {})
    assert plan.machine["images_per_s"].startswith("1 x 2: ")
    assert sum(worker.threads for worker in plan.workers) == 2
    assert summary.n_counted == 1
    more = run(tmp_path, tiny_config(tmp_path / "ISIC-2017", "study.trials=2"), machine=MachineChoice())
    assert more.record.plan() == summary.record.plan()
