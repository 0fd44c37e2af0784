"""Coordinators of a shared study as one starts them, a process each; what may happen to them; what must be left."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import optuna
import psutil

from hpsearch.config import StudyConfig
from hpsearch.paths import ProjectPaths
from hpsearch.store.record import StudyRecord
from hpsearch.tuning import chains, coordinators
from tests.search.studies import tiny_config
from tests.servers import MlflowServer, Postgres

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
STALL_S = 900.0
"""A study in which no trial ends for so long is taken to hang, on a machine of any speed."""
NERVOUS = ("--heartbeat", str(HEARTBEAT_S), "--grace", str(GRACE_S))
"""On a busy machine this takes the living for dead too, which must do no harm either."""


def config(dataset: Path) -> StudyConfig:
    """24 tiny trials by random search, which any number of machines must do alike."""
    return tiny_config(
        dataset, *SPACE, "study.sampler=random", "study.pruner=none", f"study.trials={N_TRIALS}", "train.epochs=15"
    )


class Machines:
    """Processes that run the same command on one project folder. Use as a context manager."""

    def __init__(self, project: Path, dataset: Path, storage: str, tracking: str, *sharing: str) -> None:
        """`sharing` are the flags that say who is taken for dead."""
        self._project = project
        project.mkdir(parents=True, exist_ok=True)
        settings = project / "tiny.toml"
        settings.write_text(config(dataset).to_toml(), encoding="utf-8")
        self._command = [sys.executable, "-m", "hpsearch", "study", "--config", str(settings), "--out", str(project)]
        self._command += ["--storage", storage, "--tracking", tracking, "--workers", "1", "--threads", "1"]
        self._command += ["--device", "cpu", *sharing]
        self.processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Machines:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()

    @property
    def record(self) -> StudyRecord:
        return StudyRecord.open(ProjectPaths(self._project).study("tiny"))

    def start(self) -> subprocess.Popen[bytes]:
        with (self._project / f"output{len(self.processes)}.log").open("wb") as log:
            process = subprocess.Popen(self._command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self.processes.append(process)
        return process

    def living(self) -> list[subprocess.Popen[bytes]]:
        return [process for process in self.processes if process.poll() is None]

    def are_at_work(self) -> bool:
        """Whether one has been in touch with the database, as that of a first start must be there."""
        study = ProjectPaths(self._project).study("tiny")
        return any(state.beat_at is not None for state in coordinators.states(study))

    def n_ended(self) -> int:
        """Trials that have ended, as far as the folder tells."""
        with contextlib.suppress(Exception):
            return sum(trial.outcome not in (None, "lost") for trial in self.record.trials())
        return 0

    def output(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self._project.glob("output*.log")))[-6000:]


def disturb(
    machines: Machines,
    postgres: Postgres,
    mlflow: MlflowServer,
    *,
    n_kills: int,
    rng: random.Random,
    n_machines: int = 3,
    say: Callable[[str], None] = lambda text: None,
) -> Counter[str]:
    """Run the study on so many machines to its end, while they are killed and replaced, one is suspended for longer
    than the grace period, and both servers crash twice. What happens goes by the trials that have ended, so that it
    happens on a machine of any speed.
    """
    happened: Counter[str] = Counter()
    events = ["kill"] * n_kills + ["stop", "postgres", "postgres", "mlflow", "mlflow"]
    rng.shuffle(events)
    # Over the first two thirds: what is caused takes its time, and meanwhile the study goes on.
    due = [N_TRIALS * 2 * (place + 1) // (3 * len(events)) for place in range(len(events))]
    locks = {"postgres": threading.Lock(), "mlflow": threading.Lock()}
    under_way: list[Future[None]] = []
    with ThreadPoolExecutor() as background:
        for _ in range(n_machines):
            machines.start()
        moved_at, moved_to = time.monotonic(), 0
        while machines.living():
            assert time.monotonic() - moved_at < STALL_S, machines.output()
            for process in machines.processes:
                assert process.poll() in (None, 0, -signal.SIGKILL), machines.output()
            if (n_ended := machines.n_ended()) != moved_to:
                moved_at, moved_to = time.monotonic(), n_ended
            while len(machines.living()) < n_machines and n_ended < N_TRIALS:
                machines.start()
            while events and machines.are_at_work() and due[sum(happened.values())] <= n_ended + 1:
                event = events.pop()
                say(f"{n_ended:3d} trials ended: {event}")
                happened[event] += 1
                if event in locks:
                    server = postgres if event == "postgres" else mlflow
                    under_way.append(background.submit(_restart, server, locks[event]))
                elif living := machines.living():
                    # Any of them, those that are only just starting too.
                    process = rng.choice(living)
                    if event == "stop":
                        under_way.append(background.submit(_suspend, process.pid))
                    else:
                        process.kill()
            time.sleep(rng.uniform(0.05, 0.2))
    for each in under_way:
        each.result()
    # What a server lacked that was away at the very end, the next start delivers.
    assert machines.start().wait(STALL_S) == 0, machines.output()
    return happened


def _restart(server: Postgres | MlflowServer, lock: threading.Lock) -> None:
    with lock:
        server.stop()
        time.sleep(2)
        server.start()


def _suspend(pid: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
        for number, pause in ((signal.SIGSTOP, GRACE_S + 3 * HEARTBEAT_S), (signal.SIGCONT, 0)):
            for each in family:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each, number)
            time.sleep(pause)


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
    """All trials of the database, where each configuration has ended once and nothing runs."""
    opened = optuna.storages.RDBStorage(storage)
    trials = optuna.load_study(study_name="tiny", storage=opened).get_trials()
    opened.remove_session()
    opened.engine.dispose()
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
