"""What several machines on one study gain and cost: trials that only sleep, on a real PostgreSQL.

    python benchmarks/distributed.py speed --coordinators 1 2 4 8 --seconds 10   # trials an hour, against linear
    python benchmarks/distributed.py asking --trials 2000                        # ask and tell as the study grows
    python benchmarks/distributed.py faults --kills 12                           # killed, suspended, servers crashed

`speed` runs real coordinators whose workers sleep instead of training, and times from the moment when all are ready.
`asking` fills a study up and times ask and tell there, through a coordinator and as plain `study.optimize` does it.
`faults` runs real tiny trials and compares with a study on one machine that nobody disturbed.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import sqlalchemy
from optuna.storages._rdb import models

sys.path.insert(0, str(Path(__file__).parents[1]))

from hpsearch import config as configs
from hpsearch import paths
from hpsearch.paths import FitPaths, ProjectPaths
from hpsearch.search import coordinator as coordinating
from hpsearch.search.optuna_view import StudyDatabase
from hpsearch.search.samplers import distributions, suggest
from hpsearch.store.record import StudyRecord, TrialRecord, now
from hpsearch.tuning import coordinators, shared
from hpsearch.tuning.coordinators import Sharing
from hpsearch.tuning.shared_storage import open_storage, quiet
from hpsearch.workers.local_pool import Event
from hpsearch.workers.plan import ExecutionPlan, WorkerSettings
from tests.servers import MlflowServer, Postgres

NAME = "sleeping"


def main() -> int:
    """Run one of the three, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    speed = commands.add_parser("speed")
    speed.add_argument("--coordinators", type=int, nargs="+", default=[1, 2, 4, 8])
    speed.add_argument("--seconds", type=float, default=10.0)
    speed.add_argument("--rounds", type=int, default=3, help="trials a coordinator")
    asking = commands.add_parser("asking")
    asking.add_argument("--trials", type=int, default=2000)
    asking.add_argument("--sampler", choices=["tpe", "random"], default="tpe")
    faults = commands.add_parser("faults")
    faults.add_argument("--kills", type=int, default=12)
    faults.add_argument("--seed", type=int, default=0)
    member = commands.add_parser("member")
    member.add_argument("project", type=Path)
    member.add_argument("url")
    member.add_argument("seconds", type=float)
    options = parser.parse_args()
    match options.command:
        case "speed":
            return measure_speed(options.coordinators, options.seconds, options.rounds)
        case "asking":
            return measure_asking(options.trials, options.sampler)
        case "faults":
            return measure_faults(options.kills, options.seed)
        case _:
            return run_member(options.project, options.url, options.seconds)


def study_config(n_trials: int, sampler: str = "tpe") -> configs.StudyConfig:
    """Six settings to search, as in the shipped studies; two folds of one epoch."""
    settings = [
        f"study.trials={n_trials}",
        f"study.sampler={sampler}",
        "study.pruner=none",
        "study.folds=2",
        "study.confirm=0",
        "train.epochs=1",
        "search.unet.base_channels=[8, 16, 32, 64]",
        "search.unet.depth={low=2, high=5}",
        "search.unet.stacking={low=1, high=3}",
        "search.train.lr={low=0.0001, high=0.1, log=true}",
        "search.train.batch_size=[4, 8, 16, 32]",
        'search.data.color=["rgb", "grayscale"]',
    ]
    return configs.load(None, settings)


# Speed


def measure_speed(counts: list[int], seconds: float, rounds: int) -> int:
    """Trials that sleep so long, so many a coordinator; the share of linear, from all ready to the last told."""
    print(f"{'coordinators':>12} {'trials':>6} {'seconds':>8} {'ideal':>7} {'of linear':>9} {'CPU ms a trial':>14}")
    with Postgres() as server:
        for count in counts:
            url = server.create(f"speed{count}")
            with tempfile.TemporaryDirectory(prefix="hpsearch-distributed-") as folder:
                spent, cpu_s = sleep_together(Path(folder), url, count, seconds, rounds)
            ideal = rounds * seconds
            per_trial = f"{1000 * cpu_s / (count * rounds):14.0f}"
            print(
                f"{count:12d} {count * rounds:6d} {spent:8.2f} {ideal:7.1f} {ideal / spent:9.1%} {per_trial}",
                flush=True,
            )
    return 0


def sleep_together(project: Path, url: str, count: int, seconds: float, rounds: int) -> tuple[float, float]:
    """Seconds from the moment when all coordinators are ready until the last trial was told; those of the processor
    that all coordinators used in between, the database's not counted.
    """
    make_study(project, count * rounds)
    command = [sys.executable, __file__, "member", str(project), url, str(seconds)]
    members = [subprocess.Popen(command) for _ in range(count)]
    ready = [project / f"ready-{member.pid}" for member in members]
    while not all(path.is_file() for path in ready):
        if any(member.poll() not in (None, 0) for member in members):
            raise RuntimeError("a coordinator did not start")
        time.sleep(0.05)
    began = time.time()
    (project / "go").touch()
    for member in members:
        if member.wait() != 0:
            raise RuntimeError("a coordinator failed")
    storage = optuna.storages.RDBStorage(url)
    trials = optuna.load_study(study_name=NAME, storage=storage).get_trials()
    complete = [trial for trial in trials if trial.state == optuna.trial.TrialState.COMPLETE]
    if len(complete) != count * rounds:
        raise RuntimeError(f"{len(complete)} trials were told, not {count * rounds}")
    spent = max(trial.datetime_complete.timestamp() for trial in complete if trial.datetime_complete) - began
    return spent, sum(float(path.read_text()) for path in project.glob("spent-*"))


def make_study(project: Path, n_trials: int, sampler: str = "tpe") -> StudyRecord:
    """A study with all that is made once: settings, folds, plan."""
    from hpsearch.data.folds import Folds

    record = StudyRecord.create(ProjectPaths(project).study(NAME), study_config(n_trials, sampler))
    ids = tuple(f"image{number}" for number in range(4))
    record.write_folds(Folds(ids, (0, 0, 1, 1), k=2, seed=0, method="kfold"), "made up")
    coordinators.write_sharing(record.paths, Sharing(), "a server", now())
    return record


def run_member(project: Path, url: str, seconds: float) -> int:
    """One coordinator whose only worker sleeps."""
    record = StudyRecord.open(ProjectPaths(project).study(NAME))
    seat = shared.SharedSeat(record.paths, url, None)
    plan = ExecutionPlan(device="cpu", precision="float32", workers=(WorkerSettings(),), memory_bytes=2**40)
    with seat.trials(record) as ownership:
        workers = SleepingWorkers(seconds, record.n_folds)
        loop = coordinating.Coordinator(
            record,
            ownership,
            plan,
            _NoCaches(),  # type: ignore[arg-type]
            coordinating.Silent(),
            None,
            coordinating.Stop(),
            math.inf,
        )
        (project / f"ready-{os.getpid()}").touch()
        while not (project / "go").exists():
            time.sleep(0.01)
        began = time.process_time()
        loop.run(workers)  # type: ignore[arg-type]
        (project / f"spent-{os.getpid()}").write_text(str(time.process_time() - began))
    return 0


class _NoCaches:
    """Of a study that reads no images."""

    def job(self, config: configs.StudyConfig) -> dict[str, Any]:
        return {}


@dataclass(eq=False)
class _Sleeper:
    index: int = 0
    job: dict[str, Any] | None = None
    wakes_at: float = 0.0
    heard_at: float = 0.0


class SleepingWorkers:
    """Stands in for `Workers`: its one worker sleeps for a fold's share of the time and leaves what a fit leaves."""

    def __init__(self, seconds: float, n_folds: int) -> None:
        self._fold_s = seconds / n_folds
        self._worker = _Sleeper()

    def idle(self) -> list[_Sleeper]:
        return [] if self._worker.job else [self._worker]

    def busy(self) -> list[_Sleeper]:
        return [self._worker] if self._worker.job else []

    def submit(self, worker: _Sleeper, job: Mapping[str, Any]) -> None:
        worker.job = dict(job)
        worker.wakes_at = time.monotonic() + self._fold_s
        worker.heard_at = time.monotonic()

    def reply(self, worker: _Sleeper, *, go: bool) -> None:
        pass

    def kill(self, worker: _Sleeper) -> None:
        worker.job = None

    def events(self, timeout_s: float) -> Iterator[Event]:
        worker = self._worker
        left = worker.wakes_at - time.monotonic() if worker.job else timeout_s
        time.sleep(max(0.0, min(left, timeout_s)))
        if worker.job is None or time.monotonic() < worker.wakes_at:
            return
        job, worker.job = worker.job, None
        fit = FitPaths(Path(job["folder"]))
        fit.root.mkdir(parents=True, exist_ok=True)
        for path, array in ((fit.scores, np.full((1, 2), 0.5, np.float32)), (fit.counts, np.ones((2, 4), np.int64))):
            with paths.atomic_write(path) as temporary, temporary.open("wb") as file:
                np.save(file, array)
        paths.write_json(fit.fit, {"value": 0.5})
        yield Event(worker, "finished", job, {"summary": {"value": 0.5}})  # type: ignore[arg-type]


# Asking


@dataclass(frozen=True)
class Cost:
    """Of one ask or tell."""

    seconds: float
    cpu_s: float
    """Of this process; the database has its own."""
    n_statements: int

    def __str__(self) -> str:
        return f"{1000 * self.seconds:8.1f} {1000 * self.cpu_s:6.1f} {self.n_statements:4d}"


class Meter:
    """What was spent since it was last read."""

    def __init__(self) -> None:
        self._last = Cost(time.perf_counter(), time.process_time(), 0)
        self._n_statements = 0
        sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", self._count)

    def read(self) -> Cost:
        before, self._last = self._last, Cost(time.perf_counter(), time.process_time(), self._n_statements)
        return Cost(
            self._last.seconds - before.seconds,
            self._last.cpu_s - before.cpu_s,
            self._last.n_statements - before.n_statements,
        )

    def _count(self, *_: Any) -> None:
        self._n_statements += 1


def measure_asking(n_trials: int, sampler: str) -> int:
    """Cost of ask and tell in a study of so many trials, ours and plain Optuna's, the median of ten each."""
    names = ("ask", "tell", "plain ask", "plain tell")
    print(f"{'trials':>6} " + " | ".join(f"{name:>20}" for name in names))
    print(f"{'':6} " + " | ".join(f"{'ms':>8} {'CPU':>6} {'SQL':>4}" for _ in names) + f"   sampler {sampler}")
    meter = Meter()
    with Postgres() as server, tempfile.TemporaryDirectory(prefix="hpsearch-distributed-") as folder:
        ours = _Ours(Path(folder), server.create("ours"), n_trials + 100, sampler)
        plain = _Plain(ours.record, server.create("plain"))
        for size in [size for size in (0, 100, 250, 500, 1000, 2000, 5000) if size <= n_trials]:
            ours.fill(size)
            plain.fill(size)
            costs = [[*ours.cost_of_one(meter), *plain.cost_of_one(meter)] for _ in range(10)]
            print(f"{size:6d} " + " | ".join(str(_median(each)) for each in zip(*costs, strict=True)), flush=True)
        ours.shared.close()
    return 0


def _median(costs: Sequence[Cost]) -> Cost:
    seconds, cpu_s = statistics.median(c.seconds for c in costs), statistics.median(c.cpu_s for c in costs)
    return Cost(seconds, cpu_s, round(statistics.median(c.n_statements for c in costs)))


class _Ours:
    """A coordinator's side, without its thread in between: what it costs, not when it comes."""

    def __init__(self, project: Path, url: str, n_trials: int, sampler: str) -> None:
        self.record = make_study(project, n_trials, sampler)
        with quiet():
            storage = open_storage(url, Sharing())
            self._database = StudyDatabase(self.record, storage)
        folder = coordinators.new_folder(self.record.paths)
        self.shared = shared.Shared(self.record, self._database, storage, Sharing(), folder)
        self.shared._closing = True
        with self.shared._lock:
            self.shared._lock.notify_all()
        self.shared._thread.join()
        self.shared._closing = False
        self._rng = random.Random(0)

    def fill(self, size: int) -> None:
        fill(self._database.optuna_study, self.record, size, self._rng, owner="somebody")

    def cost_of_one(self, meter: Meter) -> tuple[Cost, Cost]:
        with quiet():
            meter.read()
            self.shared._is_wanted = True
            self.shared._round()
            asking = meter.read()
            asked = self.shared._box.popleft()
            trial = TrialRecord(
                number=asked.number,
                params=asked.params,
                config={},
                began_at=now(),
                outcome="full",
                value=self._rng.random(),
                ended_at=now(),
            )
            meter.read()
            self.shared.tell(trial)
            self.shared._round()
            return asking, meter.read()


class _Plain:
    """What `study.optimize` does in each step, with the same sampler and heartbeats, timed the same way."""

    def __init__(self, record: StudyRecord, url: str) -> None:
        self._record = record
        settings = record.config.study
        sampler = (
            optuna.samplers.TPESampler(
                seed=0, n_startup_trials=settings.startup_trials, multivariate=True, constant_liar=True
            )
            if settings.sampler == "tpe"
            else optuna.samplers.RandomSampler(seed=0)
        )
        with quiet():
            storage = optuna.storages.RDBStorage(url, heartbeat_interval=30)
            self._study = optuna.create_study(storage=storage, study_name=NAME, direction="maximize", sampler=sampler)
        self._rng = random.Random(0)

    def fill(self, size: int) -> None:
        fill(self._study, self._record, size, self._rng)

    def cost_of_one(self, meter: Meter) -> tuple[Cost, Cost]:
        asking: list[Cost] = []

        def objective(trial: optuna.Trial) -> float:
            suggest(trial, self._record.config.search)
            asking.append(meter.read())
            return self._rng.random()

        with quiet():
            meter.read()
            self._study.optimize(objective, n_trials=1)
        return asking[0], meter.read()


def fill(study: optuna.Study, record: StudyRecord, size: int, rng: random.Random, owner: str = "") -> None:
    """Add told trials until there are so many, by whole tables: one by one it takes a quarter of an hour."""
    spaces = distributions(record.config.search)
    scratch = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=size))
    attributes = {"outcome": "full", "owner": owner} if owner else {}
    first = len(study.get_trials(deepcopy=False))
    began = dt.datetime.now()
    storage: Any = study._storage
    with storage._backend.engine.begin() as connection:
        ids: list[int] = [
            connection.execute(
                sqlalchemy.insert(models.TrialModel).values(
                    number=number,
                    study_id=study._study_id,
                    state=optuna.trial.TrialState.COMPLETE,
                    datetime_start=began,
                    datetime_complete=began,
                )
            ).inserted_primary_key[0]
            for number in range(first, size)
        ]
        tables: dict[Any, list[dict[str, Any]]] = {
            models.TrialParamModel: [
                {
                    "trial_id": trial_id,
                    "param_name": name,
                    "param_value": spaces[name].to_internal_repr(value),
                    "distribution_json": optuna.distributions.distribution_to_json(spaces[name]),
                }
                for trial_id in ids
                for name, value in scratch.ask(spaces).params.items()
            ],
            models.TrialValueModel: [
                {"trial_id": trial_id, "objective": 0, "value": rng.random(), "value_type": "FINITE"}
                for trial_id in ids
            ],
            models.TrialUserAttributeModel: [
                {"trial_id": trial_id, "key": key, "value_json": json.dumps(value)}
                for trial_id in ids
                for key, value in attributes.items()
            ],
        }
        for table, rows in tables.items():
            if rows:
                connection.execute(sqlalchemy.insert(table), rows)


# Faults


def measure_faults(n_kills: int, seed: int) -> int:
    """Disturb three machines in every way; print what happened, what is left, and how long takeovers took."""
    from tests.search.studies import run, write_tiny_dataset
    from tests.tuning.machines import (
        GRACE_S,
        HEARTBEAT_S,
        N_TRIALS,
        NERVOUS,
        Machines,
        check_database,
        config,
        disturb,
        finished_runs,
        values,
    )

    with tempfile.TemporaryDirectory(prefix="hpsearch-distributed-") as folder, Postgres() as server:
        root = Path(folder)
        data = write_tiny_dataset(root)
        expected = values(run(root / "alone", config(data)).record)
        storage = server.create("optuna")
        with (
            MlflowServer(root / "mlflow", server.create("mlflow")) as mlflow,
            Machines(root / "project", data, storage, mlflow.address, *NERVOUS) as machines,
        ):
            rng = random.Random(seed)
            happened = disturb(
                machines, server, mlflow, n_kills=n_kills, rng=rng, say=lambda text: print(text, flush=True)
            )
            equal = values(machines.record) == expected
            trials = check_database(storage)
            runs = finished_runs(mlflow.address)
        lost = [trial for trial in trials if trial.state == optuna.trial.TrialState.FAIL]
        print(f"happened: {dict(happened)}; {len(lost)} trials taken over; MLflow's runs by outcome: {dict(runs)}")
        print(f"{N_TRIALS} configurations, values equal to one machine's: {equal}")
        print(f"silence before takeovers, s (grace {GRACE_S} + heartbeat {HEARTBEAT_S}): {silences(storage)}")
    return 0 if equal else 1


def silences(storage: str) -> list[float]:
    """Seconds from the last heartbeat of every trial that was taken over until it was failed, by the server's clock
    and this machine's, which are the same here.
    """
    query = (
        "SELECT EXTRACT(EPOCH FROM trials.datetime_complete - trial_heartbeats.heartbeat) FROM trials "
        "JOIN trial_heartbeats USING (trial_id) WHERE state = 'FAIL' ORDER BY 1"
    )
    with sqlalchemy.create_engine(storage).connect() as connection:
        return [round(float(row[0]), 1) for row in connection.execute(sqlalchemy.text(query))]


if __name__ == "__main__":
    sys.exit(main())
