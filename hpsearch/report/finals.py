"""Read the results of `hpsearch final` from the record, as typed rows."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hpsearch.data.duplicates import DuplicatePair
from hpsearch.errors import RecordError
from hpsearch.inference.postprocessing import SelectedPostprocessing
from hpsearch.report.estimates import Estimates
from hpsearch.report.final_record import EnsembleResult, FinalRecord
from hpsearch.stats.intervals import Floats, Interval, bootstrap_mean
from hpsearch.store.record import StudyRecord
from hpsearch.store.test_set_log import (
    LoggedEvaluation,
    evaluations_of,
    find_evaluation,
    first_evaluation_of,
    n_evaluations_before,
)
from hpsearch.store.trials import TrialRecord
from hpsearch.training.metrics import SCORES, PixelCounts


@dataclass(frozen=True, kw_only=True, eq=False)
class FinalScores:
    """Test scores of a retrained configuration, and what they may be compared with."""

    n_pool: int
    """Number of pool images that the networks were trained on."""
    n_test: int
    """Number of test images."""
    test: dict[str, Interval]
    """Score by name at the size of the search: mean over images, and over seeds, with its 95 % interval over images.
    Scored as all trials are: threshold 0.5, no test-time augmentation, no cleaning."""
    official: dict[str, Interval]
    """Official score by name, at each image's own resolution, of the network that is kept (the first seed's) with its
    post-processing. Mean over images with its 95 % interval; empty if they were not computed."""
    predicted: Interval | None
    """Prediction of the search for this many test images, with its 95 % interval; None if it is not the winner."""
    chosen: SelectedPostprocessing | None
    """Post-processing selected on out-of-fold predictions; None if no fold networks were kept."""
    chosen_test: dict[str, Interval]
    """Like `test`, of the network that is kept, with the selected post-processing; empty if there is none."""
    ensemble: EnsembleResult | None
    """The ensemble of the fold networks; None unless it was asked for."""
    evaluation: LoggedEvaluation
    """This evaluation of the test images, as recorded in the account of test-set evaluations."""
    evaluations: tuple[LoggedEvaluation, ...]
    """All known evaluations of any of these test images, this one included, in the order of time."""
    n_evaluations_before: int
    """Number of evaluations before the study began."""
    n_trials_after: int
    """Number of trials of the study that began after its first evaluation of these images."""
    leaks: tuple[DuplicatePair, ...]
    """Duplicates and near-duplicates with one image in the pool and one in the test split."""
    without_leaks: float | None
    """Mean of the study's metric over the test images without duplicates; None without leaks, or if all have one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FinalRow(FinalScores):
    """One final of a study as the report shows it."""

    name: str
    trial: int
    n_seeds: int
    ended_at: float
    cv: dict[str, Interval]
    """Out-of-fold score by name: mean over images with its 95 % interval over images."""
    scores: Floats
    """The study's metric on every test image, mean over the networks."""


def final_rows(
    record: StudyRecord, estimates: Estimates | None, trials: Sequence[TrialRecord]
) -> tuple[FinalRow, ...]:
    """Return the finals of a study in the order in which they ended."""
    if not record.paths.finals.is_dir():
        return ()
    folders = [record.paths.final(path.name) for path in record.paths.finals.iterdir()]
    results = [(folder.root.name, FinalRecord.read(folder)) for folder in folders if folder.result.is_file()]
    results.sort(key=lambda each: (each[1].ended_at, each[0]))
    return tuple(_final_row(record, name, result, estimates, trials) for name, result in results)


def _final_row(
    record: StudyRecord, name: str, result: FinalRecord, estimates: Estimates | None, trials: Sequence[TrialRecord]
) -> FinalRow:
    trial, n_test, n_seeds = result.trial, result.n_test, result.n_seeds
    began_at = trials[0].began_at
    evaluation = _evaluation_of(record, result, began_at)
    evaluations = evaluations_of(record.paths.project, evaluation)
    first = first_evaluation_of(evaluations, record.name, began_at) or evaluation
    return FinalRow(
        name=name,
        trial=trial,
        n_pool=result.n_pool,
        n_test=n_test,
        n_seeds=n_seeds,
        ended_at=result.ended_at,
        cv={score: bootstrap_mean(values) for score, values in _out_of_fold(record, trial).items()},
        test={score: result.test[score] for score in SCORES},
        official=result.official,
        predicted=estimates.predicted(trial, n_test=n_test, n_runs=max(1, n_seeds)) if estimates else None,
        scores=_test_scores(record, name),
        n_trials_after=sum(each.began_at > first.at for each in trials),
        n_evaluations_before=n_evaluations_before(evaluations, began_at),
        evaluation=evaluation,
        evaluations=evaluations,
        chosen=result.chosen,
        chosen_test=result.chosen_test,
        ensemble=result.ensemble,
        leaks=result.leaks,
        without_leaks=result.without_leaks,
    )


def _evaluation_of(record: StudyRecord, result: FinalRecord, study_began_at: float) -> LoggedEvaluation:
    """Return a final's entry in the account of evaluations. Version 0.1 did not record which entry it is."""
    project = record.paths.project
    if (found := find_evaluation(project, result.look)) is not None:
        return found
    known = LoggedEvaluation(
        test_set=result.test_set,
        at=result.ended_at,
        study=record.name,
        study_began_at=study_began_at,
        trial=result.trial,
        folder=str(project.root.absolute()),
        n_images=result.n_test,
        metric=result.metric,
        score=result.test[result.metric].mean,
        id="",
    )
    same = (
        evaluation
        for evaluation in evaluations_of(project, known)
        if evaluation.id and evaluation.test_set == known.test_set
    )
    return next((evaluation for evaluation in same if evaluation.configuration == known.configuration), known)


def _out_of_fold(record: StudyRecord, number: int) -> dict[str, Floats]:
    """Return every score of every held-out image by name, in the order of the folds; the mean over both fits."""
    fits = [record.fit, record.replicate_fit] if number in record.confirmed() else [record.fit]
    tables = [np.concatenate([fit(number, fold).counts() for fold in range(record.n_folds)]) for fit in fits]
    counts = [PixelCounts.from_columns(table) for table in tables]
    return {name: np.mean([score(each) for each in counts], axis=0) for name, score in SCORES.items()}


def _test_scores(record: StudyRecord, name: str) -> Floats:
    table = record.paths.final(name).table
    try:
        with table.open(encoding="utf-8", newline="") as file:
            return np.array([float(row[record.config.study.metric]) for row in csv.DictReader(file)])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise RecordError(f"{table} is damaged: {error}") from error
