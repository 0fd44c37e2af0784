"""Retrain one configuration on the whole pool and evaluate it, once, on the test split."""

from __future__ import annotations

import csv
import dataclasses
import io
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpsearch import paths
from hpsearch.config import stable_seed
from hpsearch.data.config import DataConfig
from hpsearch.data.prepare import Prepared, locate, prepare_test
from hpsearch.errors import StudyError
from hpsearch.paths import FinalPaths, FitPaths, ProjectPaths
from hpsearch.report.statistics import Interval, Paired, bootstrap_mean, paired_difference
from hpsearch.scoring import COLUMNS, mask_name, read_mask, score_table, write_submission
from hpsearch.tracking import Tracker, TrackingThread
from hpsearch.training.metrics import SCORES, PixelCounts
from hpsearch.tuning import lock
from hpsearch.tuning.caches import PoolCaches
from hpsearch.tuning.coordinator import cache_root, log_file
from hpsearch.tuning.planning import MachineChoice, make_plan
from hpsearch.tuning.record import FORMAT, StudyRecord, TrialRecord, load_array, now, study_record
from hpsearch.tuning.workers import Workers, do

logger = logging.getLogger(__name__)

OnEpoch = Callable[[int, dict[str, Any]], bool]
"""Hears (seed index, row of epochs.jsonl) after every epoch, and says whether to go on."""


@dataclass(frozen=True, kw_only=True)
class FinalResult:
    """What the search promised beside what the test split gave."""

    study: str
    trial: TrialRecord
    paths: FinalPaths
    metric: str
    cv: Interval
    """Mean of the out-of-fold scores and its 95 % interval over images."""
    cv_fold_std: float
    """Standard deviation of the fold means."""
    test: dict[str, Interval]
    """Score by name: mean over images, and over seeds, with its 95 % interval over images."""
    per_seed: dict[str, tuple[float, ...]]
    """Score by name: the mean of each seed's network."""
    official: dict[str, Interval]
    """Official score by name, at each image's own resolution, of the network that is kept (the first seed's): what
    the challenge would give for its masks. Mean over images with its 95 % interval."""
    against_default: Paired | None
    """It minus trial 0 on the same out-of-fold images; None for trial 0, or where that is not full."""
    n_test: int
    n_pool: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "study": self.study,
            "trial": self.trial.number,
            "params": self.trial.params,
            "metric": self.metric,
            "n_pool": self.n_pool,
            "n_test": self.n_test,
            "cv": dataclasses.asdict(self.cv),
            "cv_fold_std": self.cv_fold_std,
            "test": {name: dataclasses.asdict(interval) for name, interval in self.test.items()},
            "official": {name: dataclasses.asdict(interval) for name, interval in self.official.items()},
            "per_seed": {name: list(values) for name, values in self.per_seed.items()},
            "against_default": dataclasses.asdict(self.against_default) if self.against_default else None,
        }


def run_final(
    project: ProjectPaths,
    name: str | None = None,
    *,
    trial: int | None = None,
    n_seeds: int = 1,
    machine: MachineChoice | None = None,
    tracker: Tracker | None = None,
    on_epoch: OnEpoch | None = None,
    submission: bool = False,
) -> FinalResult | None:
    """Train the best full trial of a study (or `trial`) on all pool images and score the test images.

    Data and settings are the study's. Each of `n_seeds` networks is trained for as many epochs as the trial had;
    stopped by `on_epoch` it gives None, and goes on from there the next time. The test split is read here and nowhere
    else. The masks of the first network, at each image's own resolution, stay in the final's folder; `submission`
    packs them into a zip as the challenge takes it.

    Raises StudyError if there is no such study or trial, DatasetError for data that cannot be used.
    """
    record = study_record(project, name)
    with paths.refusals_named(record.paths.root), lock.hold(record.paths), log_file(record.paths.log):
        record.verify()
        chosen = _choose(record, trial)
        config = chosen.study_config
        folder = record.paths.final(f"trial-{chosen.number:04d}")
        began_at = now()
        caches = PoolCaches(record.config, cache_root(project, config), role="final")
        pool = caches.scored
        test = prepare_test(config.scored_data, cache_root(project, config))
        seen = test if config.scored_data == config.data else prepare_test(config.data, cache_root(project, config))
        paths.write_text(folder.config, config.to_toml())
        on_epoch = on_epoch or (lambda index, row: True)
        # One network after another on the first device of the plan: this is a handful of fits.
        with Workers(record.paths.root) as workers:
            plan = make_plan(record, caches, machine or MachineChoice(), workers)
            workers.become(plan.workers[:1])
            for index in range(n_seeds):
                seed = stable_seed(config.study.seed, "final", index)
                job = _fit_job(chosen, folder.seed(index), seed, caches)
                if (
                    not folder.seed(index).fit.is_file()
                    and do(workers, job, on_epoch=partial(on_epoch, index)) is None
                ):
                    return None
                do(workers, _score_job(chosen, folder.seed(index), seen, test))
            logger.info("scoring the masks of %d test images at their own resolution", test.n)
            shutil.rmtree(folder.masks, ignore_errors=True)
            do(workers, _official_job(folder, config.data, cache_root(project, config), test))
        result = _evaluate(record, chosen, folder, n_seeds, pool, test)
        with paths.atomic_write(folder.model) as temporary:
            shutil.copyfile(folder.seed(0).weights, temporary)
        _write_table(folder, n_seeds, test)
        folder.submission.unlink(missing_ok=True)
        if submission:
            masks = ((image, read_mask(folder.masks / mask_name(image))) for image in test.ids)
            write_submission(folder.submission, masks)
        _draw(record, folder, n_seeds, result, test)
        finished = {**result.to_dict(), "began_at": began_at, "ended_at": now(), "test_key": test.key}
        paths.write_json(folder.result, {**finished, "n_seeds": n_seeds, "runtime": plan.machine})
        logger.info("final of trial %d: test %s %.4f", chosen.number, result.metric, result.test[result.metric].mean)
        if tracker is not None:
            TrackingThread(tracker, record.paths).close()
        return result


def _choose(record: StudyRecord, number: int | None) -> TrialRecord:
    if number is None:
        best = record.best()
        if best is None:
            raise StudyError(f"study {record.name!r} has no fully evaluated trial yet: run `hpsearch study` first")
        return best
    if number not in record.trial_numbers():
        raise StudyError(f"study {record.name!r} has no trial {number}; it has {len(record.trial_numbers())}")
    trial = record.trial(number)
    if trial.outcome != "full":
        what = trial.outcome or "still open"
        raise StudyError(f"trial {number} of study {record.name!r} is {what}: only full trials can be final")
    return trial


def _fit_job(trial: TrialRecord, fit: FitPaths, seed: int, caches: PoolCaches) -> dict[str, Any]:
    return {
        "job": "fit",
        "trial": trial.number,
        "fold": 0,
        "config": trial.config,
        "folder": str(fit.root.absolute()),
        **caches.job(trial.study_config),
        "train": list(range(caches.scored.n)),
        "held_out": [],
        "seed": seed,
        "keep_best": False,
    }


def _score_job(trial: TrialRecord, fit: FitPaths, seen: Prepared, test: Prepared) -> dict[str, Any]:
    """`seen`: the test images as the network sees them; `test`: at the size at which they are scored."""
    truth = {"truth": str(test.cache_path.absolute())} if seen.key != test.key else {}
    return {
        "job": "score",
        "config": trial.config,
        "weights": str(fit.weights.absolute()),
        "cache": str(seen.cache_path.absolute()),
        **truth,
        "counts": str(fit.test_counts.absolute()),
        "examples": str(fit.examples.absolute()),
    }


def _official_job(folder: FinalPaths, data: DataConfig, caches: Path, test: Prepared) -> dict[str, Any]:
    # Where the files lie now: a cache outlives its dataset's folder.
    samples = {sample.id: sample for sample in locate(data, caches).split("test")}
    return {
        "job": "official",
        "weights": str(folder.seed(0).weights.absolute()),
        "samples": [
            (image, str(samples[image].image.absolute()), str(samples[image].mask.absolute())) for image in test.ids
        ],
        "masks": str(folder.masks.absolute()),
        "counts": str(folder.official_counts.absolute()),
    }


def _evaluate(
    record: StudyRecord, trial: TrialRecord, folder: FinalPaths, n_seeds: int, pool: Prepared, test: Prepared
) -> FinalResult:
    metric = record.config.study.metric
    scores = {name: np.stack([_scores(folder.seed(index), name) for index in range(n_seeds)]) for name in SCORES}
    out_of_fold = record.out_of_fold(trial.number)
    seen = ~np.isnan(out_of_fold)
    official = _official_table(folder, test)
    fold_means = [float(np.mean(record.final_scores(trial.number, fold))) for fold in range(record.n_folds)]
    return FinalResult(
        study=record.name,
        trial=trial,
        paths=folder,
        metric=metric,
        cv=bootstrap_mean(out_of_fold[seen]),
        cv_fold_std=float(np.std(fold_means, ddof=1)) if len(fold_means) > 1 else 0.0,
        test={name: bootstrap_mean(values.mean(axis=0)) for name, values in scores.items()},
        per_seed={name: tuple(float(value) for value in values.mean(axis=1)) for name, values in scores.items()},
        official={name: bootstrap_mean(official[name].to_numpy(np.float64)) for name in COLUMNS},
        against_default=_against_default(record, trial.number, out_of_fold, seen),
        n_test=test.n,
        n_pool=pool.n,
    )


def _against_default(
    record: StudyRecord, number: int, out_of_fold: npt.NDArray[np.float64], seen: npt.NDArray[np.bool_]
) -> Paired | None:
    if number == 0 or record.trial(0).outcome != "full":
        return None
    return paired_difference(out_of_fold[seen], record.out_of_fold(0)[seen])


def _scores(fit: FitPaths, name: str) -> npt.NDArray[np.float64]:
    counts = load_array(fit.test_counts, ndim=2)
    return np.asarray(SCORES[name](PixelCounts.from_columns(counts)), np.float64)


def _official_table(folder: FinalPaths, test: Prepared) -> pd.DataFrame:
    return score_table(test.ids, load_array(folder.official_counts, ndim=2))


def _write_table(folder: FinalPaths, n_seeds: int, test: Prepared) -> None:
    """test.csv: every test image with its scores, means over the seeds, and the official ones of the model kept."""
    columns = {
        name: np.mean([_scores(folder.seed(index), name) for index in range(n_seeds)], axis=0) for name in SCORES
    }
    official = _official_table(folder, test)
    columns |= {f"official_{name}": official[name].to_numpy(np.float64) for name in COLUMNS}
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["image", *columns])
    for row, image in enumerate(test.ids):
        writer.writerow([image, *(f"{values[row]:.6f}" for values in columns.values())])
    paths.write_text(folder.table, text.getvalue())


def _draw(record: StudyRecord, folder: FinalPaths, n_seeds: int, result: FinalResult, test: Prepared) -> None:
    """curves.png and panels.png."""
    from hpsearch.report import figures, trial_rows

    title = f"{result.study}, trial {result.trial.number}, retrained"
    curves = figures.draw_curves(trial_rows.final_curves(folder, n_seeds), title=title)
    cases = trial_rows.final_cases(record, folder, test.key)
    panels = figures.draw_panels(cases, metric=result.metric, title=f"{title}: test images")
    for path, figure in ((folder.curves, curves), (folder.panels, panels)):
        with paths.atomic_write(path) as temporary:
            temporary.write_bytes(figures.to_png(figure))
