"""What a study has reached, read from its record alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpsearch import plan as plans
from hpsearch.config import StudyConfig
from hpsearch.paths import ProjectPaths
from hpsearch.plan import ExecutionPlan
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
    """Seconds to go at the pace of the trials so far, at first by the measured steps; None when it does not run."""


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
    eta_s = _seconds_to_go(record, trials, seconds, left) if is_running and left > 0 else None
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


def _seconds_to_go(
    record: StudyRecord, trials: Sequence[TrialRecord], seconds: Mapping[int, float], n_left: int
) -> float | None:
    table = record.plan()
    if table is None:
        return None
    plan = ExecutionPlan.from_dict(table)
    running = sum(seconds[trial.number] for trial in trials if trial.outcome is None)
    ended = [seconds[trial.number] for trial in trials if trial.outcome in COUNTED]
    if ended:
        return max(0.0, sum(ended) / len(ended) * n_left - running) / len(plan.workers)
    n_images = len(record.folds.ids) if record.has_folds else 0
    total = plans.forecast(record.config, plan, n_images=n_images, n_trials=n_left, n_folds=record.n_folds).total_s
    return max(0.0, total - running / len(plan.workers)) if n_images and total == total else None
