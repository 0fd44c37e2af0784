"""What a study has reached, read from its record alone."""

from __future__ import annotations

from dataclasses import dataclass

from hpsearch.config import StudyConfig
from hpsearch.paths import ProjectPaths
from hpsearch.tuning import lock
from hpsearch.tuning.record import COUNTED, StudyRecord, TrialRecord


@dataclass(frozen=True)
class OpenFit:
    """A fit that was begun and is not finished."""

    trial: int
    fold: int
    epoch: int
    """Epochs done."""
    epochs: int
    score: float
    """Held-out mean after the last epoch done."""


@dataclass(frozen=True)
class StudyStatus:
    """A study at one moment."""

    name: str
    config: StudyConfig
    trials: tuple[TrialRecord, ...]
    n_counted: int
    n_folds: int
    n_finished: dict[int, int]
    """Trial to its finished folds."""
    seconds: dict[int, float]
    """Trial to the seconds of training and evaluation so far."""
    best: TrialRecord | None
    open_fits: tuple[OpenFit, ...]
    is_running: bool
    eta_s: float | None
    """Seconds to go at the pace of the trials so far; None while nothing tells, or when it is done."""


def study_status(project: ProjectPaths, name: str) -> StudyStatus:
    """The status of the study `name`. StudyError if there is none, RecordError if its folder is damaged."""
    record = StudyRecord.open(project.study(name))
    trials = tuple(record.trials())
    open_fits, seconds, n_finished = [], {}, {}
    for trial in trials:
        spent = 0.0
        n_finished[trial.number] = len(record.finished_folds(trial.number))
        for fold in range(record.n_folds):
            fit = record.fit(trial.number, fold)
            rows = fit.epochs()
            spent += sum(row["train_s"] + row["eval_s"] for row in rows)
            if trial.outcome is None and rows and not fit.is_finished:
                scores = rows[-1]["held_out"] or rows[-1]["train"]
                epochs = trial.config["train"]["epochs"]
                score = scores[record.config.study.metric]
                open_fits.append(OpenFit(trial.number, fold, rows[-1]["epoch"], epochs, score))
        seconds[trial.number] = spent
    n_counted = sum(trial.outcome in COUNTED for trial in trials)
    left = record.config.study.trials - n_counted
    is_running = lock.is_held(project.study(name))
    eta_s = None
    if is_running and n_counted and left > 0:
        plan = record.plan() or {}
        ended = sum(seconds[trial.number] for trial in trials if trial.outcome in COUNTED)
        running = sum(seconds[trial.number] for trial in trials if trial.outcome is None)
        eta_s = max(0.0, ended / n_counted * left - running) / max(1, len(plan.get("workers", [1])))
    return StudyStatus(
        name,
        record.config,
        trials,
        n_counted,
        record.n_folds,
        n_finished,
        seconds,
        record.best(),
        tuple(open_fits),
        is_running,
        eta_s,
    )
