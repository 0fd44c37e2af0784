"""Read from the record how far a study is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hpsearch.config import StudyConfig
from hpsearch.paths import ProjectPaths
from hpsearch.search import constant_predictions, replicates
from hpsearch.store import lock
from hpsearch.store.fits import FitRecord
from hpsearch.store.record import StudyRecord, has_all_replicates
from hpsearch.store.trials import COUNTED, TrialRecord, count_trials
from hpsearch.typed_json import from_json
from hpsearch.workers import plan as plans
from hpsearch.workers.plan import ExecutionPlan

Fits = Mapping[int, Sequence[FitRecord]]
"""Fits of each trial, by fold."""


@dataclass(frozen=True)
class OpenFit:
    """A fit that was started and is not finished."""

    trial: int
    fold: int
    epoch: int
    """Epochs done."""
    epochs: int
    score: float
    """Held-out mean after the last epoch done."""
    is_replicate: bool = False
    """Whether it is a refit with another seed."""


@dataclass(frozen=True)
class StudyStatus:
    """A study at one moment."""

    name: str
    config: StudyConfig
    trials: tuple[TrialRecord, ...]
    n_counted: int
    """Trials that count toward `study.trials`."""
    n_folds: int
    n_finished: dict[int, int]
    """Number of finished folds of each trial."""
    seconds: dict[int, float]
    """Seconds of training and evaluation of each trial so far."""
    best: TrialRecord | None
    values: dict[int, float]
    """Value by which each trial that can win is ranked: the mean over both fits if it was refitted."""
    shortlist: tuple[int, ...]
    """Trials that are refitted after the search; empty before the search is over."""
    n_replicate_fits: int
    """Finished fits of their refits."""
    is_confirmed: bool
    """Whether all refits are finished, so that the ranking uses both fits."""
    open_fits: tuple[OpenFit, ...]
    is_over: bool
    """Whether nothing is left to do."""
    is_running: bool
    eta_s: float | None
    """Estimated seconds until the end, from the trials so far or from measured steps; None if it is not running."""
    warnings: tuple[str, ...] = ()
    """Sentences about trials whose network predicts one class only, with the likely causes."""


def study_status(project: ProjectPaths, name: str) -> StudyStatus:
    """Return the status of a study. Raise StudyError if it does not exist, RecordError if its folder is damaged."""
    record = StudyRecord.open(project.study(name))
    trials = tuple(record.trials())
    fits = {trial.number: [record.fit(trial.number, fold) for fold in range(record.n_folds)] for trial in trials}
    seconds = {number: sum(map(_seconds, of_trial)) for number, of_trial in fits.items()}
    shortlist = _shortlist(record, trials)
    refits = {number: [record.replicate_fit(number, fold) for fold in range(record.n_folds)] for number in shortlist}
    running = {trial.number: fits[trial.number] for trial in trials if trial.outcome is None}
    n_finished = {number: sum(fit.is_finished for fit in of_trial) for number, of_trial in fits.items()}
    standing = record.standing(trials)
    is_running = lock.is_held(record.paths)
    return StudyStatus(
        name=name,
        config=record.config,
        trials=trials,
        n_counted=count_trials(trials),
        n_folds=record.n_folds,
        n_finished=n_finished,
        seconds=seconds,
        best=next((trial for trial in trials if trial.number == standing.winner), None),
        values=standing.values,
        shortlist=shortlist,
        n_replicate_fits=sum(fit.is_finished for of_trial in refits.values() for fit in of_trial),
        is_confirmed=bool(standing.confirmed),
        open_fits=(*_open_fits(record, trials, running), *_open_fits(record, trials, refits, is_replicate=True)),
        is_over=record.is_searched(trials) and has_all_replicates(record),
        is_running=is_running,
        eta_s=_seconds_left(record, trials, seconds, refits) if is_running else None,
        warnings=tuple(
            constant_predictions.describe(record, constant_predictions.find_constant_fits(record, n_finished))
        ),
    )


def _seconds(fit: FitRecord) -> float:
    """Return the seconds of training and evaluation of a fit so far."""
    return sum(row.seconds for row in fit.epochs())


def _shortlist(record: StudyRecord, trials: Sequence[TrialRecord]) -> tuple[int, ...]:
    """Return the trials to refit; empty if none were selected, or if a trial has been completed since then."""
    stored = record.shortlist()
    if stored is None or stored.of != tuple(trial.number for trial in record.contenders(trials)):
        return ()
    return tuple(stored.trials)


def _open_fits(
    record: StudyRecord, trials: Sequence[TrialRecord], fits: Fits, *, is_replicate: bool = False
) -> Iterator[OpenFit]:
    """Yield those of the fits that have epochs and are not finished, by trial and fold."""
    for trial in trials:
        for fold, fit in enumerate(fits.get(trial.number, ())):
            rows = fit.epochs()
            if rows and not fit.is_finished:
                score = getattr(rows[-1].scores, record.config.study.metric)
                epochs = trial.config["train"]["epochs"]
                yield OpenFit(trial.number, fold, rows[-1].epoch, epochs, score, is_replicate)


def _seconds_left(
    record: StudyRecord, trials: Sequence[TrialRecord], seconds: Mapping[int, float], refits: Fits
) -> float | None:
    """Estimate the seconds until the end of a running study; None if nothing is known or left."""
    table = record.plan()
    if table is None:
        return None
    plan = from_json(ExecutionPlan, table)
    n_left = record.n_left(trials)
    if n_left > 0:
        return _search_seconds_left(record, plan, trials, seconds, n_left)
    of_refits = [fit for of_trial in refits.values() for fit in of_trial]
    if all(fit.is_finished for fit in of_refits):
        return None
    # A refit takes as long as the first fit.
    left_s = sum(seconds[number] for number in refits) - sum(map(_seconds, of_refits))
    return max(0.0, left_s) / len(plan.workers)


def _search_seconds_left(
    record: StudyRecord,
    plan: ExecutionPlan,
    trials: Sequence[TrialRecord],
    seconds: Mapping[int, float],
    n_left: int,
) -> float | None:
    """Estimate the seconds for `n_left` trials and the refits, from ended trials or else from measured steps."""
    running_s = sum(seconds[trial.number] for trial in trials if trial.outcome is None)
    ended_s = [seconds[trial.number] for trial in trials if trial.outcome in COUNTED]
    n_replicates = replicates.n_left(record, n_left)
    if ended_s:
        # The best complete trials are refitted. While there are none, the longest ended trial stands for them.
        ranking = record.standing(trials).ranking
        refit_s = [seconds[number] for number in ranking[:n_replicates]] or [max(ended_s)]
        whole_s = n_left * sum(ended_s) / len(ended_s) + n_replicates * sum(refit_s) / len(refit_s)
        return max(0.0, whole_s - running_s) / len(plan.workers)
    n_images = len(record.folds.ids) if record.has_folds else 0
    total_s = plans.forecast(
        record.config, plan, n_images=n_images, n_trials=n_left, n_folds=record.n_folds, n_replicates=n_replicates
    ).total_s
    return max(0.0, total_s - running_s / len(plan.workers)) if n_images and not math.isnan(total_s) else None
