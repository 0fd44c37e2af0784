"""Dask workers with different devices: what the pool finds out about them, and which of them it uses."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from distributed import LocalCluster

from hpsearch.errors import WorkerError
from hpsearch.workers import dask_connection, dask_workers
from hpsearch.workers.dask_pool import DaskPool
from hpsearch.workers.jobs import Capacity, Ready, WorkerSettings
from tests.search.in_process import workers_in_process
from tests.workers.dask_cluster import wait_until
from tests.workers.pool_contract import ONE, wait_for
from tests.workers.test_dask_pool import pools

GIB = 2**30
FOUND: dict[str, Any] = {"host": "lab", "device_name": "a device", "unit": "lab", "threads": 1}


def capacity(device: str = "cpu", gib: int = 64) -> dict[str, Any]:
    return {"device": device, "precision": "bf16", "memory_bytes": gib * GIB}


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> dict[object, dict[str, Any]]:
    """What is found on the Dask worker of each name."""
    found: dict[object, dict[str, Any]] = {name: {**FOUND, "capacity": capacity()} for name in range(4)}

    async def find_device(name: str, dask_worker: Any) -> dict[str, Any]:
        device = found[dask_worker.name]
        if name not in ("auto", "cpu", device["capacity"]["device"]):
            raise WorkerError(f"device {name} is not there")
        return {**device, "capacity": capacity()} if name == "cpu" else device

    monkeypatch.setattr(dask_workers, "find_device", find_device)
    return found


def local_cluster(n_workers: int, **options: Any) -> LocalCluster:
    options = {"threads_per_worker": 1, "processes": False, "dashboard_address": ":0", **options}
    return LocalCluster(n_workers=n_workers, **options)


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    """Two Dask workers without a memory limit."""
    with workers_in_process(), local_cluster(2, memory_limit=0) as cluster:
        yield cluster


def capacities(pool: DaskPool) -> list[Capacity]:
    return [machine.capacity for machine in pool.machines.values() if machine.is_connected]


def test_dask_workers_on_one_host_share_its_memory(
    cluster: LocalCluster, found: dict[object, dict[str, Any]], tmp_path: Any
) -> None:
    with pools(cluster.scheduler_address, tmp_path) as open_pool:
        pool = open_pool()
        assert capacities(pool) == [Capacity(**capacity(gib=32))] * 2
        pool.resize(ONE)
        cluster.scale(4)
        wait_until(lambda: [*pool.events(0.1)] != [None] and capacities(pool) == [Capacity(**capacity(gib=16))] * 4)
        # Workers that are running know it, too.
        wait_until(lambda: [*pool.events(0.1)] != [None] and len(pool.idle()) == 3)
        assert {worker.capacity for worker in pool.idle()} == {Capacity(**capacity(gib=16))}


def test_the_memory_limit_of_a_dask_worker_on_the_cpu_counts(
    found: dict[object, dict[str, Any]], tmp_path: Any
) -> None:
    found[1]["capacity"] = capacity(gib=2)
    found[1]["unit"] = "another host"
    with (
        local_cluster(2, memory_limit=3 * GIB + 7) as cluster,
        pools(cluster.scheduler_address, tmp_path) as open_pool,
    ):
        assert [each.memory_bytes for each in capacities(open_pool())] == [3 * GIB, 2 * GIB]


def test_two_dask_workers_share_a_gpu_and_another_one_has_its_own(
    found: dict[object, dict[str, Any]], tmp_path: Any
) -> None:
    for name, unit in enumerate(("GPU-0", "GPU-0", "GPU-1")):
        found[name] = {**FOUND, "unit": unit, "capacity": capacity("cuda", 40)}
    with (
        local_cluster(3, memory_limit=GIB) as cluster,
        pools(cluster.scheduler_address, tmp_path) as open_pool,
    ):
        assert [each.memory_bytes for each in capacities(open_pool())] == [20 * GIB, 20 * GIB, 40 * GIB]


@pytest.mark.parametrize(("device", "names"), [("auto", {1}), ("cpu", {0, 1})])
def test_gpus_are_used_alone_unless_all_workers_compute_on_the_cpu(
    cluster: LocalCluster, found: dict[object, dict[str, Any]], tmp_path: Any, device: str, names: set[int]
) -> None:
    found[1]["capacity"] = capacity("cuda", 40)
    with pools(cluster.scheduler_address, tmp_path, device=device) as open_pool:
        used = open_pool().machines
        assert {name for name, each in cluster.workers.items() if each.address in used} == names


def test_a_worker_without_the_device_is_named(
    cluster: LocalCluster, found: dict[object, dict[str, Any]], tmp_path: Any
) -> None:
    found[1]["capacity"] = capacity("cuda", 40)
    with (
        pools(cluster.scheduler_address, tmp_path, device="cuda") as open_pool,
        pytest.raises(WorkerError, match=r"^Dask worker \S+: device cuda is not there$"),
    ):
        open_pool()


@pytest.mark.parametrize(
    ("declared", "requested"), [({}, {}), ({"GPU": 2}, {"GPU": 1}), ({"GPU": 0.5}, {"GPU": 0.5})]
)
def test_a_task_requests_the_gpu_that_its_dask_worker_declares(
    found: dict[object, dict[str, Any]], tmp_path: Any, declared: dict[str, float], requested: dict[str, float]
) -> None:
    found[0]["capacity"] = capacity("cuda", 40)
    with (
        workers_in_process(),
        local_cluster(1, resources=declared) as cluster,
        pools(cluster.scheduler_address, tmp_path) as open_pool,
    ):
        pool = open_pool()
        pool.resize(ONE)
        wait_for(pool, Ready)
        (task,) = [each for key, each in cluster.scheduler.tasks.items() if str(key).startswith("hpsearch-")]
        assert (task.resource_restrictions or {}) == requested


def test_the_largest_dask_workers_are_used_first(
    cluster: LocalCluster, found: dict[object, dict[str, Any]], tmp_path: Any
) -> None:
    found[1] = {**FOUND, "unit": "another host", "capacity": capacity(gib=65)}
    with pools(cluster.scheduler_address, tmp_path, limit=1) as open_pool:
        pool = open_pool()
        pool.resize((WorkerSettings("cpu", 1),))
        assert wait_for(pool, Ready).worker.capacity == Capacity(**capacity(gib=65))
        # The other one is not used, so nothing may be planned for it.
        assert len(pool.machines) == 1


def test_a_lost_dask_worker_is_remembered_for_the_timeout(
    cluster: LocalCluster, found: dict[object, dict[str, Any]], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dask_connection, "FOLLOW_S", 0.1)
    with pools(cluster.scheduler_address, tmp_path, timeout_s=3.0) as open_pool:
        pool = open_pool()
        pool.resize(ONE * 2)
        address = cluster.workers[1].address
        cluster.sync(cluster.workers[1].close)
        wait_until(lambda: [*pool.events(0.1)] != [None] and not pool.machines[address].is_connected)
        wait_until(lambda: [*pool.events(0.1)] != [None] and address not in pool.machines, 10.0)
        assert len(pool.machines) == 1


def test_connecting_can_be_stopped_while_a_dask_worker_does_not_answer(
    cluster: LocalCluster, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def find_device(name: str, dask_worker: Any) -> dict[str, Any]:
        await asyncio.sleep(60)
        return {}

    def is_asking() -> bool:
        return "examine" in {thread.name for thread in threading.enumerate()}

    def check() -> None:
        if is_asking():
            time.sleep(1.0)
            raise InterruptedError

    monkeypatch.setattr(dask_workers, "find_device", find_device)
    with pools(cluster.scheduler_address, tmp_path, check=check) as open_pool, pytest.raises(InterruptedError):
        open_pool()
    # The thread that asks ends with the connection.
    wait_until(lambda: not is_asking(), 10.0)
