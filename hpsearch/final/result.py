"""Compute the result of a final from the pixel counts of the test images, and write it to files."""

import csv
import dataclasses
import io
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpsearch import paths
from hpsearch.config.data import DataConfig
from hpsearch.data.duplicates import DuplicatePair, find_in_dataset
from hpsearch.data.prepare import Prepared
from hpsearch.errors import RecordError
from hpsearch.inference.postprocessing import Postprocessing, SelectedPostprocessing
from hpsearch.inference.scoring import COLUMNS, mask_name, read_mask, score_table, write_submission
from hpsearch.paths import FinalPaths
from hpsearch.report import trial_rows
from hpsearch.report.estimates import Estimates
from hpsearch.report.final_record import EnsembleResult, EvaluationHistory, FinalRecord, FinalScores, history_of
from hpsearch.stats.intervals import Floats, Interval, Paired, bootstrap_mean, paired_difference
from hpsearch.store.fits import FitRecord, load_array
from hpsearch.store.record import StudyRecord
from hpsearch.store.test_set_log import LoggedEvaluation
from hpsearch.store.trials import TrialRecord
from hpsearch.training.metrics import SCORES
from hpsearch.typed_json import to_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FinalResult(FinalScores, EvaluationHistory):
    """Test scores of a retrained configuration, together with the estimates of the search."""

    trial: TrialRecord
    """The trial whose configuration was retrained."""
    paths: FinalPaths
    """Paths of the final's files: model, masks, table of scores, figures."""
    winner_against_default: Paired | None
    """Gain of the best trial over trial 0, corrected for selection; None if trial 0 is the best or not complete."""
    is_default: bool
    """Whether the trial has the default configuration."""
    undelivered: int = 0
    """Number of MLflow runs that are not up to date. Their data are stored in the study folder."""
    tracking_error: str = ""
    """Error that kept MLflow from being updated; empty if MLflow is up to date."""


def is_stored(folder: FinalPaths, pool: Prepared, test: Prepared, *, n_seeds: int, ensemble: bool) -> bool:
    """Return whether the folder contains a complete result for these images, number of seeds and ensemble option."""
    if not folder.result.is_file():
        return False
    stored = FinalRecord.read(folder)
    found = (stored.pool_key, stored.test_key, stored.n_seeds, stored.ensemble is not None)
    if found != (pool.key, test.key, n_seeds, ensemble):
        return False
    files = [folder.model, folder.table, folder.official_counts]
    files += [folder.seed(index).test_counts for index in range(n_seeds)]
    files += [folder.chosen_counts] if stored.chosen_test else []
    files += [folder.ensemble_counts, folder.ensemble_official_counts] if ensemble else []
    files += [folder.masks / mask_name(image) for image in test.ids]
    return all(path.is_file() for path in files)


@dataclass(frozen=True)
class Inputs:
    """Inputs of a final: the trial, the options and the prepared images."""

    record: StudyRecord
    trial: TrialRecord
    folder: FinalPaths
    n_seeds: int
    ensemble: bool
    data: DataConfig
    """Data section of the trial's configuration, with the present location of the images."""
    cache_root: Path
    pool: Prepared
    """Pool images at the size at which they are scored."""
    test: Prepared
    """Test images at the size at which they are scored."""


def evaluate(inputs: Inputs, evaluation: LoggedEvaluation) -> FinalResult:
    """Compute the result from the pixel counts in the final's folder. `evaluation` is its test-set log entry."""
    record, trial, folder, test = inputs.record, inputs.trial, inputs.folder, inputs.test
    metric, number = record.config.study.metric, trial.number
    estimates = Estimates.of(record)
    assert estimates is not None
    leaks = _find_leaks(inputs)
    scores = _seed_scores(inputs)
    means = {name: values.mean(axis=0) for name, values in scores.items()}
    chosen = SelectedPostprocessing.from_table(paths.read_json(folder.choices)) if folder.choices.is_file() else None
    is_processed = chosen is not None and chosen.choices != Postprocessing()
    ensemble = None
    if inputs.ensemble:
        alone = folder.chosen_counts if is_processed else folder.seed(0).test_counts
        ensemble = EnsembleResult(
            n_networks=record.n_folds,
            test=_intervals(_scores(folder.ensemble_counts)),
            official=_intervals(_official_scores(folder.ensemble_official_counts, test)),
            gain=paired_difference(_scores(folder.ensemble_counts)[metric], _scores(alone)[metric]),
        )
    leaked = np.isin(np.array(test.ids), [name for pair in leaks for name in (pair.a, pair.b)])
    return FinalResult(
        **history_of(record, evaluation),
        study=record.name,
        trial=trial,
        paths=folder,
        metric=metric,
        cv=estimates.statistics[number].total,
        cv_fold_std=estimates.statistics[number].sd_folds,
        is_confirmed=number in record.standing().confirmed,
        corrected=estimates.corrected if number == estimates.winner else None,
        predicted=estimates.predicted(number, n_test=test.n, n_runs=inputs.n_seeds),
        eval_size=record.config.eval_size,
        test=_intervals(means),
        per_seed={name: tuple(float(value) for value in values.mean(axis=1)) for name, values in scores.items()},
        official=_intervals(_official_scores(folder.official_counts, test)),
        chosen=chosen,
        chosen_test=_intervals(_scores(folder.chosen_counts)) if is_processed else {},
        ensemble=ensemble,
        leaks=leaks,
        without_leaks=float(means[metric][~leaked].mean()) if leaks and not leaked.all() else None,
        against_default=estimates.gain(number),
        winner=estimates.winner,
        winner_against_default=estimates.gain(estimates.winner),
        is_default=record.is_default(trial),
        n_test=test.n,
        n_pool=inputs.pool.n,
    )


def _find_leaks(inputs: Inputs) -> tuple[DuplicatePair, ...]:
    """Return the duplicates and near-duplicates between pool and test split. The result is cached per dataset."""
    known = inputs.cache_root / f"near-duplicates-{inputs.pool.key}-{inputs.test.key}.json"
    if known.is_file():
        try:
            return tuple(DuplicatePair(**pair) for pair in paths.read_json(known)["across"])
        except (RecordError, KeyError, TypeError) as error:
            logger.warning("%s; looked for anew", error)
    logger.info("looking for near-duplicates across pool and test")
    pairs = find_in_dataset(inputs.data, inputs.cache_root, with_test=True, role="final")
    across = tuple(pair for pair in pairs if pair.across and {pair.a, pair.b} & set(inputs.test.ids))
    paths.write_json(known, {"across": to_json(across)})
    return across


def _scores(counts: Path) -> dict[str, Floats]:
    """Compute all scores from a file of pixel counts: score name to the values of the images, (n,)."""
    return trial_rows.image_scores(load_array(counts, ndim=2))


def _seed_scores(inputs: Inputs) -> dict[str, Floats]:
    """Return the test scores of all retrained networks: score name to values, (seeds, n)."""
    tables = [_scores(inputs.folder.seed(index).test_counts) for index in range(inputs.n_seeds)]
    return {name: np.stack([table[name] for table in tables]) for name in SCORES}


def _official_scores(counts: Path, test: Prepared) -> dict[str, Floats]:
    table = score_table(test.ids, load_array(counts, ndim=2))
    return {name: table[name].to_numpy(np.float64) for name in COLUMNS}


def _intervals(scores: dict[str, Floats]) -> dict[str, Interval]:
    return {name: bootstrap_mean(values) for name, values in scores.items()}


def write(result: FinalResult, inputs: Inputs, **facts: Any) -> None:
    """Write test.csv, curves.png, panels.png and finally final.json. `facts` are additional fields of `FinalRecord`.

    test.csv contains the scores of every test image (means over the seeds) and the official scores of the kept model.
    """
    from hpsearch.report import figures

    folder, test, n_seeds = inputs.folder, inputs.test, inputs.n_seeds
    columns = {name: values.mean(axis=0) for name, values in _seed_scores(inputs).items()}
    columns |= {f"official_{name}": values for name, values in _official_scores(folder.official_counts, test).items()}
    text = io.StringIO()
    rows = zip(test.ids, *([f"{value:.6f}" for value in values] for values in columns.values()), strict=True)
    csv.writer(text).writerows([["image", *columns], *rows])
    paths.write_text(folder.table, text.getvalue())
    # An existing zip file would contain the masks of an earlier evaluation.
    folder.submission.unlink(missing_ok=True)
    title = f"{result.study}, trial {result.trial.number}, retrained"
    curves = figures.draw_curves([FitRecord(folder.seed(index)).epochs() for index in range(n_seeds)], title=title)
    cases = trial_rows.final_cases(inputs.record, folder, test.key)
    panels = figures.draw_panels(cases, metric=result.metric, title=f"{title}: test images")
    for path, figure in ((folder.curves, curves), (folder.panels, panels)):
        with paths.atomic_write(path) as temporary:
            temporary.write_bytes(figures.to_bytes(figure))
    stored = FinalRecord(
        **{field.name: getattr(result, field.name) for field in dataclasses.fields(FinalScores)},
        **facts,
        trial=result.trial.number,
        params=result.trial.params,
        n_seeds=n_seeds,
        pool_key=inputs.pool.key,
        test_key=test.key,
        test_set=result.evaluation.test_set,
        look=result.evaluation.id,
        n_looks=len(result.evaluations),
    )
    paths.write_json(folder.result, to_json(stored))


def pack_submission(folder: FinalPaths, test: Prepared) -> None:
    """Write the masks of the test images as a zip file for submission to the challenge."""
    write_submission(folder.submission, ((image, read_mask(folder.masks / mask_name(image))) for image in test.ids))
