"""Read the content of a study's report from the record as typed rows. Contains no drawing and no HTML."""

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
"""Number of test images that predictions assume before a final exists: the size of the ISIC-2017 test set."""


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    """Params, result and cost of a trial."""

    number: int
    outcome: Outcome | Literal["open"]
    params: dict[str, Any]
    """Value of each searched setting."""
    value: float | None
    """Mean score of a complete trial, or estimate of a pruned one; None if there is neither."""
    statistics: TrialStatistics | None
    """Statistics of a complete trial, over both fits if it was replicated; None for other trials."""
    epochs: tuple[int, ...]
    """Number of finished epochs of each fold."""
    n_epochs: int
    """Number of epochs of a complete fit."""
    seconds: float
    """Time spent on training and evaluation so far."""
    memory_bytes: int | None
    """Predicted peak memory of a training step; None if the network is impossible or there is no plan."""
    n_parameters: int | None
    """Number of parameters of the network; None if the network is impossible."""
    reason: str

    @property
    def whole_s(self) -> float:
        """Extrapolated time to train all folds, in seconds; 0 before the first epoch."""
        return self.seconds / (sum(self.epochs) or 1) * self.n_epochs * len(self.epochs)


@dataclass(frozen=True, kw_only=True, eq=False)
class Winner:
    """The best complete trial, with its uncertainty."""

    number: int
    statistics: TrialStatistics
    corrected: Corrected
    """Mean score, corrected for selection bias. Its field `trial` is an index into the complete trials."""
    predicted: Interval
    """Predicted mean on `n_predicted` new images after retraining, with a 95 % prediction interval."""
    n_predicted: int
    """Number of images that the prediction is for."""
    is_default: bool
    """Whether the winner has the default configuration, that is, it is trial 0 or a copy of it."""
    gain: Paired | None
    """Gain over trial 0, corrected for selection; None if the winner is trial 0, or if trial 0 is not complete."""
    tied: tuple[int, ...]
    """Numbers of the trials that cannot be distinguished from the best, best first. Includes the winner."""
    cheapest: int
    """Number of the tied trial whose cross-validation took the least time."""
    scores: Floats
    """Out-of-fold score of each held-out image."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FinalRow(FinalRecord, EvaluationHistory):
    """Result of a final, with the data that the report adds."""

    name: str
    """Name of the final's folder, like `trial-0007`."""
    cv_scores: dict[str, Interval]
    """Out-of-fold scores by name: means over images with 95 % intervals over images."""
    scores: Floats
    """Score of each test image in the study's metric, averaged over the retrained networks."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StudyRows:
    """Content of the report of a study."""

    name: str
    config: StudyConfig
    n_folds: int
    n_images: int
    """Number of images that are held out in one of the folds."""
    is_running: bool
    updated_at: float
    """Unix time of the latest end of a trial or final, or of the latest start of an open trial; 0 without trials."""
    n_counted: int
    """Number of trials that count toward `study.trials`."""
    trials: tuple[TrialRow, ...]
    standing: Standing
    """Ranking of the trials that can win, and the values by which they are ranked."""
    winner: Winner | None
    """The best complete trial; None if no trial is complete."""
    importances: dict[str, float]
    """Share of the variance between trials that each searched setting explains."""
    finals: tuple[FinalRow, ...]
    """Finals in the order in which they ended."""
    data_key: str
    folds: str
    """Method and digest of the folds."""
    machine: dict[str, str]
    """Device, precision, threads and versions of the study's plan."""
    warnings: tuple[str, ...] = ()
    """Warnings about trials whose network predicts only one class, with the likely causes."""

    @property
    def metric(self) -> str:
        return self.config.study.metric

    @property
    def is_fixed_split(self) -> bool:
        return self.config.study.folds == "fixed"

    @property
    def is_sample(self) -> bool:
        """Whether the study uses the built-in synthetic dataset."""
        return self.config.data.root == "sample" and not self.config.data.images

    @property
    def complete(self) -> tuple[TrialRow, ...]:
        """Rows of the trials that can win, best first."""
        return tuple(self.trial(number) for number in self.standing.ranking)

    def trial(self, number: int) -> TrialRow:
        return next(row for row in self.trials if row.number == number)

    @property
    def winner_final(self) -> FinalRow | None:
        """Latest final of the winner; None if there is none."""
        return next((final for final in reversed(self.finals) if final.trial == self.standing.winner), None)


def study_rows(record: StudyRecord) -> StudyRows:
    """Read the content of the report for the present state of a study, which may be running.

    Raises RecordError if the study's folder is damaged or has no folds yet.
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
    replicates = (0, 1) if number in record.standing().confirmed else (0,)
    scores = scores_by_fold([record.fits(number, replicate) for replicate in replicates])
    # The search may have continued after the final, so compute the prediction again.
    predicted = estimates.predicted(number, n_test=result.n_test, n_runs=n_runs) if estimates else None
    return FinalRow(
        **(vars(result) | {"predicted": predicted}),
        **history_of(record, _evaluation_of(record, result)),
        name=name,
        cv_scores={name: bootstrap_mean(np.concatenate(folds)) for name, folds in scores.items()},
        scores=_test_scores(record, name),
    )


def _evaluation_of(record: StudyRecord, result: FinalRecord) -> log.LoggedEvaluation:
    """Return the test-set log entry of a final.

    Version 0.1 did not store the id of the entry, so look for an entry of the same test set and configuration. If
    there is none, return an entry made from the result.
    """
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
