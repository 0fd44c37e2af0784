"""Kill, signal and fail small studies at random instants, and compare the results with undisturbed studies.

    python benchmarks/faults.py kills --studies 10 --kills 100      # SIGKILL of coordinator and workers
    python benchmarks/faults.py signals --studies 4 --kills 40      # SIGTERM, SIGINT, SIGHUP, SIGSTOP and SIGCONT
    python benchmarks/faults.py writes                              # each kind of write fails once, one per start
    python benchmarks/faults.py full                                # a full disk (needs permission to mount)

Each study has 16 synthetic images at 32x32, one worker, TPE and racing. The checks for each study: trials 0 to n-1
have ended, each once; params, values, decisions, folds, per-image scores and weights are byte-identical; Optuna and
MLflow have the same trials, runs and metric steps, each once; at most one epoch was trained again per kill; no
process and no temporary file is left.

In three of four kills, a process kills itself at a random line of a random function (`faulty/sitecustomize.py`), so
that every phase is covered regardless of the speed of the machine. The other kills come from this program at random
times.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from hpsearch.paths import ProjectPaths
from hpsearch.store.record import StudyRecord
from hpsearch.tracking import mlflow_server

NAME = "faults"
FAULTY = Path(__file__).parent / "faulty"
MARK = "HPSEARCH_FAULTS"
"""Environment variable that names the folder of the faults of one study; its processes are known by it."""
LAGS = "MLflow is not up to date"
"""What a study says at its end where MLflow was too slow."""
PATIENCE_S = 600.0
"""A start that takes longer hangs."""
SQUEEZED_KIB = (0, 8, 40, 100, 300, 600)
"""What is left free on the disk that fills up, one after another."""

PHASES: dict[str, tuple[tuple[str, str], ...]] = {
    "start": (
        ("coordinator", "store/lock.py:hold"),
        ("coordinator", "data/build.py:_build"),
        ("coordinator", "study.py:run_study"),
        ("coordinator", "study.py:_create_record"),
        ("coordinator", "search/optuna_view.py:_open"),
        ("coordinator", "search/optuna_view.py:update"),
        ("coordinator", "search/autotune.py:_measure_plan"),
        ("coordinator", "search/coordinator.py:resume"),
        ("worker", "training/progress.py:resume_"),
    ),
    "ask": (
        ("coordinator", "search/new_trials.py:next_trial"),
        ("coordinator", "search/suggest.py:suggest"),
        ("coordinator", "search/suggest.py:_draw"),
        ("coordinator", "search/coordinator.py:_begin_trial"),
        ("coordinator", "search/coordinator.py:next_job"),
    ),
    "first epoch": (
        ("worker", "workers/tasks.py:run_fit"),
        ("worker", "training/loop.py:_fit"),
        ("worker", "training/loop.py:_train_epoch"),
        ("worker", "training/loop.py:_evaluate_epoch"),
        ("coordinator", "search/coordinator.py:_on_epoch"),
    ),
    "checkpoint": (
        ("worker", "training/checkpoint.py:save_checkpoint"),
        ("worker", "training/checkpoint.py:save_array"),
        ("worker", "paths.py:atomic_write"),
        ("worker", "paths.py:append_line"),
        ("coordinator", "search/evaluation.py:should_prune"),
    ),
    "tell": (
        ("coordinator", "search/coordinator.py:_end"),
        ("coordinator", "search/coordinator.py:_remove_networks"),
        ("coordinator", "search/optuna_view.py:_show"),
        ("coordinator", "store/files.py:write_evaluation"),
        ("coordinator", "paths.py:atomic_write"),
    ),
    "logging": (
        ("coordinator", "tracking/experiment.py:deliver"),
        ("coordinator", "tracking/experiment.py:ensure"),
        ("coordinator", "tracking/experiment.py:_read"),
        ("coordinator", "tracking/experiment.py:_log_files"),
        ("coordinator", "tracking/experiment.py:_set_status"),
        ("coordinator", "tracking/run_files.py:write_trial_files"),
    ),
    "end": (
        ("worker", "training/progress.py:finish_fit"),
        ("worker", "training/checkpoint.py:save_weights"),
        ("worker", "training/progress.py:save_examples"),
        ("coordinator", "search/coordinator.py:_end_if_finished"),
        ("coordinator", "views.py:close"),
        ("coordinator", "workers/local_pool.py:close"),
        ("coordinator", "cli/progress.py:summarise"),
    ),
}
"""Where in the life of a study a signal can fall: role and function of hpsearch."""
ONCE = ("data/build.py:_build", "study.py:_create_record", "search/autotune.py:_measure_plan")
"""What only the first start of a study comes to."""
SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM, "INT": signal.SIGINT, "HUP": signal.SIGHUP}


def main() -> int:
    """Run what was asked for and print one table; exit code 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kills", "signals", "writes", "full"], nargs="?", default="kills")
    parser.add_argument("--studies", type=int, default=10, help="at least so many")
    parser.add_argument("--kills", type=int, default=100, help="at least so many over all studies")
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=1, help="of all kinds of writes, fail every so manyth only")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hpsearch-faults-") as folder:
        place = Place.make(Path(folder), n_trials=options.trials)
        if options.what in ("kills", "signals"):
            names = ("KILL",) if options.what == "kills" else ("TERM", "INT", "HUP", "STOP")
            outcomes = list(disturb_studies(place, options.studies, options.kills, names, options.seed))
        elif options.what == "writes":
            outcomes = [fail_every_write(place, every=options.every)]
        else:
            outcomes = [fill_the_disk(place)]
    differences = [difference for outcome in outcomes for difference in outcome.differences]
    n_faults = sum(outcome.n_faults for outcome in outcomes)
    phases = sum((outcome.phases for outcome in outcomes), Counter[str]())
    print(", ".join(f"{name} {n}" for name, n in sorted(phases.items())))
    print(f"{n_faults} faults over {len(outcomes)} studies in {time.monotonic() - began:.0f} s")
    print("\n".join([*differences, f"{len(differences)} differences"]))
    return 1 if differences else 0


@dataclass(frozen=True)
class Untouched:
    """What a study leaves that nobody disturbed."""

    left: dict[str, Any]
    seconds: float
    n_epochs: int


@dataclass
class Place:
    """Where the studies of one run lie, and what they share: images, an empty MLflow database, calm studies."""

    root: Path
    data: Path
    mlflow_db: Path
    n_trials: int
    untouched: dict[int, Untouched] = field(default_factory=dict)

    @classmethod
    def make(cls, root: Path, *, n_trials: int, mlflow_db: Path | None = None) -> Place:
        from hpsearch.data.sample import draw_sample

        draw_sample(root / "data", n_train=12, n_val=4, n_test=4)
        if mlflow_db is None:
            # Making one takes seconds: all studies begin with a copy.
            mlflow_server.import_mlflow()
            mlflow_server.create_database(ProjectPaths(root))
            mlflow_db = root / "mlflow.db"
        return cls(root, root / "data", mlflow_db, n_trials)

    def reference(self, seed: int) -> Untouched:
        """The study with that seed, left in peace."""
        if seed not in self.untouched:
            out = self.root / f"untouched{seed}"
            began = time.monotonic()
            ended = Disturbed(self, out, seed).finish()
            if ended.code != 0:
                raise SystemExit(f"the study does not even run undisturbed:\n{ended.text}")
            self.untouched[seed] = Untouched(what_is_left(out), time.monotonic() - began, n_epochs(out))
        return self.untouched[seed]


@dataclass
class Outcome:
    """How a disturbed study went."""

    n_faults: int = 0
    n_starts: int = 0
    n_epochs: int = 0
    phases: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Ended:
    """How one start of a study ended."""

    code: int
    text: str


@dataclass
class Disturbed:
    """One study in a folder of its own, started again and again."""

    place: Place
    out: Path
    seed: int

    @property
    def faults(self) -> Path:
        return self.out / "faults"

    def start(self, request: dict[str, Any] | list[dict[str, Any]], meanwhile: Any = None) -> Ended:
        """Run the study until it ends, by itself or by the fault; `meanwhile` hears of it again and again."""
        if not self.out.is_dir():
            self.out.mkdir(parents=True)
            shutil.copy(self.place.mlflow_db, self.out / "mlflow.db")
        (self.faults / "fired").mkdir(parents=True, exist_ok=True)
        (self.faults / "request.json").write_text(json.dumps(request))
        path = os.pathsep.join([str(FAULTY), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {MARK: str(self.faults), "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
        log = self.faults / "output.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command(self.out, self.place.data, self.seed, self.place.n_trials),
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                env=environment,
            )
        deadline = time.monotonic() + PATIENCE_S
        while process.poll() is None:
            if meanwhile is not None:
                meanwhile(process)
            wake_stopped(process.pid)
            if time.monotonic() > deadline:
                process.kill()
                process.wait()
                return Ended(-999, "did not end")
            wait_at_most(process, 0.05)
        return Ended(process.returncode, log.read_text(errors="replace"))

    def finish(self) -> Ended:
        """Start it undisturbed until it is done and, on a slow machine, MLflow has all of it."""
        for _ in range(5):
            ended = self.start([])
            if ended.code != 0 or LAGS not in ended.text:
                break
        return ended


def command(out: Path, data: Path, seed: int, n_trials: int) -> list[str]:
    """The command line of one start of the study."""
    settings = {
        "data.size": 32,
        "unet.base_channels": 2,
        "unet.depth": 1,
        "unet.stacking": 1,
        "train.epochs": 3,
        "train.batch_size": 4,
        "train.lr": 0.05,
        "study.startup_trials": 2,
        "study.confirm": 0,
        "search.unet.depth": "[1, 2]",
        "search.unet.base_channels": "[2, 4]",
        "search.train.lr": "{low = 0.01, high = 0.3, log = true}",
        "search.train.batch_size": "[2, 4]",
        "search.data.color": '["rgb", "grayscale"]',
        "search.unet.stacking": "[1, 2]",
    }
    flags = [f"--set={name}={value}" for name, value in settings.items()]
    arguments = f"study --study {NAME} --trials {n_trials} --folds 2 --seed {seed} --workers 1 --threads 1".split()
    return [sys.executable, "-m", "hpsearch", *arguments, "--out", str(out), "--data", str(data), *flags]


def disturb_studies(
    place: Place, n_studies: int, n_kills: int, names: Sequence[str], seed: int, prefix: str = "disturbed"
) -> Iterator[Outcome]:
    """Studies under signals, until there were as many studies and as many signals as asked for."""
    print(f"{'study':>5} {'faults':>6} {'starts':>6} {'epochs':>7} result")
    total = number = 0
    while number < n_studies or total < n_kills:
        share = max(1, -(-(n_kills - total) // max(1, n_studies - number)))
        reference = place.reference(number % 3)
        rng = random.Random(seed * 1000 + number)
        outcome = disturb(
            Disturbed(place, place.root / f"{prefix}{number}", number % 3), reference, share, names, rng
        )
        result = "equal" if not outcome.differences else "; ".join(outcome.differences)
        epochs = f"{outcome.n_epochs}/{reference.n_epochs}"
        print(f"{number:5d} {outcome.n_faults:6d} {outcome.n_starts:6d} {epochs:>7} {result}", flush=True)
        yield outcome
        total += outcome.n_faults
        number += 1


def disturb(
    study: Disturbed, reference: Untouched, n_faults: int, names: Sequence[str], rng: random.Random
) -> Outcome:
    """Start the study with a signal at a drawn instant, again and again until it is done; compare."""
    outcome = Outcome()
    order = itertools.cycle(rng.sample(list(PHASES), len(PHASES)))
    while True:
        outcome.n_starts += 1
        name = rng.choice(names)
        # A third death of a worker without an epoch in between would rightly fail its trial.
        n_workers = 2 - deaths_in_place(study.out)
        requests: list[dict[str, Any]] = []
        strike = None
        if outcome.n_faults < n_faults and rng.random() < 0.8:
            is_first = outcome.n_starts == 1
            for number, role in enumerate(["worker"] * rng.randint(0, max(0, n_workers)) + ["coordinator"]):
                phase = next(order)
                instant = draw_instant(phase, role, name, rng, is_first=is_first)
                requests.append({"name": f"start{outcome.n_starts}.{number} {phase}", **instant})
        elif outcome.n_faults < n_faults:
            strike = Strike(name, reference.seconds, n_workers > 0, rng)
        ended = study.start(requests, strike)
        fired = [path.name for path in (study.faults / "fired").glob(f"start{outcome.n_starts}.*")]
        struck = ["any time"] if strike is not None and strike.is_done else []
        for phase in (*(each.partition(" ")[2] for each in fired), *struck):
            outcome.n_faults += 1
            outcome.phases[phase] += 1
        if problem := what_is_wrong(ended, name):
            outcome.differences.append(problem)
            break
        # Once more from time to time: a study that is done must survive being started and killed too.
        if ended.code == 0 and (outcome.n_faults >= n_faults or rng.random() < 0.7):
            break
    if ended.code == 0 and LAGS in ended.text:
        study.finish()
    outcome.n_epochs = n_epochs(study.out)
    outcome.differences += compare(study.out, reference)
    if outcome.n_epochs > reference.n_epochs + outcome.n_faults:
        outcome.differences.append(f"{outcome.n_epochs} epochs were trained instead of {reference.n_epochs}")
    return outcome


def draw_instant(phase: str, role: str, name: str, rng: random.Random, *, is_first: bool) -> dict[str, Any]:
    """A line of a function of that phase that processes of that role come to, and the signal to be sent there."""
    places = [
        function for whose, function in PHASES[phase] if whose == role and (is_first or function not in ONCE)
    ] or [function for functions in PHASES.values() for whose, function in functions if whose == role]
    number = signal.SIGSTOP if name == "STOP" else SIGNALS[name]
    call, line = rng.choice([1, 1, 1, 1, 2]), rng.randrange(16)
    return {"signal": int(number), "role": role, "function": rng.choice(places), "call": call, "line": line}


@dataclass
class Strike:
    """A signal from outside at any time: to the coordinator, to a worker, or to both."""

    name: str
    span_s: float
    workers_too: bool
    rng: random.Random
    is_done: bool = False
    at: float = 0.0

    def __call__(self, process: subprocess.Popen[bytes]) -> None:
        if not self.at:
            self.at = time.monotonic() + self.rng.uniform(0.0, self.span_s)
            self.target = self.rng.choice(["coordinator", "worker", "both"] if self.workers_too else ["coordinator"])
        if self.is_done or time.monotonic() < self.at:
            return
        victims = workers_of(process.pid) if self.target != "coordinator" else []
        if self.target == "both" or not victims:
            victims.append(process.pid)
        self.is_done = True
        for pid in victims:
            send(pid, signal.SIGSTOP if self.name == "STOP" else SIGNALS[self.name])
        if self.name == "STOP":
            time.sleep(self.rng.uniform(0.1, 1.0))


def what_is_wrong(ended: Ended, name: str) -> str | None:
    """Why a start must not end like that; None if it may."""
    expected = {0}
    if name == "KILL":
        expected.add(-signal.SIGKILL)
    elif name != "STOP":
        # Before Python listens to signals the system ends it.
        expected |= {128 + SIGNALS[name], -SIGNALS[name]}
    lines = ended.text.strip().splitlines() or ["no output"]
    if ended.code not in expected:
        return f"exit status {ended.code}: {lines[-1]}"
    if "Traceback" in ended.text and "KeyboardInterrupt" not in ended.text:
        return f"a traceback: {lines[-1]}"
    return None


def fail_every_write(place: Place, *, seed: int = 0, every: int = 1, numbers: Sequence[int] = ()) -> Outcome:
    """Fail the first write of every kind, until a start meets no new kind; then compare.

    Of all kinds every so manyth is failed. `numbers` are the errors, one a start, in turn.
    """
    reference = place.reference(seed)
    study = Disturbed(place, place.root / "writes", seed)
    outcome = Outcome()
    numbers = numbers or (errno.ENOSPC, errno.EIO, errno.EROFS)
    while True:
        outcome.n_starts += 1
        number = numbers[outcome.n_starts % len(numbers)]
        request = {"name": "write", "errno": number, "root": str(study.out), "every": every}
        n_before = len(read_lines(study.faults / "fired.jsonl"))
        ended = study.start(request)
        fired = [json.loads(line) for line in read_lines(study.faults / "fired.jsonl")[n_before:]]
        if not fired:
            break
        outcome.n_faults += len(fired)
        outcome.phases[errno.errorcode[number]] += len(fired)
        survived = ended.code == 0
        last = (ended.text.strip().splitlines() or ["no output"])[-1]
        where = f"{errno.errorcode[number]} at {', '.join(fired)}"
        print(f"{where}: {'survived' if survived else last}", flush=True)
        if ended.code not in (0, 1) or "Traceback" in ended.text or not (survived or "cannot write" in last):
            outcome.differences.append(f"{where}: {ended.code}, {ended.text[-2000:]}")
    if ended.code != 0 or (LAGS in ended.text and study.finish().code != 0):
        outcome.differences.append(f"does not go on: {ended.text[-2000:]}")
    outcome.differences += compare(study.out, reference)
    return outcome


def fill_the_disk(place: Place, *, seed: int = 0, squeezed_kib: Sequence[int] = SQUEEZED_KIB) -> Outcome:
    """Let a disk of 64 MiB fill up while the study runs, again and again; make room, go on, compare."""
    reference = place.reference(seed)
    disk = place.root / "disk"
    disk.mkdir()
    outcome = Outcome()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], check=False).returncode:
        print("no right to mount: left out")
        return outcome
    try:
        study = Disturbed(place, disk / "project", seed)
        for kib in (*squeezed_kib, None):
            outcome.n_starts += 1
            filler = disk / "filler"
            n_before = n_epochs(study.out)

            def fill(_: object, kib: int | None = kib, filler: Path = filler, n_before: int = n_before) -> None:
                if kib is not None and not filler.exists() and n_epochs(study.out) > n_before:
                    # The study writes meanwhile: what was free may be gone, and then the disk is full, too.
                    with contextlib.suppress(OSError):
                        filler.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - kib * 1024)))

            ended = study.start([], fill)
            is_full = filler.exists()
            filler.unlink(missing_ok=True)
            last = (ended.text.strip().splitlines() or ["no output"])[-1]
            print(f"{'-' if kib is None else kib} KiB left: {ended.code}, {last}", flush=True)
            if is_full:
                outcome.n_faults += 1
                outcome.phases["full disk"] += 1
            if ended.code not in (0, 1) or "Traceback" in ended.text or (ended.code and "free" not in last):
                outcome.differences.append(f"{kib} KiB left: {ended.code}, {ended.text[-2000:]}")
        if LAGS in ended.text:
            study.finish()
        outcome.differences += compare(study.out, reference)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=False)
    return outcome


def workers_of(pid: int) -> list[int]:
    """Worker processes of a coordinator."""
    try:
        return [p.pid for p in psutil.Process(pid).children() if "hpsearch.workers.process" in p.cmdline()]
    except psutil.Error:
        return []


def wake_stopped(pid: int) -> None:
    """Let a coordinator and its workers go on where one was stopped."""
    for each in (pid, *workers_of(pid)):
        try:
            if psutil.Process(each).status() == psutil.STATUS_STOPPED:
                send(each, signal.SIGCONT)
        except psutil.Error:
            continue


def send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def wait_at_most(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Until the process has ended, or so long."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def deaths_in_place(out: Path) -> int:
    """How often the worker of an open fold died without an epoch in between: the third time fails its trial."""
    try:
        record = StudyRecord.open(ProjectPaths(out).study(NAME))
        return max(
            (
                sum(each.partition(":")[0] == died[-1].partition(":")[0] for each in died)
                for trial in record.trials()
                if trial.outcome is None
                for died in trial.failures.values()
            ),
            default=0,
        )
    except Exception:
        return 0


def what_is_left(out: Path) -> dict[str, Any]:
    """All that must not depend on how often a study was disturbed, by name."""
    record = StudyRecord.open(ProjectPaths(out).study(NAME))
    left: dict[str, Any] = {"folds": record.folds.to_dict()}
    for trial in record.trials():
        left[f"trial {trial.number}"] = (trial.params, trial.outcome, trial.value, trial.reason, trial.decisions)
        for fold in range(record.n_folds):
            fit = record.fit(trial.number, fold)
            left[f"trial {trial.number} fold {fold}"] = {
                "finished": fit.is_finished,
                "scores": digest(fit.paths.scores),
                "counts": digest(fit.paths.counts),
                "weights": digest(fit.paths.weights),
                "best": digest(fit.paths.best),
                "checkpoints": fit.paths.last.is_file() or fit.paths.previous.is_file(),
                "epochs": [(row.epoch, row.train, row.held_out) for row in fit.epochs()],
            }
    left["optuna"] = optuna_rows(out / "hpsearch.db")
    left["mlflow"] = mlflow_rows(out / "mlflow.db")
    return left


def digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def optuna_rows(path: Path) -> list[Any]:
    """(number, state, value) and every param of every trial."""
    with sqlite3.connect(path) as database:
        values = "SELECT number, state, value FROM trials LEFT JOIN trial_values USING (trial_id) ORDER BY number"
        params = "SELECT number, param_name, param_value FROM trials JOIN trial_params USING (trial_id) ORDER BY 1, 2"
        return database.execute(values).fetchall() + database.execute(params).fetchall()


def mlflow_rows(path: Path) -> dict[str, Any]:
    """Runs with their status; how often each metric and step was logged, with its value unless it is a time."""
    timed = ("seconds", "images_per_s", "peak", "_s", "bytes", "memory", "duration")
    with sqlite3.connect(path) as database:
        runs = database.execute(
            "SELECT name, status FROM runs WHERE lifecycle_stage = 'active' ORDER BY name"
        ).fetchall()
        params = database.execute(
            "SELECT runs.name, key, value FROM params JOIN runs USING (run_uuid) ORDER BY 1, 2, 3"
        ).fetchall()
        metrics = database.execute(
            "SELECT runs.name, key, step, value, COUNT(*) FROM metrics JOIN runs USING (run_uuid) "
            "GROUP BY runs.name, key, step, value ORDER BY runs.name, key, step"
        ).fetchall()
    kept = [(*row[:3], None if any(word in row[1] for word in timed) else row[3], row[4]) for row in metrics]
    return {"runs": runs, "params": params, "metrics": sorted(kept, key=repr)}


def compare(out: Path, reference: Untouched) -> list[str]:
    """What differs from the study that nobody disturbed, and what was left behind."""
    try:
        left = what_is_left(out)
    except Exception as error:
        return [f"unreadable: {type(error).__name__} {error}"]
    names = sorted(set(left) | set(reference.left))
    found = [f"{name} differs" for name in names if left.get(name) != reference.left.get(name)]
    time.sleep(0.5)
    mark = str(out / "faults")
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                found.append(f"process {process.pid} is left: {process.cmdline()}")
        except psutil.Error:
            continue
    return found + [f"{path.name} is left" for path in (*out.rglob("*.tmp"), *out.rglob(".tracking"))]


def n_epochs(out: Path) -> int:
    """Epochs that were begun, those trained again and the steps of the measurement included."""
    counted = out / "faults" / "epochs"
    return counted.stat().st_size if counted.is_file() else 0


def read_lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


if __name__ == "__main__":
    sys.exit(main())
