"""The result of a final: computed from the counts of the test images, written to files."""

from __future__ import annotations

import csv
import dataclasses
import io
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpsearch import paths
from hpsearch.config.data import DataConfig
from hpsearch.data.duplicates import DuplicatePair, find_in_dataset
from hpsearch.data.prepare import Prepared
from hpsearch.errors import RecordError
from hpsearch.inference.postprocessing import Postprocessing, SelectedPostprocessing
from hpsearch.inference.scoring import COLUMNS, mask_name, read_mask, score_table, write_submission
from hpsearch.paths import FinalPaths, FitPaths, ProjectPaths
from hpsearch.report import trial_rows
from hpsearch.report.estimates import Estimates
from hpsearch.report.rows import EnsembleResult, FinalScores
from hpsearch.stats.intervals import Interval, Paired, bootstrap_mean, paired_difference
from hpsearch.stats.selection import Corrected
from hpsearch.store.fits import FitRecord, load_array
from hpsearch.store.record import StudyRecord
from hpsearch.store.test_set_log import (
    LoggedEvaluation,
    evaluations_of,
    find_evaluation,
    first_evaluation_of,
    n_evaluations_before,
)
from hpsearch.store.trials import FORMAT, TrialRecord
from hpsearch.training.metrics import SCORES, PixelCounts

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FinalResult(FinalScores):
    """Test scores of a retrained configuration beside the estimates of the search."""

    study: str
    """Name of the study."""
    trial: TrialRecord
    """The trial whose configuration was retrained."""
    paths: FinalPaths
    """The files of the final: model, masks, table of scores, figures."""
    metric: str
    """The study's metric, `dice` or `jaccard`."""
    cv: Interval
    """Mean of the out-of-fold scores, over both fits if it was replicated, with its 95 % interval."""
    cv_fold_std: float
    """Standard deviation of the fold means."""
    is_confirmed: bool
    """Whether the trial was fitted twice, so that `cv` is the mean over both fits."""
    corrected: Corrected | None
    """The winner's mean, corrected for selection; None if this is another trial."""
    eval_size: tuple[int, int]
    """Height and width at which `test` is scored, as all trials were (`study.eval_size`, else `data.size`)."""
    per_seed: dict[str, tuple[float, ...]]
    """Score by name: the mean of each seed's network."""
    against_default: Paired | None
    """Its gain over trial 0, corrected for selection; None for trial 0, or if that is not complete."""
    winner: int
    """Number of the study's best trial."""
    winner_against_default: Paired | None
    """The gain of the best trial over trial 0, likewise."""
    is_default: bool
    """Whether it has the default configuration."""
    undelivered: int = 0
    """Number of MLflow runs that lack something; it is on record."""
    tracking_error: str = ""
    """Why MLflow could not be brought up to date; empty if it is."""

    @property
    def n_leaked(self) -> int:
        """Number of test images that are in `leaks`."""
        sides = [(pair.a, pair.split_a) for pair in self.leaks] + [(pair.b, pair.split_b) for pair in self.leaks]
        return len({name for name, split in sides if split == "test"})

    def to_dict(self) -> dict[str, Any]:
        """Return the content of final.json, without its times."""
        table = dataclasses.asdict(self)
        return {
            "format": FORMAT,
            "trial": self.trial.number,
            "params": self.trial.params,
            "test_set": self.evaluation.test_set,
            "look": self.evaluation.id,
            "n_looks": len(self.evaluations),
            **{name: table[name] for name in STORED},
        }


STORED = (
    *("study", "winner", "metric", "n_pool", "n_test", "cv", "cv_fold_std", "is_confirmed", "corrected", "predicted"),
    *("eval_size", "test", "official", "per_seed", "chosen", "chosen_test", "ensemble", "leaks", "without_leaks"),
    "against_default",
)
"""Fields of `FinalResult` that final.json holds under their own names."""


def is_stored(folder: FinalPaths, pool: Prepared, test: Prepared, *, n_seeds: int, ensemble: bool) -> bool:
    """Whether the folder holds the whole result of these images, for so many seeds."""
    if not folder.result.is_file():
        return False
    table = _stored_table(folder)
    wanted = {"pool_key": pool.key, "test_key": test.key, "n_seeds": n_seeds}
    if any(table.get(key) != value for key, value in wanted.items()):
        return False
    if (table.get("ensemble") is not None) != ensemble:
        return False
    files = [
        folder.model,
        folder.table,
        folder.official_counts,
        *(folder.seed(i).test_counts for i in range(n_seeds)),
    ]
    files += [folder.chosen_counts] if table.get("chosen_test") else []
    files += [folder.ensemble_counts, folder.ensemble_official_counts] if ensemble else []
    return all(path.is_file() for path in (*files, *(folder.masks / mask_name(image) for image in test.ids)))


def stored_evaluation(project: ProjectPaths, folder: FinalPaths) -> LoggedEvaluation | None:
    """Return the evaluation that the result in `folder` comes from; None without a result or an account of it."""
    return find_evaluation(project, str(_stored_table(folder).get("look"))) if folder.result.is_file() else None


def _stored_table(folder: FinalPaths) -> dict[str, Any]:
    """Read final.json. Raises RecordError if it is damaged."""
    table = paths.read_json(folder.result)
    if not isinstance(table, dict) or "format" not in table:
        raise RecordError(f"{folder.result} is damaged: put it back from a copy, or delete it to evaluate again")
    return table


def evaluate(
    record: StudyRecord,
    trial: TrialRecord,
    folder: FinalPaths,
    n_seeds: int,
    pool: Prepared,
    test: Prepared,
    chosen: SelectedPostprocessing | None,
    n_members: int,
    leaks: tuple[DuplicatePair, ...],
    evaluation: LoggedEvaluation,
) -> FinalResult:
    metric = record.config.study.metric
    estimates = Estimates.of(record)
    assert estimates is not None
    scores = {name: np.stack([_scores(folder.seed(index), name) for index in range(n_seeds)]) for name in SCORES}
    by_choices = _means(folder.chosen_counts) if chosen is not None and chosen.choices != Postprocessing() else {}
    leaked = np.isin(np.array(test.ids), [name for pair in leaks for name in (pair.a, pair.b)])
    trials, evaluations = record.trials(), evaluations_of(record.paths.project, evaluation)
    first = first_evaluation_of(evaluations, record.name, trials[0].began_at) or evaluation
    return FinalResult(
        study=record.name,
        trial=trial,
        paths=folder,
        metric=metric,
        cv=estimates.statistics[trial.number].total,
        cv_fold_std=estimates.statistics[trial.number].sd_folds,
        is_confirmed=trial.number in record.confirmed(),
        corrected=estimates.corrected if trial.number == estimates.winner else None,
        predicted=estimates.predicted(trial.number, n_test=test.n, n_runs=n_seeds),
        eval_size=record.config.eval_size,
        test={name: bootstrap_mean(values.mean(axis=0)) for name, values in scores.items()},
        per_seed={name: tuple(float(value) for value in values.mean(axis=1)) for name, values in scores.items()},
        official=_official(folder.official_counts, test),
        chosen=chosen,
        chosen_test=by_choices,
        ensemble=_ensemble(folder, test, metric, n_members, has_choices=bool(by_choices)) if n_members else None,
        evaluation=evaluation,
        evaluations=evaluations,
        n_evaluations_before=n_evaluations_before(evaluations, trials[0].began_at),
        n_trials_after=sum(each.began_at > first.at for each in trials),
        leaks=leaks,
        without_leaks=float(scores[metric].mean(axis=0)[~leaked].mean()) if leaks and not leaked.all() else None,
        against_default=estimates.gain(trial.number),
        winner=estimates.winner,
        winner_against_default=estimates.gain(estimates.winner),
        is_default=record.is_default(trial),
        n_test=test.n,
        n_pool=pool.n,
    )


def leaks(data: DataConfig, root: Path, pool: Prepared, test: Prepared) -> tuple[DuplicatePair, ...]:
    """Return duplicates and near-duplicates across pool and test, which are searched once per dataset."""
    known = root / f"near-duplicates-{pool.key}-{test.key}.json"
    if known.is_file():
        try:
            return tuple(DuplicatePair(**pair) for pair in paths.read_json(known)["across"])
        except (RecordError, KeyError, TypeError) as error:
            logger.warning("%s; looked for anew", error)
    logger.info("looking for near-duplicates across pool and test")
    pairs = find_in_dataset(data, root, with_test=True, role="final")
    across = tuple(pair for pair in pairs if pair.across and {pair.a, pair.b} & set(test.ids))
    paths.write_json(known, {"across": [dataclasses.asdict(pair) for pair in across]})
    return across


def _ensemble(
    folder: FinalPaths, test: Prepared, metric: str, n_networks: int, *, has_choices: bool
) -> EnsembleResult:
    alone = folder.chosen_counts if has_choices else folder.seed(0).test_counts
    scores = [_score(load_array(path, ndim=2), metric) for path in (folder.ensemble_counts, alone)]
    return EnsembleResult(
        n_networks=n_networks,
        test=_means(folder.ensemble_counts),
        official=_official(folder.ensemble_official_counts, test),
        gain=paired_difference(*scores),
    )


def _means(counts: Path) -> dict[str, Interval]:
    """Return the mean of every score over the images of a file of counts."""
    table = load_array(counts, ndim=2)
    return {name: bootstrap_mean(_score(table, name)) for name in SCORES}


def _official(counts: Path, test: Prepared) -> dict[str, Interval]:
    table = score_table(test.ids, load_array(counts, ndim=2))
    return {name: bootstrap_mean(table[name].to_numpy(np.float64)) for name in COLUMNS}


def _score(counts: npt.NDArray[np.int64], name: str) -> npt.NDArray[np.float64]:
    return np.asarray(SCORES[name](PixelCounts.from_columns(counts)), np.float64)


def _scores(fit: FitPaths, name: str) -> npt.NDArray[np.float64]:
    return _score(load_array(fit.test_counts, ndim=2), name)


def write_table(folder: FinalPaths, n_seeds: int, test: Prepared) -> None:
    """Write test.csv: scores of every test image, means over the seeds, and official scores of the kept model."""
    columns = {
        name: np.mean([_scores(folder.seed(index), name) for index in range(n_seeds)], axis=0) for name in SCORES
    }
    official = score_table(test.ids, load_array(folder.official_counts, ndim=2))
    columns |= {f"official_{name}": official[name].to_numpy(np.float64) for name in COLUMNS}
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["image", *columns])
    for row, image in enumerate(test.ids):
        writer.writerow([image, *(f"{values[row]:.6f}" for values in columns.values())])
    paths.write_text(folder.table, text.getvalue())


def pack_submission(folder: FinalPaths, test: Prepared) -> None:
    pairs = ((image, read_mask(folder.masks / mask_name(image))) for image in test.ids)
    write_submission(folder.submission, pairs)


def draw(record: StudyRecord, folder: FinalPaths, n_seeds: int, result: FinalResult, test: Prepared) -> None:
    """Draw curves.png and panels.png."""
    from hpsearch.report import figures

    title = f"{result.study}, trial {result.trial.number}, retrained"
    curves = figures.draw_curves([FitRecord(folder.seed(index)).epochs() for index in range(n_seeds)], title=title)
    cases = trial_rows.final_cases(record, folder, test.key)
    panels = figures.draw_panels(cases, metric=result.metric, title=f"{title}: test images")
    for path, figure in ((folder.curves, curves), (folder.panels, panels)):
        with paths.atomic_write(path) as temporary:
            temporary.write_bytes(figures.to_bytes(figure))
