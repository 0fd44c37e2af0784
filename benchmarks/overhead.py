"""Measure how much of a study's time is not spent on training or evaluation, and how soon training starts.

    python benchmarks/overhead.py                    a few minutes on two cores
    python benchmarks/overhead.py --data DIR         on your own images (archive layout) instead of synthetic ones

Runs the command `hpsearch study` at 64x64, base 8, depth 3, with one worker that uses all threads, MLflow and
checkpoints, in a project whose images are already decoded. The first run starts a new study, whose plan is measured
first. The second run continues it with one more trial. epochs.jsonl records when each epoch ended and how long its
training and evaluation took. The remaining time is shown by place:

    epochs    between the epochs of a fit: checkpoint, scores, race, log
    fits      from the last epoch of a fit to the first of the next: weights, examples, the next network, suggestion
    end       from the last epoch to the end of the command: the last updates of MLflow
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from setting import describe_machine, draw_images

from hpsearch.paths import ProjectPaths
from hpsearch.store.record import StudyRecord

NAME = "overhead"


@dataclass(frozen=True)
class Epoch:
    """One line of epochs.jsonl."""

    trial: int
    fold: int
    ended_at: float
    steps_s: float

    @property
    def began_at(self) -> float:
        return self.ended_at - self.steps_s


@dataclass(frozen=True)
class Run:
    """One start of the command."""

    began_at: float
    ended_at: float
    epochs: list[Epoch]

    @property
    def first_step_s(self) -> float:
        """From the command to the first training step."""
        return self.epochs[0].began_at - self.began_at

    def gaps(self) -> dict[str, list[float]]:
        """Seconds outside steps after the first one, by where they lie."""
        gaps: dict[str, list[float]] = {"epochs": [], "fits": [], "end": [self.ended_at - self.epochs[-1].ended_at]}
        for before, after in zip(self.epochs, self.epochs[1:], strict=False):
            kind = "epochs" if (before.trial, before.fold) == (after.trial, after.fold) else "fits"
            gaps[kind].append(after.began_at - before.ended_at)
        return gaps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder in the archive layout; default: 1000 drawn images")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--trials", type=int, default=2)
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        data = arguments.data or draw_images(project / "ISIC-2017", arguments.images)
        images = data.name if arguments.data else "drawn images"
        subprocess.run([*hpsearch("data", "cache"), *settings(arguments, data, project)], check=True, stdout=DEVNULL)
        print(describe_machine(threads=arguments.threads))
        print(f"{images}, {arguments.images} of them, 64x64, base 8,", end=" ")
        print(f"{arguments.folds} folds of {arguments.epochs} epochs\n")
        for title, trials in (("new study", arguments.trials), ("continued", arguments.trials + 1)):
            print_run(title, start(arguments, data, project, trials))


DEVNULL = subprocess.DEVNULL


def hpsearch(*command: str) -> list[str]:
    return [sys.executable, "-m", "hpsearch", *command]


def settings(arguments: argparse.Namespace, data: Path, project: Path) -> list[str]:
    """What all commands are given."""
    values = [
        "data.size=64",
        f"data.n_search_train={arguments.images}",
        "data.n_search_validation=1",
        f"train.epochs={arguments.epochs}",
        "unet.base_channels=8",
        "unet.depth=3",
        "unet.stacking=2",
        "train.batch_size=16",
        "data.color=rgb",
    ]
    found = ["--config", "isic2017-64", "--data", str(data), "--out", str(project)]
    return found + [part for value in values for part in ("--set", value)]


def start(arguments: argparse.Namespace, data: Path, project: Path, trials: int) -> Run:
    """Run the command and read what it left."""
    study = ["--study", NAME, "--trials", str(trials), "--folds", str(arguments.folds), "--pruner", "none"]
    machine = ["--workers", "1", "--threads", str(arguments.threads), "--confirm", "0"]
    began_at = time.time()
    subprocess.run(
        [*hpsearch("study"), *settings(arguments, data, project), *study, *machine], check=True, stdout=DEVNULL
    )
    ended_at = time.time()
    record = StudyRecord.open(ProjectPaths(project).study(NAME))
    epochs = [
        Epoch(trial, fold, row.time, row.seconds)
        for trial in record.trial_numbers()
        for fold in range(record.n_folds)
        for row in record.fit(trial, fold).epochs()
    ]
    mine = sorted((epoch for epoch in epochs if epoch.ended_at > began_at), key=lambda epoch: epoch.ended_at)
    return Run(began_at, ended_at, mine)


def print_run(title: str, run: Run) -> None:
    """Its table."""
    gaps = run.gaps()
    steps_s = sum(epoch.steps_s for epoch in run.epochs)
    outside_s = sum(sum(seconds) for seconds in gaps.values())
    print(f"{title}: first training step {run.first_step_s:.1f} s after the command")
    print(f"  after it {outside_s + steps_s:7.1f} s, of them outside steps {outside_s / (outside_s + steps_s):.1%}")
    for kind, seconds in gaps.items():
        share = sum(seconds) / (outside_s + steps_s)
        median = 1000 * float(np.median(seconds or [0.0]))
        print(f"    {kind:7} {sum(seconds):6.2f} s {share:6.1%}, {len(seconds):4} of them, median {median:.0f} ms")
    total_s = run.ended_at - run.began_at
    print(f"  whole command {total_s:.1f} s, steps {steps_s / total_s:.1%}\n")


if __name__ == "__main__":
    main()
