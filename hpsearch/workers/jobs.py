"""What first, second and final fits have in common: the job, what their deaths mean, their silence, their files."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from hpsearch.data.pool_caches import PoolCaches
from hpsearch.errors import StorageError, WorkerError
from hpsearch.paths import FitPaths, remove_stale_temporaries
from hpsearch.store.record import FitRecord, StudyRecord, TrialRecord
from hpsearch.workers.local_pool import DEATHS_PER_JOB, Workers

logger = logging.getLogger(__name__)

SILENCE_FACTOR = 10.0
SILENCE_MIN_S = 300.0
"""A fit without an epoch for so many times the seconds it should take, and at least so long, is taken for hanging."""
Failures = dict[str, list[str]]
"""Fold to what was said of each death of a worker that fitted it."""


def fold_job(
    record: StudyRecord,
    trial: TrialRecord,
    fold: int,
    folder: FitPaths,
    caches: PoolCaches,
    *,
    seed: int,
    keep_best: bool,
) -> dict[str, Any]:
    """What a worker has to be told to fit a fold of a trial."""
    held_out, train = record.folds.held_out(fold).tolist(), record.folds.train(fold).tolist()
    return fit_job(trial, fold, folder, caches, train=train, held_out=held_out, seed=seed, keep_best=keep_best)


def fit_job(
    trial: TrialRecord,
    fold: int,
    folder: FitPaths,
    caches: PoolCaches,
    *,
    train: list[int],
    held_out: list[int],
    seed: int,
    keep_best: bool = False,
) -> dict[str, Any]:
    """What a worker has to be told to fit a trial's configuration to the images `train`, by index in the pool."""
    return {
        "job": "fit",
        "trial": trial.number,
        "fold": fold,
        "config": trial.config,
        "folder": str(folder.root.absolute()),
        **caches.job(trial.study_config),
        "train": train,
        "held_out": held_out,
        "seed": seed,
        "keep_best": keep_best,
    }


def count_death(
    fit: FitRecord, fold: int, failures: Failures, message: Mapping[str, Any], what: str
) -> tuple[Failures, str]:
    """Enter that the worker of a fit died or raised: the failures with this one, and why it is the last, or "".

    `what` names the fit in messages. Deaths that an epoch was won in between are the machine's fault, not the
    configuration's. Raises StorageError and WorkerError where another try would end alike.
    """
    text = message["text"]
    if message.get("is_storage"):
        raise StorageError(text)
    if message.get("is_known"):
        raise WorkerError(f"{what}: {text}")
    logger.warning("%s: worker %s\n%s", what, text, message.get("traceback", ""))
    remove_stale_temporaries(fit.paths.root)
    place = f"after epoch {len(fit.epochs())}: "
    deaths = [*failures.get(str(fold), []), place + text]
    is_last = sum(each.startswith(place) for each in deaths) >= DEATHS_PER_JOB
    reason = f"fold {fold + 1} ended its worker {DEATHS_PER_JOB} times {place}{text}" if is_last else ""
    return {**failures, str(fold): deaths}, reason


def end_silent(workers: Workers, epoch_s: Callable[[int, int], float | None]) -> None:
    """End every worker that shows no epoch for so long that its fit must be hanging.

    `epoch_s(trial, fold)` gives the seconds that an epoch should take, None for a fit that nobody waits for.
    """
    for worker in workers.busy():
        silence_s = time.monotonic() - worker.heard_at
        if worker.job is None or silence_s <= SILENCE_MIN_S:
            continue
        number, fold = worker.job["trial"], worker.job["fold"]
        expected_s = epoch_s(number, fold)
        if expected_s is not None and silence_s > SILENCE_FACTOR * expected_s:
            logger.warning("trial %d fold %d: no epoch for %.0f s", number, fold, silence_s)
            workers.kill(worker)


def remove_checkpoints(fit: FitPaths) -> None:
    """Remove what only an unfinished fit needs."""
    for path in (fit.last, fit.previous):
        path.unlink(missing_ok=True)


def remove_networks(fit: FitPaths) -> None:
    """Remove every network of a fit; what it scored stays."""
    remove_checkpoints(fit)
    for path in (fit.weights, fit.best):
        path.unlink(missing_ok=True)
