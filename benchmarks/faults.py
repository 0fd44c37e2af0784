"""Kill a study at random instants until it is done, and compare what it leaves with a study that was never touched.

    python benchmarks/faults.py --studies 10 --kills 100          # SIGKILL of coordinator, workers, both
    python benchmarks/faults.py --studies 3 --kills 20 --signals TERM INT STOP

Each study is tiny (16 drawn images at 32x32, one worker, TPE, race). Asserted for each: trials 0..n-1 finished, none
twice; params, values, folds, per-image scores and weights equal to the byte; in MLflow one run per trial with every
metric step once; no process and no temporary file left.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from hpsearch.paths import ProjectPaths
from hpsearch.tuning.record import StudyRecord

MARK = "HPSEARCH_FAULTS_MARK"
"""Environment variable by which the processes of one run are known."""
NAME = "faults"


def main() -> int:
    """Run the studies and print one table; exit code 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=10)
    parser.add_argument("--kills", type=int, default=100, help="at least so many over all studies")
    parser.add_argument("--signals", nargs="+", default=["KILL"], choices=["KILL", "TERM", "INT", "STOP"])
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hpsearch-faults-") as folder:
        root = Path(folder)
        data = draw_data(root)
        print(f"{'study':>5} {'kills':>5} {'starts':>6} {'training':>9} {'result'}")
        totals = Counter[str]()
        references: dict[int, Untouched] = {}
        for number in range(options.studies):
            seed = number % 3
            if seed not in references:
                references[seed] = run_untouched(root / f"untouched{seed}", data, seed, options.trials)
            left = max(1, -(-(options.kills - totals["kills"]) // (options.studies - number)))
            outcome = run_killed(
                root / f"killed{number}",
                data,
                references[seed],
                seed=seed,
                n_trials=options.trials,
                n_kills=left,
                signals=options.signals,
                rng=random.Random(options.seed * 1000 + number),
            )
            totals["kills"] += outcome.n_kills
            totals["differences"] += len(outcome.differences)
            ratio = outcome.epochs_trained / references[seed].epochs_trained
            result = "equal" if not outcome.differences else "; ".join(outcome.differences)
            print(f"{number:5d} {outcome.n_kills:5d} {outcome.n_starts:6d} {ratio:8.2f}x {result}", flush=True)
        print(f"{totals['kills']} kills over {options.studies} studies, {totals['differences']} differences")
    return 1 if totals["differences"] else 0


@dataclass(frozen=True)
class Untouched:
    """What a study leaves that nobody disturbed."""

    left: dict[str, Any]
    seconds: float
    epochs_trained: int


@dataclass
class Killed:
    """How a disturbed study went."""

    n_kills: int = 0
    n_starts: int = 0
    epochs_trained: int = 0
    differences: list[str] = field(default_factory=list)


def draw_data(root: Path) -> Path:
    """Sixteen drawn images to search on and four to test on."""
    from hpsearch.data.sample import draw_sample

    draw_sample(root / "data", n_train=12, n_val=4, n_test=4)
    return root / "data"


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


def run_untouched(out: Path, data: Path, seed: int, n_trials: int) -> Untouched:
    """Run the study to its end in peace."""
    began = time.monotonic()
    subprocess.run(command(out, data, seed, n_trials), check=True, capture_output=True, timeout=900)
    return Untouched(what_is_left(out), time.monotonic() - began, epochs_trained(out))


def run_killed(
    out: Path,
    data: Path,
    reference: Untouched,
    *,
    seed: int,
    n_trials: int,
    n_kills: int,
    signals: list[str],
    rng: random.Random,
) -> Killed:
    """Run the study, killing as often as asked at random instants, then let it end; compare."""
    outcome = Killed()
    mark = f"{os.getpid()}-{out.name}"
    environment = os.environ | {MARK: mark}
    deadline = time.monotonic() + 60 + 40 * (n_kills + 1) + 10 * reference.seconds
    out.mkdir(parents=True)
    while True:
        outcome.n_starts += 1
        with (out / "output.log").open("ab") as log:
            process = subprocess.Popen(
                command(out, data, seed, n_trials), stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment
            )
        # Over the whole length of a start, its first imports and its last logging included.
        span = reference.seconds * rng.choice([0.2, 0.5, 1.0])
        if outcome.n_kills < n_kills:
            wait_at_most(process, rng.uniform(0.0, span))
            if process.poll() is None:
                strike(process, rng.choice(signals), rng.choice(["coordinator", "worker", "both"]), rng)
                outcome.n_kills += 1
        while process.poll() is None and time.monotonic() < deadline:
            if outcome.n_kills < n_kills and rng.random() < 0.3:
                wait_at_most(process, rng.uniform(0.0, span))
                if process.poll() is None:
                    strike(process, rng.choice(signals), rng.choice(["coordinator", "worker"]), rng)
                    outcome.n_kills += 1
            wait_at_most(process, 0.5)
        if process.poll() is None:
            process.kill()
            outcome.differences.append("did not end")
            break
        if process.returncode == 0 and outcome.n_kills >= n_kills:
            break
        if process.returncode == 0:
            # Done before its share of kills was: what ended must also survive being started again and killed.
            continue
        if process.returncode == 1:
            outcome.differences.append(f"error: {(out / 'output.log').read_text().strip().splitlines()[-1]}")
            break
    outcome.differences += compare(out, reference)
    outcome.differences += leftovers(out, mark)
    outcome.epochs_trained = epochs_trained(out)
    return outcome


def strike(process: subprocess.Popen[bytes], name: str, target: str, rng: random.Random) -> None:
    """Send one signal to the coordinator, to a worker of it, or to both. STOP is followed by CONT."""
    victims = [] if target == "worker" else [process.pid]
    try:
        workers = [p.pid for p in psutil.Process(process.pid).children() if "hpsearch.tuning.worker" in p.cmdline()]
    except psutil.Error:
        workers = []
    victims += workers if target != "coordinator" else []
    number = getattr(signal, f"SIG{name}")
    for pid in victims or [process.pid]:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
    if name == "STOP":
        time.sleep(rng.uniform(0.1, 2.0))
        for pid in victims or [process.pid]:
            try:
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                continue


def wait_at_most(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Until the process has ended, or so long."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def what_is_left(out: Path) -> dict[str, Any]:
    """All that must not depend on how often a study was killed, by name."""
    record = StudyRecord.open(ProjectPaths(out).study(NAME))
    left: dict[str, Any] = {"folds": record.folds.to_dict()}
    for trial in record.trials():
        left[f"trial {trial.number}"] = (trial.params, trial.outcome, trial.value, trial.reason, trial.decisions)
        for fold in record.finished_folds(trial.number):
            fit = record.fit(trial.number, fold).paths
            left[f"trial {trial.number} fold {fold} scores"] = digest(fit.scores)
            left[f"trial {trial.number} fold {fold} weights"] = digest(fit.weights)
    left["optuna"] = optuna_rows(out / "hpsearch.db")
    left["mlflow"] = mlflow_rows(out / "mlflow.db")
    return left


def digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def optuna_rows(path: Path) -> list[Any]:
    """(number, state, value) of every trial."""
    with sqlite3.connect(path) as database:
        query = "SELECT number, state, value FROM trials LEFT JOIN trial_values USING (trial_id) ORDER BY number"
        return database.execute(query).fetchall()


def mlflow_rows(path: Path) -> dict[str, Any]:
    """Runs with their status; how often each metric and step was logged, with its value unless it is a time."""
    timed = ("seconds", "images_per_s", "peak", "_s", "bytes", "memory", "duration")
    with sqlite3.connect(path) as database:
        runs = database.execute(
            "SELECT name, status FROM runs WHERE lifecycle_stage = 'active' ORDER BY name"
        ).fetchall()
        metrics = database.execute(
            "SELECT runs.name, key, step, value, COUNT(*) FROM metrics JOIN runs USING (run_uuid) "
            "GROUP BY runs.name, key, step, value ORDER BY runs.name, key, step"
        ).fetchall()
    kept = [(*row[:3], None if any(word in row[1] for word in timed) else row[3], row[4]) for row in metrics]
    return {"runs": runs, "metrics": sorted(kept, key=repr)}


def compare(out: Path, reference: Untouched) -> list[str]:
    """What differs from the study that nobody disturbed."""
    try:
        left = what_is_left(out)
    except Exception as error:
        return [f"unreadable: {error}"]
    names = sorted(set(left) | set(reference.left))
    return [f"{name} differs" for name in names if left.get(name) != reference.left.get(name)]


def leftovers(out: Path, mark: str) -> list[str]:
    """Processes of the run that still live after a moment, and temporary files."""
    time.sleep(1.0)
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                found.append(f"process {process.pid} is left")
        except psutil.Error:
            continue
    found += [f"{path.name} is left" for path in out.rglob("*.tmp")]
    return found


def epochs_trained(out: Path) -> int:
    """Epochs that were trained, those done again included, as the study's log tells."""
    log = ProjectPaths(out).study(NAME).log
    return sum(" epoch " in line and ": loss" in line for line in log.read_text(errors="replace").splitlines())


if __name__ == "__main__":
    sys.exit(main())
