"""Which trials are replicated when the search is over, and what follows from their refits.

The best of many first fits owes part of its score to chance, in its images and in its runs. Refits of the top
candidates with new seeds separate run-to-run variance from the effect of the configuration.
"""

from __future__ import annotations

import logging

import numpy as np

from hpsearch.stats.selection import select_for_replication
from hpsearch.store.fits import remove_networks
from hpsearch.store.record import StudyRecord, has_all_replicates
from hpsearch.store.trials import ReplicateRecord, Shortlist
from hpsearch.store.versions import code_version, now

logger = logging.getLogger(__name__)

N_KEPT = 2
"""Replicated trials whose second networks are kept: they predict the images that they have not seen."""


def n_left(record: StudyRecord, n_trials: int) -> int:
    """Return how many configurations are to be replicated at most, when `n_trials` trials are still to come."""
    study = record.config.study
    if study.folds == "fixed" or study.trials < 2 or (n_trials == 0 and has_all_replicates(record)):
        return 0
    return min(study.confirm, study.trials)


def shortlist(record: StudyRecord) -> Shortlist | None:
    """Return the trials to replicate now; None where there is no choice between trials.

    The shortlist is made and written when it is first asked for, and again when complete trials have come since or
    another number of replicates is wanted.
    """
    count = record.config.study.confirm
    complete = tuple(trial.number for trial in record.complete_trials())
    if record.config.study.folds == "fixed" or count == 0 or len(complete) < 2:
        return None
    stored = record.shortlist()
    if stored is not None and (stored.of, stored.count) == (complete, count):
        return stored
    picked = select_for_replication(np.stack([record.out_of_fold(number) for number in complete]), count)
    chosen = Shortlist(tuple(complete[index] for index in picked), complete, count)
    record.write_shortlist(chosen)
    logger.info("to be refitted: trials %s", ", ".join(map(str, chosen.trials)))
    return chosen


def open_replicates(record: StudyRecord) -> list[ReplicateRecord]:
    """Return the replicates that have not ended, in the order of the shortlist; new ones are not written yet."""
    chosen = shortlist(record)
    found = []
    for number in chosen.trials if chosen is not None else ():
        second = record.replicate(number) or ReplicateRecord(trial=number, began_at=now(), code=code_version())
        if second.outcome is None:
            found.append(second)
    return found


def progress(record: StudyRecord) -> tuple[tuple[int, ...], int, int]:
    """Return the trials on the shortlist, their refits that are finished, and all their refits."""
    chosen = record.shortlist()
    trials = chosen.trials if chosen is not None else ()
    fits = [record.replicate_fit(number, fold) for number in trials for fold in range(record.n_folds)]
    return trials, sum(fit.is_finished for fit in fits), len(fits)


def remove_unneeded_networks(record: StudyRecord) -> None:
    """Remove the networks of replicates, once all have ended, but those of the best trial and of the next one."""
    standing = record.standing()
    if not standing.confirmed:
        return
    kept = [number for number in standing.ranking if number in standing.confirmed][:N_KEPT]
    for second in record.replicate_records():
        for fold in range(record.n_folds) if second.trial not in kept else ():
            remove_networks(record.replicate_fit(second.trial, fold).paths)
