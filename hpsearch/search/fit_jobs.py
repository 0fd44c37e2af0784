"""Make the jobs that fit a trial's configuration to a fold, to a replicate of it, or to the whole pool."""

from __future__ import annotations

from hpsearch.config import StudyConfig, stable_seed
from hpsearch.data.pool_caches import PoolCaches
from hpsearch.paths import FitPaths
from hpsearch.search.evaluation import Evaluation
from hpsearch.store.trials import TrialRecord
from hpsearch.workers.jobs import CachePaths, FitJob


def fold_job(evaluation: Evaluation, fold: int, caches: PoolCaches) -> FitJob:
    """Return the job that fits one fold of a trial or replicate."""
    study, trial, (number, replicate) = evaluation.study, evaluation.trial, evaluation.key
    seed = replicate_seed(study.config, number, fold) if replicate else fit_seed(study.config, trial.place, fold)
    return FitJob(
        trial=number,
        fold=fold,
        replicate=replicate,
        config=evaluation.config,
        folder=evaluation.fit(fold).paths.root.absolute(),
        caches=CachePaths(*caches.paths(evaluation.config)),
        train=tuple(study.folds.train(fold).tolist()),
        held_out=tuple(study.folds.held_out(fold).tolist()),
        seed=seed,
        keep_best=not replicate,
    )


def pool_job(trial: TrialRecord, config: StudyConfig, folder: FitPaths, caches: PoolCaches, *, seed: int) -> FitJob:
    """Return the job that fits a trial's configuration to all images of the pool."""
    return FitJob(
        trial=trial.number,
        fold=0,
        config=config,
        folder=folder.root.absolute(),
        caches=CachePaths(*caches.paths(config)),
        train=tuple(range(caches.scored.n)),
        held_out=(),
        seed=seed,
    )


def fit_seed(config: StudyConfig, place: int, fold: int) -> int:
    """Return the seed of a first fit: of its initial weights, order of batches and augmentation."""
    return stable_seed(config.study.seed, "fit", place, fold)


def replicate_seed(config: StudyConfig, trial: int, fold: int) -> int:
    """Return the seed of a replicate's fit, which differs from that of the first fit."""
    return stable_seed(config.study.seed, "second fit", trial, fold)
