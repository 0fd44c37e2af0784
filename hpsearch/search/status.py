"""Read the progress of a study from its folder."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hpsearch.config import StudyConfig
from hpsearch.paths import ProjectPaths
from hpsearch.search import replicates
from hpsearch.search.constant_predictions import constant_warnings
from hpsearch.search.evaluation import StudyPruner
from hpsearch.search.scheduler import REFINE_EVERY
from hpsearch.store import lock
from hpsearch.store.fits import FitRecord
from hpsearch.store.record import StudyRecord, has_all_replicates
from hpsearch.store.trials import COUNTED, TrialRecord, count_trials
from hpsearch.training.rows import EpochRow
from hpsearch.typed_json import from_json
from hpsearch.workers.jobs import ClusterWorker
from hpsearch.workers.plan import ExecutionPlan, Forecast, sample_space, why_infeasible

Fits = Mapping[int, Sequence[FitRecord]]
"""Maps each trial number to the trial's fits, by fold."""


@dataclass(frozen=True)
class OpenFit:
    """A fit that was started but is not finished."""

    trial: int
    fold: int
    epochs: int
    row: EpochRow | None
    """Last finished epoch; None during the first one."""
    worker: str
    """Name of the worker, also of one that ended with the study; empty if the fit waits for a worker."""
    is_replicate: bool = False
    """Whether the fit is a refit with another seed."""


@dataclass(frozen=True)
class StudyStatus:
    """Status of a study at one moment."""

    name: str
    config: StudyConfig
    trials: tuple[TrialRecord, ...]
    n_counted: int
    """Number of trials that count toward `study.trials`."""
    n_folds: int
    n_finished: dict[int, int]
    """Number of finished folds of each trial."""
    seconds: dict[int, float]
    """Time spent on the training and evaluation of each trial so far, in seconds."""
    best: TrialRecord | None
    """Winner of the ranking; None if no trial can win yet."""
    values: dict[int, float]
    """Value by which each trial that can win is ranked: its mean score, over both fits of each fold if the ranking
    uses its replicate."""
    leader: TrialRecord | None
    """Trial with the highest expected value, if it is not complete yet."""
    leader_value: float
    """Expected value of the leader; NaN if there is none."""
    n_new: int
    """Maximum number of trials that have not begun."""
    gain_probability: float
    """Probability that these trials improve the best score by `study.until_gain`, or by 0.003 if it is 0; 1 if
    unknown."""
    shortlist: tuple[int, ...]
    """Trials to replicate after the search; empty before the search is over."""
    n_replicate_fits: int
    """Number of finished refits."""
    is_confirmed: bool
    """Whether the ranking uses replicates: all of them have ended, and at least one is complete."""
    open_fits: tuple[OpenFit, ...]
    cluster: tuple[ClusterWorker, ...]
    """Connected Dask workers; empty if the study runs on one machine or is not running."""
    scheduler: str
    """Address of the Dask scheduler of the latest run; empty if it was on one machine."""
    is_over: bool
    """Whether the study has nothing left to do."""
    is_running: bool
    eta_s: float | None
    """Estimated seconds until the end, from ended trials or measured steps; None if the study is not running or the
    time is unknown."""
    warnings: tuple[str, ...] = ()
    """Warnings about trials whose network predicts only one class, with the likely causes."""


def study_status(project: ProjectPaths, name: str) -> StudyStatus:
    """Return the status of a study.

    Raises StudyError if the study does not exist, and RecordError if its folder is damaged.
    """
    record = StudyRecord.open(project.study(name))
    trials = tuple(record.trials())
    standing, stored = record.standing(trials), record.valid_shortlist(record.contenders(trials))
    shortlist = stored.trials if stored is not None else ()
    fits = {trial.number: record.fits(trial.number) for trial in trials}
    refits = {number: record.fits(number, replicate=1) for number in sorted(shortlist)}
    seconds = {number: seconds_of(of_trial) for number, of_trial in fits.items()}
    open_fits = {trial.number: fits[trial.number] for trial in trials if trial.outcome is None}
    is_running = lock.is_held(record.paths)
    table = record.plan() or {}
    plan = from_json(ExecutionPlan, table) if is_running and table else None
    is_over = record.is_searched(trials) and has_all_replicates(record)
    pruner = StudyPruner(record, {trial.number: trial for trial in trials}, record.finished_folds)
    number, leader_value = pruner.leader() or (None, math.nan)
    n_new = max(0, record.n_left(trials) - len(open_fits))
    refits_s = sum(map(seconds_of, refits.values()))
    return StudyStatus(
        name=name,
        config=record.config,
        trials=trials,
        n_counted=count_trials(trials),
        n_folds=record.n_folds,
        n_finished={number: sum(fit.is_finished for fit in of_trial) for number, of_trial in fits.items()},
        seconds=seconds,
        best=next((trial for trial in trials if trial.number == standing.winner), None),
        values=standing.values,
        leader=next((trial for trial in trials if trial.number == number and trial.outcome is None), None),
        leader_value=leader_value,
        n_new=n_new,
        gain_probability=pruner.probability_of_gain(n_new) if n_new else 1.0,
        shortlist=shortlist,
        n_replicate_fits=sum(fit.is_finished for of_trial in refits.values() for fit in of_trial),
        is_confirmed=bool(standing.confirmed),
        open_fits=(*_open_fits(record, open_fits), *_open_fits(record, refits, is_replicate=True)),
        cluster=plan.connected if plan is not None and not is_over else (),
        scheduler=table.get("scheduler", ""),
        is_over=is_over,
        is_running=is_running,
        eta_s=seconds_left(record, plan, trials, seconds, refits_s) if plan is not None and not is_over else None,
        warnings=tuple(constant_warnings(record, fits)),
    )


def seconds_of(fits: Sequence[FitRecord]) -> float:
    """Return the seconds of training and evaluation of these fits so far."""
    return sum(row.seconds for fit in fits for row in fit.epochs())


def _open_fits(record: StudyRecord, fits: Fits, *, is_replicate: bool = False) -> Iterator[OpenFit]:
    """Yield the fits that have a worker or epochs but are not finished, by trial and fold."""
    for number, of_trial in fits.items():
        trial = record.trial(number)
        evaluation = record.replicate(number) if is_replicate else trial
        for fold, fit in enumerate(of_trial):
            rows, worker = fit.epochs(), evaluation.workers.get(str(fold), "") if evaluation is not None else ""
            if (rows or worker) and not fit.is_finished:
                row = rows[-1] if rows else None
                yield OpenFit(number, fold, trial.config["train"]["epochs"], row, worker, is_replicate)


def seconds_left(
    record: StudyRecord,
    plan: ExecutionPlan,
    trials: Sequence[TrialRecord],
    seconds: Mapping[int, float],
    refits_s: float,
) -> float | None:
    """Estimate the seconds until the end of a running study; None if nothing is known.

    `seconds` maps each trial to the time spent on it so far, and `refits_s` is the time spent on refits. The estimate
    is based on ended trials, or on measured steps if no trial has ended. A refit is assumed to take as long as the
    longest trial.
    """
    n_left, stored = record.n_left(trials), record.valid_shortlist(record.contenders(trials))
    n_replicates = len(stored.trials) if stored is not None else replicates.n_left(record, n_left)
    running_s = refits_s + sum(seconds[trial.number] for trial in trials if trial.outcome is None)
    ended_s = [seconds[trial.number] for trial in trials if trial.outcome in COUNTED]
    if ended_s:
        whole_s = n_left * sum(ended_s) / len(ended_s) + n_replicates * max(ended_s)
        return max(0.0, whole_s - running_s) / len(plan.workers)
    expected_s = forecast(record, plan, len(record.folds.ids)).expected_s
    return None if math.isnan(expected_s) else max(0.0, expected_s - running_s / len(plan.workers))


def forecast(record: StudyRecord, plan: ExecutionPlan, n_images: int) -> Forecast:
    """Return the expected cost of the rest of a study, from the measured steps and a sample of the search space."""
    config, n_folds = record.config, record.n_folds
    n_trials = record.n_left(record.trials())
    n_replicates = replicates.n_left(record, n_trials)
    n_held_out = n_images // n_folds if n_folds > 1 else 0
    candidates = [each for each in sample_space(config, 64) if why_infeasible(each, plan) is None]
    epochs_s = [
        each.train.epochs * plan.epoch_s(each, n_images - n_held_out, n_held_out) for each in candidates or [config]
    ]
    fit_s, n_fits = float(np.mean(epochs_s)), (n_trials + n_replicates) * n_folds
    n_expected = n_fits
    if config.study.pruner == "race" and n_folds > 1:
        # The first fold of every trial, some further ones, and all folds of two trials, which are also refitted.
        first, further = n_trials + n_trials // REFINE_EVERY, min(2, n_trials) * (n_folds - 1)
        n_expected = min(n_fits, first + further + min(2, n_replicates) * n_folds)
    total_s, expected_s = (fit_s * n / max(1, len(plan.workers)) for n in (n_fits, n_expected))
    return Forecast(n_trials, n_replicates, n_images, fit_s, total_s, expected_s)
