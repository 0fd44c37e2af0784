"""Content of final.json, and the result of a `final` run, which is read from this file."""

import csv
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hpsearch.data.duplicates import DuplicatePair
from hpsearch.errors import RecordError
from hpsearch.inference.postprocessing import SelectedPostprocessing
from hpsearch.paths import FinalPaths
from hpsearch.report.estimates import Estimates
from hpsearch.report.trial_rows import scores_by_fold
from hpsearch.stats.intervals import Floats, Interval, Paired, bootstrap_mean
from hpsearch.stats.selection import Corrected
from hpsearch.store import test_set_log as log
from hpsearch.store.record import StudyRecord
from hpsearch.store.test_set_log import LoggedEvaluation
from hpsearch.store.trials import FORMAT, TrialRecord, read_record


@dataclass(frozen=True, kw_only=True)
class EnsembleResult:
    """Result of the ensemble of the fold networks, compared with the network trained on the whole pool."""

    n_networks: int
    test: dict[str, Interval]
    """Test scores by name at the image size of the search, with the selected post-processing, or with the default
    post-processing if none was selected."""
    official: dict[str, Interval]
    """Scores of the ISIC-2017 challenge by name, computed at the original resolution of each image."""
    gain: Paired
    """Gain in the study's metric over the retrained network, on the same images and at the same size as `test`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FinalScores:
    """Scores of a retrained configuration, together with the estimates of the search.

    Fields with defaults may be missing from files of version 0.1.
    """

    study: str
    """Name of the study."""
    metric: str
    """The study's metric, `dice` or `jaccard`."""
    n_pool: int
    """Number of pool images that the networks were trained on."""
    n_test: int
    """Number of test images."""
    cv: Interval
    """Mean out-of-fold score of the trial with its 95 % interval, averaged over both fits if it was replicated."""
    cv_fold_std: float
    """Standard deviation of the fold means."""
    is_confirmed: bool = False
    """Whether the trial was replicated, so that `cv` is the mean over both fits."""
    corrected: Corrected | None = None
    """Mean score of the trial, corrected for selection bias; None if the trial is not the winner."""
    predicted: Interval | None = None
    """Predicted mean score on `n_test` images with its 95 % prediction interval; None if the trial did not win."""
    against_default: Paired | None
    """Out-of-fold gain of the trial over trial 0, corrected for selection bias; None for trial 0, or if trial 0 is
    not complete."""
    winner: int | None = None
    """Number of the study's best trial."""
    eval_size: tuple[int, int] | None = None
    """Height and width at which `test` and all trials are scored (`study.eval_size`, else `data.size`)."""
    test: dict[str, Interval]
    """Test scores by name: means over images and seeds, with 95 % intervals over images. They are computed like the
    scores of trials: at `eval_size`, with threshold 0.5, no test-time augmentation and no cleaning."""
    per_seed: dict[str, tuple[float, ...]]
    """Test scores by name: the mean over the images for each retrained network."""
    official: dict[str, Interval] = field(default_factory=dict)
    """Test scores of the ISIC-2017 challenge by name: means over images with 95 % intervals. They are computed at the
    original resolution of each image, for the first network with its post-processing. Empty if unknown."""
    chosen: SelectedPostprocessing | None = None
    """Post-processing selected on out-of-fold predictions; None if no fold networks were kept."""
    chosen_test: dict[str, Interval] = field(default_factory=dict)
    """Test scores by name at `eval_size`, for the first network with the selected post-processing. Empty if the
    default post-processing is used."""
    ensemble: EnsembleResult | None = None
    """Result of the ensemble of the fold networks; None unless it was requested."""
    leaks: tuple[DuplicatePair, ...] = ()
    """Duplicates and near-duplicates with one image in the pool and one in the test split."""
    without_leaks: float | None = None
    """Mean of the study's metric over the test images that are not in `leaks`; None if none or all of them are."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FinalRecord(FinalScores):
    """Content of final.json."""

    trial: int
    params: dict[str, Any]
    n_seeds: int
    began_at: float
    ended_at: float
    test_key: str
    """Key of the cache of the test images."""
    runtime: dict[str, Any]
    """Description of the machine."""
    format: int = FORMAT
    pool_key: str = ""
    test_set: str = ""
    """Digest of the test images."""
    look: str = ""
    """Id of the evaluation in the test-set log."""
    n_looks: int = 0
    """Number of evaluations of these images so far, including this one."""


@dataclass(frozen=True, kw_only=True)
class FinalResult(FinalScores):
    """Test scores of a retrained configuration, together with the estimates of the search."""

    trial: TrialRecord
    """The trial whose configuration was retrained."""
    paths: FinalPaths
    """Paths of the files of the `final` run: model, masks, table of scores, figures."""
    n_seeds: int
    """Number of retrained networks."""
    ended_at: float
    """End of the evaluation (Unix time in seconds)."""
    evaluation: LoggedEvaluation
    """Entry of this evaluation in the test-set log."""
    evaluations: tuple[LoggedEvaluation, ...]
    """All known evaluations of any of these test images, including this one, in chronological order."""
    n_evaluations_before: int
    """Number of evaluations before the study began."""
    n_trials_after: int
    """Number of trials that began after the study's first evaluation of these images."""
    winner_against_default: Paired | None
    """Gain of the best trial over trial 0, like `against_default`; None if trial 0 is the best or not complete."""
    is_default: bool
    """Whether the trial has the default configuration."""
    cv_scores: dict[str, Interval]
    """Mean out-of-fold score over the images, by score name, with its 95 % interval."""
    scores: Floats = field(compare=False)
    """Score of each test image in the study's metric, averaged over the retrained networks."""
    undelivered: int = 0
    """Number of MLflow runs that are not up to date. Their data is stored in the study folder."""
    tracking_error: str = ""
    """Error that kept MLflow from being updated; empty if MLflow is up to date."""


def final_result(record: StudyRecord, name: str, estimates: Estimates | None) -> FinalResult:
    """Return the stored result of the `final` run `name`, with the current `estimates` of the search.

    Raises RecordError if a file of the result is damaged.
    """
    folder = record.paths.final(name)
    stored = read_record(FinalRecord, folder.result)
    number, n_runs = stored.trial, max(1, stored.n_seeds)
    trial, began = record.trial(number), [trial.began_at for trial in record.trials()]
    fields = {field.name: getattr(stored, field.name) for field in dataclasses.fields(FinalScores)}
    # The search may have continued after the `final` run, so compute the estimates again.
    if estimates is not None and number in estimates.complete:
        fields |= estimates.of_final(number, n_test=stored.n_test, n_runs=n_runs)
    else:
        fields |= {"corrected": None, "predicted": None, "winner": record.standing().winner}
    evaluation = _evaluation_of(record, stored)
    evaluations = log.evaluations_of(record.paths.project, evaluation)
    first = next(each for each in evaluations if each.is_of_same_study(evaluation))
    cv_scores = scores_by_fold([record.fits(number, replicate) for replicate in range(1 + fields["is_confirmed"])])
    return FinalResult(
        **fields,
        trial=trial,
        paths=folder,
        n_seeds=n_runs,
        ended_at=stored.ended_at,
        evaluation=evaluation,
        evaluations=evaluations,
        n_evaluations_before=sum(each.at < began[0] for each in evaluations),
        n_trials_after=sum(each > first.at for each in began),
        winner_against_default=estimates.gain(estimates.winner) if estimates is not None else None,
        is_default=record.is_default(trial),
        cv_scores={name: bootstrap_mean(np.concatenate(folds)) for name, folds in cv_scores.items()},
        scores=_test_scores(folder.table, stored.metric),
    )


def _evaluation_of(record: StudyRecord, result: FinalRecord) -> LoggedEvaluation:
    """Return the entry of a `final` run in the test-set log.

    Version 0.1 did not store the id of the entry, so look for an entry of the same test set and configuration. If
    there is none, return an entry made from the result.
    """
    project, score = record.paths.project, result.test[result.metric].mean
    if (found := log.find_evaluation(project, result.look)) is not None:
        return found
    facts = evaluation_facts(record, result.trial) | {"test_set": result.test_set, "n_images": result.n_test}
    known = LoggedEvaluation(at=result.ended_at, score=score, id="", **facts)
    wanted = (known.test_set, known.configuration)
    entries = (each for each in log.evaluations_of(project, known) if each.id)
    return next((each for each in entries if (each.test_set, each.configuration) == wanted), known)


def evaluation_facts(record: StudyRecord, trial: int) -> dict[str, Any]:
    """Return the fields of an entry in the test-set log that identify the study and the trial."""
    return {
        "study": record.name,
        "study_began_at": record.trials()[0].began_at,
        "trial": trial,
        "metric": record.config.study.metric,
        "folder": str(record.paths.project.root.absolute()),
    }


def _test_scores(table: Path, metric: str) -> Floats:
    try:
        with table.open(encoding="utf-8", newline="") as file:
            return np.array([float(row[metric]) for row in csv.DictReader(file)])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise RecordError(f"{table} is damaged: {error}") from error
