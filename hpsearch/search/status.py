"""What a study has reached, read from its record alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpsearch.config import StudyConfig
from hpsearch.paths import ProjectPaths
from hpsearch.search import constant_predictions as constant
from hpsearch.search import replicates as confirmation
from hpsearch.store import lock
from hpsearch.store.record import StudyRecord, has_all_replicates
from hpsearch.store.trials import COUNTED, TrialRecord
from hpsearch.training.rows import EpochRow
from hpsearch.workers import plan as plans
from hpsearch.workers.plan import ExecutionPlan


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
    is_second: bool = False


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
    values: dict[int, float]
    """What each trial that can win is ranked by: the mean of both its fits where it is confirmed."""
    shortlist: tuple[int, ...]
    """Trials that are fitted once more, or were; empty before the search is over."""
    n_second: int
    """Their finished second fits."""
    is_confirmed: bool
    """Whether all of them are there, so that the ranking goes by both fits."""
    open_fits: tuple[OpenFit, ...]
    is_over: bool
    """Whether nothing is left to do."""
    is_running: bool
    eta_s: float | None
    """Seconds to go at the pace of the trials so far, at first by the measured steps; None when it does not run."""
    warnings: tuple[str, ...] = ()
    """Sentences about trials whose network predicts one class only, with the likely causes."""


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
            spent += sum(row.seconds for row in rows)
            if trial.outcome is None and rows and not fit.is_finished:
                open_fits.append(_open_fit(record, trial, fold, rows[-1]))
        seconds[trial.number] = spent
    n_counted = sum(trial.outcome in COUNTED for trial in trials)
    left = record.n_left(trials)
    is_running = lock.is_held(project.study(name))
    eta_s = _seconds_to_go(record, trials, seconds, left) if is_running and left > 0 else None
    shortlist, n_second, second_s = _second_fits(record, trials, open_fits)
    plan = record.plan()
    if is_running and left <= 0 and plan is not None and n_second < len(shortlist) * record.n_folds:
        whole = sum(seconds[number] for number in shortlist)
        eta_s = max(0.0, whole - second_s) / len(ExecutionPlan.from_dict(plan).workers)
    standing = record.standing(trials)
    return StudyStatus(
        name,
        record.config,
        trials,
        n_counted,
        record.n_folds,
        n_finished,
        seconds,
        next((trial for trial in trials if trial.number == standing.winner), None),
        standing.values,
        shortlist,
        n_second,
        bool(standing.confirmed),
        tuple(open_fits),
        record.is_searched(trials) and has_all_replicates(record),
        is_running,
        eta_s,
        tuple(constant.describe(record, constant.find_constant_fits(record, n_finished))),
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
    n_replicates = confirmation.n_left(record, n_left)
    if ended:
        # The best full ones are fitted once more; as long as there is none, the longest that ended must do.
        ranking = record.standing(trials).ranking
        again = [seconds[number] for number in ranking[:n_replicates]] or [max(ended)]
        confirming = n_replicates * sum(again) / len(again)
        return max(0.0, sum(ended) / len(ended) * n_left + confirming - running) / len(plan.workers)
    n_images = len(record.folds.ids) if record.has_folds else 0
    total = plans.forecast(
        record.config, plan, n_images=n_images, n_trials=n_left, n_folds=record.n_folds, n_replicates=n_replicates
    ).total_s
    return max(0.0, total - running / len(plan.workers)) if n_images and total == total else None


def _second_fits(
    record: StudyRecord, trials: Sequence[TrialRecord], open_fits: list[OpenFit]
) -> tuple[tuple[int, ...], int, float]:
    """The shortlist while it stands, its finished second fits and their seconds; adds to `open_fits`."""
    stored = record.shortlist()
    full = record.contenders(trials)
    if stored is None or stored.of != tuple(trial.number for trial in full):
        return (), 0, 0.0
    n_finished, seconds = 0, 0.0
    for trial in full:
        for fold in range(record.n_folds) if trial.number in stored.trials else ():
            fit = record.replicate_fit(trial.number, fold)
            rows = fit.epochs()
            seconds += sum(row.seconds for row in rows)
            n_finished += fit.is_finished
            if rows and not fit.is_finished:
                open_fits.append(_open_fit(record, trial, fold, rows[-1], is_second=True))
    return stored.trials, n_finished, seconds


def _open_fit(
    record: StudyRecord, trial: TrialRecord, fold: int, row: EpochRow, *, is_second: bool = False
) -> OpenFit:
    score = getattr(row.scores, record.config.study.metric)
    return OpenFit(trial.number, fold, row.epoch, trial.config["train"]["epochs"], score, is_second)
