"""Studies on a Dask cluster of real processes, which are killed and suspended."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import pytest
import yaml

from hpsearch.config import StudyConfig
from hpsearch.errors import WorkerError
from hpsearch.paths import ProjectPaths
from hpsearch.search import coordinator
from hpsearch.search.autotune import MachineChoice
from hpsearch.store.record import StudyRecord
from hpsearch.training.rows import EpochRow
from hpsearch.workers import dask_pool
from tests.search.studies import everything, run, tiny_config, write_tiny_dataset
from tests.workers.dask_cluster import DaskCluster, free_port, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SETTINGS = ('study.sampler="random"', 'study.pruner="none"', "study.trials=4", "train.epochs=4")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> StudyConfig:
    return tiny_config(write_tiny_dataset(tmp_path_factory.mktemp("data")), *SETTINGS)


@pytest.fixture(scope="module")
def alone(config: StudyConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Files and values of the same study on one machine with one worker."""
    return everything(run(tmp_path_factory.mktemp("alone"), config).record)


@pytest.fixture
def options() -> tuple[str, ...]:
    """Options of the Dask workers."""
    return ()


@pytest.fixture
def cluster(tmp_path: Path, options: tuple[str, ...]) -> Iterator[DaskCluster]:
    (tmp_path / "dask").mkdir()
    with DaskCluster(tmp_path / "dask", 3, *options) as cluster:
        yield cluster


def on(cluster: DaskCluster, timeout_s: float = 60.0) -> MachineChoice:
    return MachineChoice("cpu", 0, 1, cluster.address, timeout_s)


class AtEpochs:
    """A callback that does something after some epochs, counted over all fits."""

    def __init__(self, actions: dict[int, Callable[[], object]]) -> None:
        self.n_epochs, self._actions = 0, actions
        self.messages: list[str] = []

    def epoch_ended(self, number: int, fold: int, row: EpochRow) -> None:
        self.n_epochs += 1
        self._actions.get(self.n_epochs, lambda: None)()

    def message(self, text: str) -> None:
        self.messages.append(text)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


def test_three_workers_give_the_values_of_one_machine(
    cluster: DaskCluster, config: StudyConfig, alone: dict[str, Any], tmp_path: Path
) -> None:
    record = run(tmp_path, config, machine=on(cluster)).record
    assert everything(record) == alone
    plan = record.plan()
    assert plan is not None
    assert (len(plan["workers"]), {each["address"] for each in plan["cluster"]}) == (3, {*cluster.workers()})
    assert not [*record.paths.root.rglob("attempt"), *record.paths.root.rglob("*.tmp")]


def test_a_deterministic_race_gives_the_same_on_three_workers(
    cluster: DaskCluster, config: StudyConfig, tmp_path: Path
) -> None:
    raced = tiny_config(Path(config.data.root), "study.lookahead=4", "study.trials=8", "train.epochs=4")
    alone = everything(run(tmp_path / "alone", raced).record)
    assert everything(run(tmp_path / "cluster", raced, machine=on(cluster)).record) == alone
    assert any(outcome == "pruned" for _, outcome, *_ in alone["trials"].values())


def test_dask_workers_and_worker_processes_that_are_killed_cost_nothing_but_time(
    cluster: DaskCluster, config: StudyConfig, alone: dict[str, Any], tmp_path: Path
) -> None:
    def kill_dask_worker() -> None:
        os.kill(next(iter(cluster.workers().values())), signal.SIGKILL)

    def kill_process() -> None:
        cluster.worker_processes()[0].kill()

    kills = {2: kill_dask_worker, 5: kill_process, 9: kill_dask_worker, 15: kill_process}
    callback = AtEpochs(kills)
    record = run(tmp_path, config, machine=on(cluster), callback=callback).record
    assert everything(record) == alone
    assert sum("is no longer connected" in text for text in callback.messages) >= 1
    assert sum("killed by SIGKILL" in text for text in callback.messages) >= 1


@pytest.mark.parametrize("options", [(), ("--no-nanny",)])
def test_a_suspended_dask_worker_is_restarted_and_its_fit_continues_elsewhere(
    cluster: DaskCluster,
    config: StudyConfig,
    alone: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a nanny it is only removed. Its process waits for a reply meanwhile."""
    monkeypatch.setattr(coordinator, "SILENCE_MIN_S", 8.0)
    monkeypatch.setattr(coordinator, "SILENCE_FACTOR", 1.0)
    monkeypatch.setattr(dask_pool, "END_S", 2.0)
    suspended: list[int] = []

    def suspend() -> None:
        suspended.extend(cluster.workers().values())
        for pid in suspended[:2]:
            os.kill(pid, signal.SIGSTOP)

    callback = AtEpochs({3: suspend})
    record = run(tmp_path, config, machine=on(cluster), callback=callback).record
    assert everything(record) == alone
    assert sum("killed" in text for text in callback.messages) >= 1
    assert not set(suspended[:2]) & set(cluster.workers().values())


def test_a_study_survives_a_scheduler_that_is_restarted(
    cluster: DaskCluster, config: StudyConfig, alone: dict[str, Any], tmp_path: Path
) -> None:
    def restart() -> None:
        cluster.kill_scheduler()
        cluster.start_scheduler()
        # The Dask workers end with their scheduler.
        for _ in range(2):
            cluster.add_worker()

    record = run(tmp_path, config, machine=on(cluster), callback=AtEpochs({6: restart})).record
    assert everything(record) == alone


def test_a_study_whose_cluster_is_gone_ends_with_one_line_and_continues_on_one_machine(
    cluster: DaskCluster, config: StudyConfig, alone: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(WorkerError, match=r"has had no workers for 3 s .* run the same command again to continue"):
        run(tmp_path, config, machine=on(cluster, 3.0), callback=AtEpochs({6: cluster.kill_scheduler}))
    wait_until(lambda: not cluster.worker_processes())
    assert everything(run(tmp_path, config).record) == alone


def test_nothing_runs_after_the_coordinator_is_killed_and_the_same_command_continues(
    cluster: DaskCluster, config: StudyConfig, alone: dict[str, Any], tmp_path: Path
) -> None:
    toml = tmp_path / "tiny.toml"
    toml.write_text(config.to_toml())
    command = [sys.executable, "-m", "hpsearch", "study", "--config", str(toml), "--out", str(tmp_path)]
    command += ["--tracking", "none", "--cluster", cluster.address, "--device", "cpu", "--threads", "1"]
    study = ProjectPaths(tmp_path).study("tiny")
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
        wait_until(lambda: [*study.trials.glob("*/*/epochs.jsonl")] != [])
        process.kill()
    wait_until(lambda: not cluster.worker_processes(), 20.0)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert everything(StudyRecord.open(study)) == alone
    wait_until(lambda: not cluster.worker_processes(), 20.0)


def test_the_documented_cluster_on_one_machine_runs_a_study(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs/distributed.md").read_text().replace("8786", free_port())
    section = text.split("\n## Try it on one machine\n")[1].split("\n## ")[0]
    *servers, study = map(shlex.split, re.findall(r"^    (\S.*)$", section, re.MULTILINE))
    assert [server[:2] for server in servers] == [["dask", "scheduler"], ["dask", "worker"], ["dask", "worker"]]
    with contextlib.ExitStack() as stack:
        for server in servers:
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            process = stack.enter_context(subprocess.Popen(server, cwd=tmp_path, start_new_session=True, **quiet))
            stack.callback(os.killpg, process.pid, signal.SIGKILL)
        done = subprocess.run(
            [*study, "--tracking", "none"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    record = StudyRecord.open(ProjectPaths(tmp_path / "try-cluster").study("sample"))
    assert record.is_searched(record.trials())
    assert len((record.plan() or {})["cluster"]) >= 1


class EncryptionPage:
    """The section on encrypted connections of docs/distributed.md, with another folder in place of `/shared`."""

    def __init__(self, folder: Path) -> None:
        text = (Path(__file__).parents[1] / "docs/distributed.md").read_text().replace("/shared", str(folder))
        section = text.split("\n## Encrypted connections\n")[1].split("\n## ")[0]
        before, self.yaml, after = re.split(r"```(?:yaml)?\n", section)
        self.certificate, self.start = (
            "".join(re.findall(r"^    (.*\n)", part, re.MULTILINE)) for part in (before, after)
        )


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_the_documented_encrypted_cluster_runs_a_study_and_refuses_another_certificate(
    config: StudyConfig, alone: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = {name: EncryptionPage(tmp_path / name) for name in ("ours", "other")}
    for name, page in pages.items():
        (tmp_path / name).mkdir()
        subprocess.run(["bash", "-ec", page.certificate], check=True, capture_output=True)
        (tmp_path / name / "dask.yaml").write_text(page.yaml)
    assert "dask scheduler --protocol tls\ndask worker tls://" in pages["ours"].start
    (tmp_path / "tiny.toml").write_text(config.to_toml())
    monkeypatch.setenv("DASK_CONFIG", str(tmp_path / "ours" / "dask.yaml"))

    def study(**environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "hpsearch", "study", "--config", str(tmp_path / "tiny.toml")]
        command += ["--tracking", "none", "--cluster", cluster.address, "--device", "cpu", "--threads", "1"]
        settings = {**os.environ, **environment}
        return subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, check=False)

    reasons = {"nowhere.yaml": "TLS expects", "other/dask.yaml": "certificate does not match"}
    with (
        dask.config.set(dask.config.merge(dask.config.config, yaml.safe_load(pages["ours"].yaml))),
        DaskCluster(tmp_path / "ours", 2, protocol="tls") as cluster,
    ):
        assert all(address.startswith("tls://") for address in cluster.workers())
        for file, reason in reasons.items():
            refused = study(DASK_CONFIG=str(tmp_path / file))
            (line,) = refused.stderr.splitlines()
            assert refused.returncode == 1
            assert reason in line
            assert line.endswith(
                "check distributed.comm.tls in Dask's configuration, described in docs/distributed.md"
            )
        assert study().returncode == 0
    assert everything(StudyRecord.open(ProjectPaths(tmp_path).study("tiny"))) == alone
