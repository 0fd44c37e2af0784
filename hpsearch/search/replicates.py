"""Fits the configurations that may be the best once more, with new seeds on the same folds, when the search is over.

The best of many first fits is too high on average. Replicate fits of the few trials that bootstrap selection picks
most often separate run-to-run variance from real effects (`stats.selection`). The shortlist and its fits are on
record like every trial: after a stop or a kill, the same command continues, and finished replicate fits are reused.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from hpsearch.config import StudyConfig, stable_seed
from hpsearch.data.pool_caches import PoolCaches
from hpsearch.search.callbacks import Listener
from hpsearch.search.constant_predictions import ConstantWarnings
from hpsearch.stats.selection import select_for_replication
from hpsearch.store.record import SecondRecord, Shortlist, StudyRecord, TrialRecord, code_version, now
from hpsearch.workers import jobs as fits
from hpsearch.workers.local_pool import POLL_S, Event, Workers

logger = logging.getLogger(__name__)

N_KEPT = 2
"""Confirmed trials whose second networks are kept: they predict the images that they have not seen."""

EpochSeconds = Callable[[StudyConfig, int, list[dict[str, Any]]], float]
"""Seconds that an epoch of a fit should take, from its configuration, fold and rows so far."""


def n_left(record: StudyRecord, n_trials: int) -> int:
    """Configurations to be fitted once more when `n_trials` are still to come, at most: fewer may be picked."""
    study = record.config.study
    if study.folds == "fixed" or study.trials < 2 or (n_trials == 0 and is_over(record)):
        return 0
    return min(study.confirm, study.trials)


def shortlist(record: StudyRecord) -> Shortlist | None:
    """The configurations to fit once more now, written down if they are chosen now; None where there is no choice.

    Chosen again when full trials have come since, or another number is wanted.
    """
    count = record.config.study.confirm
    full = tuple(trial.number for trial in record.full_trials())
    if record.config.study.folds == "fixed" or count == 0 or len(full) < 2:
        return None
    stored = record.shortlist()
    if stored is not None and (stored.of, stored.count) == (full, count):
        return stored
    picked = select_for_replication(np.stack([record.out_of_fold(number) for number in full]), count)
    chosen = Shortlist(tuple(full[index] for index in picked), full, count)
    record.write_shortlist(chosen)
    logger.info("to be fitted once more: trials %s", ", ".join(map(str, chosen.trials)))
    return chosen


def is_over(record: StudyRecord) -> bool:
    """Whether nothing is left to confirm once the search itself is over."""
    study = record.config.study
    full = [trial.number for trial in record.full_trials()]
    if study.folds == "fixed" or study.confirm == 0 or len(full) < 2:
        return True
    stored = record.shortlist()
    return (
        stored is not None
        and (stored.of, stored.count) == (tuple(full), study.confirm)
        and all((second := record.second(number)) is not None and second.outcome for number in stored.trials)
    )


class Confirmation:
    """The second fits of one start: handed out, heard, and recorded, until all are there or it is asked to stop."""

    def __init__(
        self,
        record: StudyRecord,
        caches: PoolCaches,
        listener: Listener,
        *,
        keep_to_requests: Callable[[], None],
        is_stopping: Callable[[], bool],
        is_urgent: Callable[[], bool],
        epoch_s: EpochSeconds,
        wake_tracking: Callable[[], None],
        show_ranking: Callable[[], None],
    ) -> None:
        """`keep_to_requests` lets requests to stop be heard; `show_ranking` brings Optuna's database up to date."""
        self._record = record
        self._caches = caches
        self._listener = listener
        self._keep_to_requests = keep_to_requests
        self._is_stopping = is_stopping
        self._is_urgent = is_urgent
        self._epoch_s_of = epoch_s
        self._wake_tracking = wake_tracking
        self._show_ranking = show_ranking
        self._workers: Workers
        self._open: dict[int, SecondRecord] = {}
        self._trials: dict[int, TrialRecord] = {}
        self._constant = ConstantWarnings(record, listener.said)

    def run(self, workers: Workers) -> None:
        """Fit what is missing. Returns when all is there, or after the current epochs once it is asked to stop."""
        chosen = shortlist(self._record)
        if chosen is None:
            return
        self._workers = workers
        for number in chosen.trials:
            second = self._record.second(number)
            if second is not None and second.outcome is not None:
                continue
            self._trials[number] = self._record.trial(number)
            self._open[number] = second or SecondRecord(trial=number, began_at=now(), code=code_version())
            self._write(self._open[number])
            self._end_if_finished(number)
        if self._open:
            self._tell_progress(chosen)
        while self._open and not self._is_urgent():
            self._keep_to_requests()
            if not self._is_stopping():
                self._hand_out(chosen)
            elif not workers.busy():
                break
            for event in workers.events(POLL_S):
                self._hear(event, chosen)
            fits.end_silent(workers, self._epoch_s)
        self._clear(chosen)

    def _hand_out(self, chosen: Shortlist) -> None:
        fitting = {(worker.job["trial"], worker.job["fold"]) for worker in self._workers.busy() if worker.job}
        waiting = (
            (number, fold)
            for number in chosen.trials
            if number in self._open
            for fold in range(self._record.n_folds)
            if (number, fold) not in fitting and not self._record.second_fit(number, fold).is_finished
        )
        for worker, (number, fold) in zip(self._workers.idle(), waiting, strict=False):
            self._workers.submit(worker, self._job(number, fold))

    def _job(self, number: int, fold: int) -> dict[str, Any]:
        folder = self._record.second_fit(number, fold).paths
        seed = second_seed(self._record.config, number, fold)
        trial = self._trials[number]
        return fits.fold_job(self._record, trial, fold, folder, self._caches, seed=seed, keep_best=False)

    def _hear(self, event: Event, chosen: Shortlist) -> None:
        if event.job is None or event.job["trial"] not in self._open:
            return
        number, fold = int(event.job["trial"]), int(event.job["fold"])
        if event.kind == "epoch":
            row = event.message["row"]
            logger.info("second fit of trial %d, fold %d epoch %d", number, fold, row["epoch"])
            self._listener.epoch_ended(number, fold, row)
            self._wake_tracking()
            self._workers.reply(event.worker, go=not self._is_stopping())
        elif event.kind == "finished":
            score = event.message["summary"]["value"]
            logger.info("second fit of trial %d, fold %d finished: %.4f", number, fold, score)
            self._listener.fold_ended(number, fold, score)
            self._constant.check(number)
            self._end_if_finished(number)
            self._tell_progress(chosen)
        elif event.kind == "diverged":
            self._end(number, "diverged", f"{event.message['text']} of fold {fold + 1}, replicate fit")
        elif event.kind == "out_of_memory":
            self._end(number, "infeasible", event.message["text"])
        elif event.kind in ("died", "error"):
            self._hear_failure(number, fold, event.message)

    def _hear_failure(self, number: int, fold: int, message: dict[str, Any]) -> None:
        """Once more from the checkpoint, unless this fold has ended its worker too often."""
        what, fit = f"replicate fit of trial {number}, fold {fold + 1}", self._record.second_fit(number, fold)
        second = self._open[number]
        failures, reason = fits.count_death(fit, fold, second.failures, message, what)
        self._listener.said(f"{what}: worker {message['text']}")
        self._open[number] = dataclasses.replace(second, failures=failures)
        self._write(self._open[number])
        if fit.is_finished:
            # It died after its result.
            self._end_if_finished(number)
        elif reason:
            self._end(number, "failed", reason)

    def _end_if_finished(self, number: int) -> None:
        seconds = [self._record.second_fit(number, fold) for fold in range(self._record.n_folds)]
        if not all(fit.is_finished for fit in seconds):
            return
        if any((fit.summary() or {}).get("micro_batch") for fit in seconds):
            # Then it is another configuration that was fitted.
            self._end(number, "infeasible", "memory forced parts of batches, which changed the result")
        else:
            self._end(number, "full")

    def _end(
        self, number: int, outcome: Literal["full", "diverged", "infeasible", "failed"], reason: str = ""
    ) -> None:
        second = dataclasses.replace(self._open.pop(number), outcome=outcome, reason=reason, ended_at=now())
        self._write(second)
        self._show_ranking()
        for worker in self._workers.busy():
            if worker.job is not None and worker.job["trial"] == number:
                self._workers.kill(worker)
        if outcome == "full":
            worth = float(np.nanmean(self._record.second_out_of_fold(number)))
            text = f"trial {number} fitted once more: {worth:.4f}, first {self._trials[number].value:.4f}"
        else:
            text = f"trial {number} fitted once more: {outcome} ({reason}), so it cannot win"
        logger.info("%s", text)
        self._listener.said(text)

    def _write(self, second: SecondRecord) -> None:
        self._record.write_second(second)
        self._wake_tracking()

    def _tell_progress(self, chosen: Shortlist) -> None:
        n_folds = self._record.n_folds
        n_done = sum(
            self._record.second_fit(number, fold).is_finished for number in chosen.trials for fold in range(n_folds)
        )
        self._listener.confirming(chosen.trials, n_done, len(chosen.trials) * n_folds)

    def _epoch_s(self, number: int, fold: int) -> float | None:
        if number not in self._open:
            return None
        rows = self._record.second_fit(number, fold).epochs()
        return self._epoch_s_of(self._trials[number].study_config, fold, rows)

    def _clear(self, chosen: Shortlist) -> None:
        """Once all is confirmed, keep the second networks of the best and of the one behind it only."""
        standing = self._record.standing()
        if not standing.confirmed:
            return
        kept = [number for number in standing.ranking if number in standing.confirmed][:N_KEPT]
        for second in self._record.second_records():
            for fold in range(self._record.n_folds) if second.trial not in kept else ():
                fits.remove_networks(self._record.second_fit(second.trial, fold).paths)


def second_seed(config: StudyConfig, trial: int, fold: int) -> int:
    """Seed of one second fit, unlike that of the first."""
    return stable_seed(config.study.seed, "second fit", trial, fold)
