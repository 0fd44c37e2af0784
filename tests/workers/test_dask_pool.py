from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from distributed import LocalCluster

from hpsearch.errors import WorkerError
from hpsearch.workers import dask_pool
from hpsearch.workers.dask_pool import DaskPool
from hpsearch.workers.dask_task import versions
from hpsearch.workers.jobs import Failed, Finished, Ready, WorkerSettings
from hpsearch.workers.loop import run_job
from tests.search.in_process import workers_in_process
from tests.workers.dask_cluster import DaskCluster, wait_until
from tests.workers.pool_contract import NOTHING, ONE, PoolContract, wait_for

OpenPool = Callable[[], DaskPool]


@contextmanager
def pools(address: str, folder: Path, **options: Any) -> Iterator[OpenPool]:
    """A function that opens a pool; all of them close with the block."""
    probe = folder / "holder.json"
    probe.write_text("the coordinator")
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(
            DaskPool(address, probe, **{"timeout_s": 30.0, "check": lambda: None, **options})
        )


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    """Three Dask workers in the test's own process, whose worker processes are threads."""
    with (
        workers_in_process(),
        LocalCluster(n_workers=3, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
    ):
        yield cluster


@pytest.fixture
def open_pool(cluster: LocalCluster, tmp_path: Path) -> Iterator[OpenPool]:
    with pools(cluster.scheduler_address, tmp_path) as open_pool:
        yield open_pool


class TestThreads(PoolContract):
    @pytest.fixture
    def pool(self, open_pool: OpenPool) -> DaskPool:
        return open_pool()


@pytest.fixture(scope="module")
def dask_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaskCluster]:
    with DaskCluster(tmp_path_factory.mktemp("dask"), 2) as cluster:
        yield cluster


@pytest.mark.slow
class TestProcesses(PoolContract):
    @pytest.fixture
    def pool(self, dask_processes: DaskCluster, tmp_path: Path) -> Iterator[DaskPool]:
        with pools(dask_processes.address, tmp_path) as open_pool:
            yield open_pool()


@pytest.mark.slow
def test_a_process_that_dies_gets_no_job_before_another_one_is_ready(
    dask_processes: DaskCluster, tmp_path: Path
) -> None:
    with pools(dask_processes.address, tmp_path) as open_pool:
        pool = open_pool()
        pool.resize(ONE)
        wait_for(pool, Ready)
        dask_processes.worker_processes()[0].kill()
        wait_for(pool, Failed)
        assert pool.idle() == []
        assert run_job(pool, NOTHING) == Finished()


def test_the_pool_knows_the_threads_of_each_machine(open_pool: OpenPool) -> None:
    assert [*open_pool().machines.values()] == [1, 1, 1]


def test_a_dask_worker_that_joins_is_another_worker(open_pool: OpenPool, cluster: LocalCluster) -> None:
    pool = open_pool()
    pool.resize((WorkerSettings("cpu", 2),))
    wait_for(pool, Ready)
    cluster.scale(4)
    assert wait_for(pool, Ready).worker.index == 1
    assert [worker.settings.threads for worker in pool.idle()] == [2, 2]


def test_a_dask_worker_that_joins_stays_free_beyond_the_limit(cluster: LocalCluster, tmp_path: Path) -> None:
    with pools(cluster.scheduler_address, tmp_path, limit=1) as open_pool:
        pool = open_pool()
        pool.resize(ONE)
        wait_for(pool, Ready)
        cluster.scale(4)
        wait_until(lambda: [*pool.events(0.1)] == [] and len(pool.machines) == 4)
        assert len(pool) == 1


def test_a_dask_worker_that_leaves_is_replaced_by_a_free_one(open_pool: OpenPool, cluster: LocalCluster) -> None:
    pool = open_pool()
    pool.resize(ONE)
    before = wait_for(pool, Ready).worker
    (name,) = [name for name, worker in cluster.workers.items() if worker.address == before.address]
    cluster.sync(cluster.workers[name].close)
    event = wait_for(pool, Failed)
    assert (event.worker, event.report) == (
        before,
        Failed(error="died", text=f"lost: Dask worker {before.address} cannot be reached"),
    )
    after = wait_for(pool, Ready).worker
    assert (after.index, after.address != before.address) == (0, True)
    assert run_job(pool, NOTHING) == Finished()


def test_another_version_on_a_worker_is_named(open_pool: OpenPool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = open_pool()
    monkeypatch.setattr(dask_pool, "versions", lambda: {**versions(), "torch": "0.4.1"})
    pool.resize(ONE)
    (address, *_), found = pool.machines, versions()["torch"]
    with pytest.raises(WorkerError) as error:
        wait_for(pool, Ready)
    assert str(error.value) == (
        f"Dask worker {address} has torch {found}, the coordinator has 0.4.1: "
        "install the same version on all machines"
    )


def test_a_worker_that_joins_with_another_version_is_not_used(
    open_pool: OpenPool, cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = open_pool()
    pool.resize(ONE * 3)
    wait_until(lambda: [*pool.events(0.1)] == [] and len(pool.idle()) == 3)
    monkeypatch.setattr(dask_pool, "versions", lambda: {**versions(), "python": "2.7"})
    cluster.scale(4)
    report = wait_for(pool, Failed).report
    assert isinstance(report, Failed)
    assert "refused: Dask worker" in report.text
    assert "the coordinator has 2.7" in report.text
    assert run_job(pool, NOTHING) == Finished()
    assert len(pool) == 3


@pytest.mark.parametrize("content", ["of another disk", None])
def test_a_worker_that_does_not_see_the_project_is_named(
    open_pool: OpenPool, tmp_path: Path, content: str | None
) -> None:
    pool, probe = open_pool(), tmp_path / "holder.json"
    probe.unlink()
    if content:
        probe.write_text(content)
    pool.resize(ONE)
    with pytest.raises(WorkerError, match=f"does not see the coordinator's {probe}: share the project folder"):
        wait_for(pool, Ready)


def test_a_cluster_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_pool, "CONNECT_S", 0.2)
    with (
        pools("tcp://127.0.0.1:9", tmp_path, timeout_s=0.0) as open_pool,
        pytest.raises(
            WorkerError, match=r"^--cluster tcp://127.0.0.1:9 has had no workers for 0 s \(.*start `dask s"
        ),
    ):
        open_pool()


def test_waiting_for_a_cluster_can_be_stopped(tmp_path: Path) -> None:
    def check() -> None:
        raise InterruptedError

    with pools("tcp://127.0.0.1:9", tmp_path, check=check) as open_pool, pytest.raises(InterruptedError):
        open_pool()
