from __future__ import annotations

import contextlib
import gc
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import dask
import pytest
from distributed import LocalCluster

from hpsearch.errors import WorkerError
from hpsearch.workers import dask_connection, dask_pool, dask_workers
from hpsearch.workers.dask_pool import DaskPool
from hpsearch.workers.jobs import Failed, Finished, Ready, WorkerSettings
from hpsearch.workers.local_pool import LocalPool, LocalWorker
from hpsearch.workers.loop import run_job
from tests.search.in_process import workers_in_process
from tests.workers.dask_cluster import DaskCluster, free_port, wait_until
from tests.workers.pool_contract import NOTHING, ONE, PoolContract, wait_for

OpenPool = Callable[[], DaskPool]


@contextmanager
def pools(address: str, folder: Path, **options: Any) -> Iterator[OpenPool]:
    """A function that opens a pool; all of them close with the block."""
    probe = folder / "holder.json"
    probe.write_text("the coordinator")

    def open_pool() -> DaskPool:
        # A client that could not connect closes when it is collected. If that happens while Dask starts another event
        # loop, Dask waits for itself.
        gc.collect()
        defaults: dict[str, Any] = {"device": "auto", "limit": 0, "timeout_s": 30.0}
        defaults |= {"check": lambda: None, "say": lambda text: None}
        return stack.enter_context(DaskPool(address, probe, **{**defaults, **options}))

    with contextlib.ExitStack() as stack:
        yield open_pool


async def find_device(name: str, dask_worker: Any) -> dict[str, Any]:
    """A device that needs no import of torch."""
    capacity = {"device": "cpu", "precision": "float32", "memory_bytes": 2**36}
    return {"host": "lab", "device_name": "AMD EPYC", "unit": "lab", "threads": 1, "capacity": capacity}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalCluster]:
    """Three Dask workers in the test's own process, whose worker processes are threads."""
    monkeypatch.setattr(dask_workers, "find_device", find_device)
    with (
        workers_in_process(),
        LocalCluster(n_workers=3, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0") as cluster,
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
def test_a_process_has_the_environment_of_one_on_this_machine(dask_processes: DaskCluster, tmp_path: Path) -> None:
    with pools(dask_processes.address, tmp_path) as open_pool:
        pool = open_pool()
        pool.resize((WorkerSettings("cpu", 3),))
        wait_for(pool, Ready)
        environment = dask_processes.worker_processes()[0].environ()
    assert environment["OMP_NUM_THREADS"] == "3"
    assert "MALLOC_TRIM_THRESHOLD_" not in environment


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


@pytest.mark.slow
def test_the_job_of_a_dask_worker_that_restarted_at_the_same_address_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dask starts the same task again, before the pool sees that the Dask worker was gone."""
    options = ("--no-nanny", "--worker-port", free_port())
    with DaskCluster(tmp_path) as cluster:
        dask_worker = cluster.add_worker(*options)
        with pools(cluster.address, tmp_path) as open_pool:
            pool = open_pool()
            monkeypatch.setattr(dask_connection, "FOLLOW_S", 30.0)
            pool.resize(ONE)
            before = wait_for(pool, Ready).worker
            dask_worker.kill()
            dask_worker.wait()
            cluster.add_worker(*options)
            assert wait_for(pool, Failed).worker is before
            assert wait_for(pool, Ready).worker is not before
            assert run_job(pool, NOTHING) == Finished()


def test_the_pool_knows_the_threads_of_each_machine(open_pool: OpenPool) -> None:
    assert [machine.threads for machine in open_pool().machines.values()] == [1, 1, 1]


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
        before = {*pool.machines}
        cluster.scale(4)
        wait_until(lambda: [*pool.events(0.1)] == [] and len(cluster.workers) == 4)
        time.sleep(2 * dask_connection.FOLLOW_S)
        assert [*pool.events(0.1)] == []
        assert (len(pool), {*pool.machines}) == (1, before)


def test_a_dask_worker_that_leaves_is_replaced_by_a_free_one(open_pool: OpenPool, cluster: LocalCluster) -> None:
    pool = open_pool()
    pool.resize(ONE)
    before = wait_for(pool, Ready).worker
    (name,) = [name for name, worker in cluster.workers.items() if worker.address == before.address]
    cluster.sync(cluster.workers[name].close)
    event = wait_for(pool, Failed)
    assert (event.worker, event.report) == (
        before,
        Failed(error="died", text=f"{before.name} is lost: it is no longer connected"),
    )
    after = wait_for(pool, Ready).worker
    assert (after.index, after.address != before.address) == (0, True)
    assert run_job(pool, NOTHING) == Finished()


def test_no_dask_worker_is_lost_while_the_client_updates_its_own_list(
    open_pool: OpenPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dask's client regularly asks for a list without workers, and stores it where `scheduler_info` reads."""
    with dask.config.set({"distributed.client.scheduler-info-interval": "1ms"}):
        pool = open_pool()
    pool.resize(ONE * 3)
    monkeypatch.setattr(dask_connection, "FOLLOW_S", 0.0)
    until = time.monotonic() + 2.0
    while time.monotonic() < until:
        assert [event for event in pool.events(0.0) if isinstance(event.report, Failed)] == []


def mine(version: str, theirs: str) -> Callable[[], str]:
    """A function that returns one version here and another one in Dask's threads."""
    return lambda: version if is_ours() else theirs


def is_ours() -> bool:
    """Whether the pool calls this function, and not a Dask worker."""
    return threading.current_thread().name in ("MainThread", "examine")


def test_another_version_on_a_worker_is_named(open_pool: OpenPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dask_workers.VERSIONS, "torch", mine("2.15.0", "2.14.0+cpu"))
    with pytest.raises(WorkerError, match=r"^Dask worker \S+ has torch 2\.14\.0\+cpu, this machine has torch 2\.15"):
        open_pool()


def test_a_program_that_a_worker_does_not_have_is_named(open_pool: OpenPool, monkeypatch: pytest.MonkeyPatch) -> None:
    def version() -> str:
        if is_ours():
            return "0.1.0"
        raise metadata.PackageNotFoundError("hpsearch")

    monkeypatch.setitem(dask_workers.VERSIONS, "hpsearch", version)
    with pytest.raises(
        WorkerError, match=r"^Dask worker \S+ has no hpsearch, this machine has hpsearch 0\.1\.0: install"
    ):
        open_pool()


def test_the_table_of_versions_that_dask_shows_is_left_out(
    open_pool: OpenPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = {"warning": "a table of all packages", "error": ""}
    monkeypatch.setattr("distributed.versions.error_message", lambda *_, **__: table)
    open_pool()


def test_the_build_of_torch_may_differ(open_pool: OpenPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dask_workers.VERSIONS, "torch", mine("2.15.0+cpu", "2.15.0+cu130"))
    open_pool()


def test_a_worker_that_joins_with_another_version_is_not_used(
    open_pool: OpenPool,
    cluster: LocalCluster,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pool = open_pool()
    pool.resize(ONE * 3)
    monkeypatch.setitem(dask_workers.VERSIONS, "Python", mine("3.12", "3.11"))
    cluster.scale(4)
    wait_until(lambda: [*pool.events(0.1)] == [] and len(pool.idle()) == 3 and "it is not used" in caplog.text)
    assert (len(pool), len(pool.machines)) == (3, 3)
    assert run_job(pool, NOTHING) == Finished()
    (text,) = [each for each in caplog.messages if "it is not used" in each]
    assert "has Python 3.11, this machine has Python 3.12: install the same version" in text


def test_a_worker_that_does_not_see_the_project_is_named(
    open_pool: OpenPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, probe = Path.read_text, tmp_path / "holder.json"

    def read_elsewhere(path: Path, encoding: str | None = None) -> str:
        if path == probe and not is_ours():
            raise FileNotFoundError(path)
        return read(path, encoding)

    monkeypatch.setattr(Path, "read_text", read_elsewhere)
    with pytest.raises(WorkerError, match=f"does not see the project folder: it has another {probe}, or none. Mount"):
        open_pool()


def test_a_worker_that_cannot_start_its_process_is_not_used_and_the_last_one_ends_the_run(
    open_pool: OpenPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: LocalPool, index: int, settings: WorkerSettings) -> LocalWorker:
        raise WorkerError("worker 0 did not start (no driver)")

    # Undone here: the fixture `cluster` ends before `monkeypatch`, which would restore the method of the fixture.
    with monkeypatch.context() as patch:
        patch.setattr(LocalPool, "_start", fail)
        pool = open_pool()
        pool.resize(ONE * 3)
        for _ in range(2):
            report = wait_for(pool, Failed).report
            assert isinstance(report, Failed)
            assert re.fullmatch(r"lab:\S+ cannot be started: worker 0 did not start \(no driver\)", report.text)
        with pytest.raises(WorkerError, match=r"^worker 0 did not start \(no driver\)$"):
            wait_for(pool, Failed)


def test_a_cluster_that_is_not_there_is_named(tmp_path: Path) -> None:
    with (
        pools("tcp://127.0.0.1:9", tmp_path, timeout_s=0.0) as open_pool,
        pytest.raises(
            WorkerError, match=r"^--cluster tcp://127.0.0.1:9 has had no workers for 0 s \(.*start `dask s"
        ),
    ):
        open_pool()


@contextmanager
def server(answer: bytes) -> Iterator[str]:
    """The address of a server that accepts connections, sends this answer and nothing else."""
    connections = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connections.append(connection := listener.accept()[0])
                    connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        # Wake up the thread.
        listener.shutdown(socket.SHUT_RDWR)
    for connection in connections:
        connection.close()


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-OpenSSH_9.2\r\n", bytes(64)])
def test_a_server_that_is_no_scheduler_is_named(answer: bytes, tmp_path: Path) -> None:
    """Dask's dashboard, for example, waits for the end of the request."""
    expected = r"has had no workers for 0 s \(.* perhaps it is the address of Dask's dashboard"
    with (
        server(answer) as address,
        pools(address, tmp_path, timeout_s=0.3) as open_pool,
        pytest.raises(WorkerError, match=expected),
    ):
        open_pool()


def tls(file: str) -> dict[str, str]:
    """A TLS configuration of Dask in which certificate and key are `file`."""
    return {f"distributed.comm.tls.{name}": file for name in ("ca-file", "client.cert", "client.key")}


@pytest.mark.parametrize(
    ("address", "settings", "reason"),
    [
        ("tls://127.0.0.1:9", {}, "TLS expects"),
        ("tls://127.0.0.1:9", tls("no.pem"), "No such file"),
        ("tls://127.0.0.1:9", tls(__file__), "no certificate"),
        ("tcp://127.0.0.1:9", {"distributed.comm.require-encryption": True}, "encryption required"),
    ],
)
def test_a_cluster_that_dask_may_not_connect_to_is_refused_at_once(
    address: str, settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    expected = rf"^--cluster {address} cannot be used \(.*{reason}.*\): check distributed\.comm\.tls"
    with (
        dask.config.set(settings),
        pools(address, tmp_path) as open_pool,
        pytest.raises(WorkerError, match=expected),
    ):
        open_pool()


def test_a_wait_for_a_cluster_is_said_at_once_and_only_once(tmp_path: Path) -> None:
    said: list[str] = []
    began = time.monotonic()

    def check() -> None:
        assert said or time.monotonic() - began < 4 * dask_connection.FIRST_CONNECT_S

    with (
        pools("tcp://127.0.0.1:9", tmp_path, check=check, say=said.append, timeout_s=6.0) as open_pool,
        pytest.raises(WorkerError),
    ):
        open_pool()
    (line,) = said
    assert line.startswith("waiting up to 6 s for the Dask cluster tcp://127.0.0.1:9: no scheduler answers there")


def test_waiting_for_a_cluster_can_be_stopped(tmp_path: Path) -> None:
    def check() -> None:
        raise InterruptedError

    with pools("tcp://127.0.0.1:9", tmp_path, check=check) as open_pool, pytest.raises(InterruptedError):
        open_pool()


@pytest.mark.slow
def test_a_dask_worker_that_is_suspended_when_the_pool_opens_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dask_workers, "ANSWER_S", 1.0)
    with DaskCluster(tmp_path, 2) as cluster, pools(cluster.address, tmp_path) as open_pool:
        address, pid = next(iter(cluster.workers().items()))
        os.kill(pid, signal.SIGSTOP)
        pool = open_pool()
        pool.resize(ONE * 2)
        assert wait_for(pool, Ready).worker.address != address
        assert run_job(pool, NOTHING) == Finished()
        assert len(pool) == 1
        assert f"Dask worker {address.rpartition('/')[2]} does not answer; it is not used" in caplog.messages
        pool.close()
        os.kill(pid, signal.SIGCONT)


@pytest.mark.slow
def test_a_scheduler_that_is_suspended_ends_the_run_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dask_connection, "SCHEDULER_S", 1.0)
    monkeypatch.setattr(dask_pool, "END_S", 1.0)
    said: list[str] = []
    with (
        DaskCluster(tmp_path, 1) as cluster,
        pools(cluster.address, tmp_path, say=said.append, timeout_s=3.0) as open_pool,
    ):
        pool = open_pool()
        pool.resize(ONE)
        wait_for(pool, Ready)
        cluster.scheduler.send_signal(signal.SIGSTOP)
        with pytest.raises(WorkerError, match=r"has had no workers for 3 s \(its scheduler does not answer\)"):
            wait_for(pool, Failed)
        pool.close()
        cluster.scheduler.send_signal(signal.SIGCONT)
    assert said == [f"waiting up to 3 s for the Dask cluster {cluster.address}: its scheduler does not answer"]


@pytest.mark.slow
def test_a_cluster_on_which_no_dask_worker_answers_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_workers, "ANSWER_S", 0.5)
    with DaskCluster(tmp_path, 1) as cluster, pools(cluster.address, tmp_path, timeout_s=2.0) as open_pool:
        (pid,) = cluster.workers().values()
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(
            WorkerError, match=r"has had no workers for 2 s \(the scheduler has no Dask worker that answers\)"
        ):
            open_pool()
        os.kill(pid, signal.SIGCONT)
