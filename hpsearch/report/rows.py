"""Read from the record what the report of a study shows, as typed rows. Knows no drawing and no HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hpsearch.config import StudyConfig, get_setting
from hpsearch.models.costs import n_parameters, why_impossible
from hpsearch.report.estimates import Estimates
from hpsearch.report.finals import FinalRow, final_rows
from hpsearch.search.constant_predictions import constant_warnings
from hpsearch.search.importance import importances
from hpsearch.stats.intervals import Floats, Interval, Paired
from hpsearch.stats.selection import Corrected
from hpsearch.stats.study_scores import TrialStatistics
from hpsearch.store import lock
from hpsearch.store.record import StudyRecord
from hpsearch.store.trials import Outcome, Standing, TrialRecord, count_trials
from hpsearch.typed_json import from_json
from hpsearch.workers.plan import ExecutionPlan, predicted_bytes

N_TEST = 600
"""Assumed number of test images before a test set was scored: as many as ISIC-2017 has."""


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    """One trial: params, result and cost."""

    number: int
    outcome: Outcome | Literal["open"]
    params: dict[str, Any]
    """Every searched setting."""
    value: float | None
    """Mean if complete, estimate if pruned."""
    statistics: TrialStatistics | None
    """Statistics of complete trials, over both fits if replicated."""
    is_replicated: bool
    """Whether it was refitted with new seeds, and both fits count."""
    epochs: tuple[int, ...]
    """Epochs done, by fold."""
    n_epochs: int
    """Epochs of a whole fit."""
    n_finished: int
    """Folds that were trained to the end."""
    seconds: float
    """Training and evaluation so far."""
    whole_s: float | None
    """Extrapolated seconds of all folds; None before the first epoch."""
    memory_bytes: int | None
    """Predicted peak of a training step; None for an impossible network, or without a plan."""
    n_parameters: int | None
    """None for an impossible network."""
    reason: str
    pruned_at: tuple[int, int] | None
    """Fold (from 0) and epoch (from 1) of the decision, if it was pruned."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Winner:
    """The best complete trial, with its uncertainty."""

    number: int
    statistics: TrialStatistics
    corrected: Corrected
    """Its mean, corrected for selection bias; `trial` is a row of the complete trials, not a number."""
    predicted: Interval
    """Mean on `n_predicted` new images after retraining, with a 95 % prediction interval."""
    n_predicted: int
    is_default: bool
    """Whether it has the default configuration: trial 0, or a copy of it."""
    gain: Paired | None
    """Gain over trial 0; None if it is trial 0, or trial 0 is not complete."""
    tied: tuple[int, ...]
    """Numbers of the trials that cannot be distinguished from the best, including it, best first."""
    cheapest: int
    """The tied trial whose cross-validation took the least time."""
    scores: Floats
    """Its out-of-fold score of every held-out image."""


@dataclass(frozen=True, kw_only=True)
class Race:
    """Training time that pruning saved, over the complete and pruned trials."""

    spent_s: float
    whole_s: float
    """Cross-validation of all of them on all folds, each at its own pace."""

    @property
    def share(self) -> float:
        return self.spent_s / self.whole_s


@dataclass(frozen=True, kw_only=True, eq=False)
class StudyRows:
    """Everything that the report of a study shows."""

    name: str
    config: StudyConfig
    n_folds: int
    n_images: int
    """Images that were held out once."""
    is_running: bool
    updated_at: float
    """Unix time at which the last trial ended, or began if it is open; 0 before the first."""
    n_counted: int
    """Trials that count toward `study.trials`."""
    trials: tuple[TrialRow, ...]
    standing: Standing
    """The ranking of the trials that can win, and the values by which they are ranked."""
    winner: Winner | None
    """None while no trial is complete."""
    race: Race | None
    """None while no trial is complete or pruned."""
    replicates: tuple[int, int] | None
    """Replicate fits done and to do, while some are missing; None before and after."""
    importances: dict[str, float]
    finals: tuple[FinalRow, ...]
    """In the order in which they ended."""
    data_key: str
    folds: str
    """Method and digest of the folds."""
    machine: dict[str, str]
    """Device, precision, threads and versions."""
    warnings: tuple[str, ...] = ()
    """Sentences about trials whose network predicts one class only, with the likely causes."""

    @property
    def metric(self) -> str:
        return self.config.study.metric

    @property
    def is_fixed_split(self) -> bool:
        return self.config.study.folds == "fixed"

    @property
    def is_sample(self) -> bool:
        """Whether the images are the built-in drawings."""
        return self.config.data.root == "sample" and not self.config.data.images

    @property
    def complete(self) -> tuple[TrialRow, ...]:
        """The trials that can win, best first."""
        return tuple(self.trial(number) for number in self.standing.ranking)

    @property
    def n_replicated(self) -> int:
        """Number of trials that were refitted with new seeds."""
        return len(self.standing.confirmed)

    def trial(self, number: int) -> TrialRow:
        return next(row for row in self.trials if row.number == number)

    @property
    def winner_final(self) -> FinalRow | None:
        """The last final of the winner."""
        number = self.winner.number if self.winner is not None else None
        return next((final for final in reversed(self.finals) if final.trial == number), None)


def study_rows(record: StudyRecord) -> StudyRows:
    """Return the rows of a study in its present state, also while it runs.

    Raises RecordError if the folder is damaged, or if the study has no folds yet.
    """
    trials, estimates = record.trials(), Estimates.of(record)
    standing = record.standing(trials)
    rows = tuple(_trial_row(record, trial, estimates, standing.confirmed) for trial in trials)
    finals = final_rows(record, estimates, trials)
    times = [trial.ended_at or trial.began_at for trial in trials] + [final.ended_at for final in finals]
    return StudyRows(
        name=record.name,
        config=record.config,
        n_folds=record.n_folds,
        n_images=int(np.sum(np.asarray(record.folds.fold_of) >= 0)),
        is_running=lock.is_held(record.paths),
        updated_at=max(times, default=0.0),
        n_counted=count_trials(trials),
        trials=rows,
        standing=standing,
        winner=_winner(record, estimates, finals) if estimates is not None else None,
        race=_race(rows),
        replicates=_replicates(record),
        importances=importances(record),
        finals=finals,
        data_key=record.data_key(),
        folds=f"{record.folds.method}, SHA-256 {record.folds.to_dict()['digest']}",
        machine={name: str(value) for name, value in ((record.plan() or {}).get("machine") or {}).items()},
        warnings=tuple(constant_warnings(record, record.trial_numbers())),
    )


def _trial_row(
    record: StudyRecord, trial: TrialRecord, estimates: Estimates | None, replicated: Sequence[int]
) -> TrialRow:
    config, data = trial.study_config, trial.study_config.data
    statistics = estimates.statistics.get(trial.number) if estimates is not None else None
    fits = [record.fit(trial.number, fold) for fold in range(record.n_folds)]
    epochs = [fit.epochs() for fit in fits]
    n_done = sum(len(rows) for rows in epochs)
    seconds = float(sum(row.seconds for rows in epochs for row in rows))
    decision = next((each for each in reversed(trial.decisions) if each.drop), None)
    is_possible = why_impossible(config.unet, data.n_channels, data.height, data.width) is None
    plan = record.plan()
    return TrialRow(
        number=trial.number,
        outcome=trial.outcome or "open",
        params={name: get_setting(config, name) for name, _ in record.config.search},
        value=trial.value if statistics is None else statistics.mean,
        statistics=statistics,
        is_replicated=trial.number in replicated,
        epochs=tuple(len(rows) for rows in epochs),
        n_epochs=config.train.epochs,
        n_finished=sum(fit.is_finished for fit in fits),
        seconds=seconds,
        whole_s=seconds / n_done * config.train.epochs * record.n_folds if n_done else None,
        memory_bytes=predicted_bytes(config, from_json(ExecutionPlan, plan)) if is_possible and plan else None,
        n_parameters=n_parameters(config.unet, data.n_channels) if is_possible else None,
        reason=trial.reason,
        pruned_at=(decision.fold, decision.epoch) if trial.outcome == "pruned" and decision else None,
    )


def _race(rows: Sequence[TrialRow]) -> Race | None:
    ended = [row for row in rows if row.outcome in ("complete", "pruned") and row.whole_s is not None]
    if not ended:
        return None
    return Race(spent_s=sum(row.seconds for row in ended), whole_s=sum(row.whole_s or 0 for row in ended))


def _replicates(record: StudyRecord) -> tuple[int, int] | None:
    shortlist = record.shortlist()
    if shortlist is None or shortlist.of != tuple(trial.number for trial in record.complete_trials()):
        return None
    ended = {second.trial for second in record.replicate_records() if second.outcome is not None}
    if ended.issuperset(shortlist.trials):
        return None
    fits = [record.replicate_fit(number, fold) for number in shortlist.trials for fold in range(record.n_folds)]
    return sum(fit.is_finished for fit in fits), len(fits)


def _winner(record: StudyRecord, estimates: Estimates, finals: Sequence[FinalRow]) -> Winner:
    number = estimates.winner
    n_test = next((final.n_test for final in reversed(finals) if final.trial == number), N_TEST)
    predicted = estimates.predicted(number, n_test=n_test)
    assert predicted is not None
    return Winner(
        number=number,
        statistics=estimates.statistics[number],
        corrected=estimates.corrected,
        predicted=predicted,
        n_predicted=n_test,
        is_default=record.is_default(record.trial(number)),
        gain=estimates.gain(number),
        tied=estimates.tied,
        cheapest=estimates.cheapest_tied(record),
        scores=estimates.scores.joint[estimates.corrected.trial],
    )
