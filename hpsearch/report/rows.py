"""Read from the record what the report of a study shows, as typed rows. Knows no drawing and no HTML."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hpsearch.config import StudyConfig, get_setting
from hpsearch.errors import RecordError
from hpsearch.models.network import n_parameters, why_impossible
from hpsearch.report.estimates import Estimates
from hpsearch.report.final_record import EvaluationHistory, FinalRecord, history_of
from hpsearch.report.trial_rows import scores_by_fold, trial_epochs
from hpsearch.search.constant_predictions import constant_warnings
from hpsearch.search.importance import importances
from hpsearch.stats.intervals import Floats, Interval, Paired, bootstrap_mean
from hpsearch.stats.selection import Corrected
from hpsearch.stats.study_scores import TrialStatistics
from hpsearch.store import lock
from hpsearch.store import test_set_log as log
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
    epochs: tuple[int, ...]
    """Number of finished epochs, by fold."""
    n_epochs: int
    """Number of epochs of a complete fit."""
    seconds: float
    """Time spent on training and evaluation so far."""
    memory_bytes: int | None
    """Predicted peak of a training step; None for an impossible network, or without a plan."""
    n_parameters: int | None
    """None for an impossible network."""
    reason: str

    @property
    def whole_s(self) -> float:
        """Extrapolated seconds of all folds; 0 before the first epoch."""
        return self.seconds / (sum(self.epochs) or 1) * self.n_epochs * len(self.epochs)


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
    """Out-of-fold score of every held-out image."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FinalRow(FinalRecord, EvaluationHistory):
    """One final of a study as the report shows it."""

    name: str
    cv_scores: dict[str, Interval]
    """Out-of-fold score by name: mean over images with its 95 % interval over images."""
    scores: Floats
    """The study's metric on every test image, mean over the networks."""


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

    def trial(self, number: int) -> TrialRow:
        return next(row for row in self.trials if row.number == number)

    @property
    def winner_final(self) -> FinalRow | None:
        """The last final of the winner."""
        return next((final for final in reversed(self.finals) if final.trial == self.standing.winner), None)


def study_rows(record: StudyRecord) -> StudyRows:
    """Return the rows of a study in its present state, also while it runs.

    Raises RecordError if the folder is damaged, or if the study has no folds yet.
    """
    trials, estimates = record.trials(), Estimates.of(record)
    finals = [_final_row(record, name, estimates) for name in record.paths.final_names()]
    finals.sort(key=lambda final: (final.ended_at, final.name))
    times = [trial.ended_at or trial.began_at for trial in trials] + [final.ended_at for final in finals]
    return StudyRows(
        name=record.name,
        config=record.config,
        n_folds=record.n_folds,
        n_images=int(np.sum(np.asarray(record.folds.fold_of) >= 0)),
        is_running=lock.is_held(record.paths),
        updated_at=max(times, default=0.0),
        n_counted=count_trials(trials),
        trials=tuple(_trial_row(record, trial, estimates) for trial in trials),
        standing=record.standing(trials),
        winner=_winner(record, estimates, finals) if estimates is not None else None,
        importances=importances(record),
        finals=tuple(finals),
        data_key=record.data_key(),
        folds=f"{record.folds.method}, SHA-256 {record.folds.to_dict()['digest']}",
        machine={name: str(value) for name, value in ((record.plan() or {}).get("machine") or {}).items()},
        warnings=tuple(constant_warnings(record, record.trial_numbers())),
    )


def _trial_row(record: StudyRecord, trial: TrialRecord, estimates: Estimates | None) -> TrialRow:
    config, data, plan = trial.study_config, trial.study_config.data, record.plan()
    statistics = estimates.statistics.get(trial.number) if estimates is not None else None
    epochs = trial_epochs(record, trial.number)
    is_possible = why_impossible(config.unet, data.n_channels, data.height, data.width) is None
    return TrialRow(
        number=trial.number,
        outcome=trial.outcome or "open",
        params={name: get_setting(config, name) for name in record.config.search},
        value=trial.value if statistics is None else statistics.mean,
        statistics=statistics,
        epochs=tuple(map(len, epochs)),
        n_epochs=config.train.epochs,
        seconds=float(sum(row.seconds for rows in epochs for row in rows)),
        memory_bytes=predicted_bytes(config, from_json(ExecutionPlan, plan)) if is_possible and plan else None,
        n_parameters=n_parameters(config.unet, data.n_channels) if is_possible else None,
        reason=trial.reason,
    )


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


def _final_row(record: StudyRecord, name: str, estimates: Estimates | None) -> FinalRow:
    result = FinalRecord.read(record.paths.final(name))
    number, n_runs = result.trial, max(1, result.n_seeds)
    kinds = (False, True) if number in record.confirmed() else (False,)
    scores = scores_by_fold([record.fits(number, replicate=replicate) for replicate in kinds])
    # The trials may have gone on since the final.
    predicted = estimates.predicted(number, n_test=result.n_test, n_runs=n_runs) if estimates else None
    return FinalRow(
        **(vars(result) | {"predicted": predicted}),
        **history_of(record, _evaluation_of(record, result)),
        name=name,
        cv_scores={name: bootstrap_mean(np.concatenate(folds)) for name, folds in scores.items()},
        scores=_test_scores(record, name),
    )


def _evaluation_of(record: StudyRecord, result: FinalRecord) -> log.LoggedEvaluation:
    """Return a final's entry in the test-set log. Version 0.1 did not record which entry it is."""
    project = record.paths.project
    if (found := log.find_evaluation(project, result.look)) is not None:
        return found
    facts = {name: getattr(result, name) for name in ("test_set", "trial", "metric")}
    facts |= {
        "study": record.name,
        "study_began_at": record.trials()[0].began_at,
        "folder": str(project.root.absolute()),
    }
    score = result.test[result.metric].mean
    known = log.LoggedEvaluation(at=result.ended_at, n_images=result.n_test, score=score, id="", **facts)
    wanted = (known.test_set, known.configuration)
    entries = (each for each in log.evaluations_of(project, known) if each.id)
    return next((each for each in entries if (each.test_set, each.configuration) == wanted), known)


def _test_scores(record: StudyRecord, name: str) -> Floats:
    table = record.paths.final(name).table
    try:
        with table.open(encoding="utf-8", newline="") as file:
            return np.array([float(row[record.config.study.metric]) for row in csv.DictReader(file)])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise RecordError(f"{table} is damaged: {error}") from error
