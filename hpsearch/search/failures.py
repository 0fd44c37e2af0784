"""What deaths and silence of workers mean for the fits that they ran."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from hpsearch.errors import StorageError, WorkerError
from hpsearch.paths import remove_stale_temporaries
from hpsearch.store.fits import FitRecord
from hpsearch.workers.jobs import Failed, FitJob
from hpsearch.workers.loop import DEATHS_PER_JOB
from hpsearch.workers.pool import WorkerPool

logger = logging.getLogger(__name__)

SILENCE_FACTOR = 10.0
SILENCE_MIN_S = 300.0
"""A fit without an epoch for so many times the seconds it should take, and at least so long, counts as hanging."""
Failures = dict[str, list[str]]
"""Fold to one line per death of a worker that fitted it."""


def count_death(fit: FitRecord, fold: int, failures: Failures, failure: Failed, what: str) -> tuple[Failures, str]:
    """Return the failures with this one added, and the reason why the fit is given up, or "".

    `what` names the fit in messages. Deaths with an epoch in between are the machine's fault, not the
    configuration's. Raises StorageError and WorkerError where another try would end in the same way.
    """
    if failure.is_storage:
        raise StorageError(failure.text)
    if failure.is_known:
        raise WorkerError(f"{what}: {failure.text}")
    logger.warning("%s: worker %s\n%s", what, failure.text, failure.traceback)
    remove_stale_temporaries(fit.paths.root)
    place = f"after epoch {len(fit.epochs())}: "
    deaths = [*failures.get(str(fold), []), place + failure.text]
    is_last = sum(each.startswith(place) for each in deaths) >= DEATHS_PER_JOB
    reason = f"fold {fold + 1} ended its worker {DEATHS_PER_JOB} times {place}{failure.text}" if is_last else ""
    return {**failures, str(fold): deaths}, reason


def kill_hanging(pool: WorkerPool, epoch_s: Callable[[FitJob], float | None]) -> None:
    """Kill every worker without an epoch for so long that its fit must be hanging.

    `epoch_s` returns the seconds that an epoch of the fit should take, None for a fit that nobody waits for.
    """
    for worker in pool.busy():
        silence_s = time.monotonic() - worker.last_report_at
        if not isinstance(worker.job, FitJob) or silence_s <= SILENCE_MIN_S:
            continue
        expected_s = epoch_s(worker.job)
        if expected_s is not None and silence_s > SILENCE_FACTOR * expected_s:
            logger.warning("trial %d fold %d: no epoch for %.0f s", worker.job.trial, worker.job.fold, silence_s)
            pool.kill(worker)
