"""Tiny real studies for tests: eleven images of 32 pixels, networks of two channels, one thread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hpsearch import config as configs
from hpsearch.config import StudyConfig
from hpsearch.paths import ProjectPaths
from hpsearch.search.autotune import MachineChoice
from hpsearch.store.record import StudyRecord
from hpsearch.study import StudySummary, run_study
from tests.data.conftest import tiny_pairs, write_pairs

SETTINGS = (
    "data.size=32",
    "unet.base_channels=2",
    "unet.depth=1",
    "unet.stacking=1",
    "train.epochs=2",
    "train.batch_size=4",
    "train.lr=0.05",
    "study.folds=2",
    "study.trials=3",
    "study.confirm=0",
    "study.startup_trials=2",
    "search.unet.depth=[1, 2]",
    "search.train.lr={low=0.01, high=0.3, log=true}",
)


def tiny_config(root: Path, *overrides: str) -> StudyConfig:
    """A study of the dataset at `root`; overrides win, `search.` ones too."""
    return configs.load(None, [f'data.root="{root}"', *SETTINGS, *overrides])


def write_tiny_dataset(folder: Path) -> Path:
    """Eleven pool and four test images in the archive's layout; the dataset's root."""
    root = folder / "ISIC-2017"
    write_pairs(root, "archive", tiny_pairs())
    return root


def run(project: Path, config: StudyConfig, name: str = "tiny", **options: Any) -> StudySummary:
    """Run or continue a tiny study with one worker of one thread, without tracking, unless told otherwise."""
    machine = options.pop("machine", MachineChoice("cpu", 1, 1))
    return run_study(ProjectPaths(project), name, config, machine=machine, **options)


def everything(record: StudyRecord) -> dict[str, Any]:
    """What two equal studies have in common: params, outcomes, values, folds, and every score to the byte."""
    trials = {trial.number: (trial.params, trial.outcome, trial.value, trial.decisions) for trial in record.trials()}
    scores = {
        (number, fold): record.fit(number, fold).paths.scores.read_bytes()
        for number in record.trial_numbers()
        for fold in record.finished_folds(number)
    }
    return {"trials": trials, "scores": scores, "folds": record.folds.to_dict()}


def mean_of_counted_dice(record: StudyRecord, number: int) -> float:
    """Mean Dice of all pool images, from the pixels that were counted after the last epoch of each fold."""
    tp, fp, fn, _ = np.concatenate([record.fit(number, fold).counts() for fold in range(record.n_folds)]).T
    assert len(tp) == len(record.folds.ids)
    return float(np.mean(2 * tp / (2 * tp + fp + fn)))
