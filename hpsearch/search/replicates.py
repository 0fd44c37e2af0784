"""Which trials are replicated when the search is over, and what follows from their refits.

The best of many first fits owes part of its score to chance, in its images and in its runs. Refits of the top
candidates with new seeds separate run-to-run variance from the effect of the configuration.
"""

import logging

import numpy as np

from hpsearch.stats.selection import select_for_replication
from hpsearch.store.fits import remove_networks
from hpsearch.store.record import StudyRecord, has_all_replicates, wants_replicates
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
    count, contenders = record.config.study.confirm, record.complete_trials()
    if not wants_replicates(record, contenders):
        return None
    stored = record.valid_shortlist(contenders)
    if stored is not None and stored.count == count:
        return stored
    complete = tuple(trial.number for trial in contenders)
    picked = select_for_replication(np.stack([record.out_of_fold(number) for number in complete]), count)
    chosen = Shortlist(tuple(complete[index] for index in picked), complete, count)
    record.write_shortlist(chosen)
    logger.info("to be refitted: trials %s", ", ".join(map(str, chosen.trials)))
    return chosen


def open_replicates(record: StudyRecord) -> list[ReplicateRecord]:
    """Return the replicates that have not ended, in the order of the shortlist; new ones are not written yet."""
    chosen = shortlist(record)
    seconds = [
        record.replicate(number) or ReplicateRecord(trial=number, began_at=now(), code=code_version())
        for number in (chosen.trials if chosen is not None else ())
    ]
    return [second for second in seconds if second.outcome is None]


def progress(record: StudyRecord) -> tuple[tuple[int, ...], int, int]:
    """Return the trials on the shortlist, their refits that are finished, and all their refits."""
    chosen = record.shortlist()
    trials = chosen.trials if chosen is not None else ()
    fits = [fit for number in trials for fit in record.fits(number, replicate=True)]
    return trials, sum(fit.is_finished for fit in fits), len(fits)


def remove_unneeded_networks(record: StudyRecord) -> None:
    """Remove the networks of replicates, once all have ended, but those of the best trial and of the next one."""
    standing = record.standing()
    # Confirmed trials come first in the ranking.
    kept = standing.ranking[: min(N_KEPT, len(standing.confirmed))]
    for second in record.replicate_records() if standing.confirmed else ():
        for fit in record.fits(second.trial, replicate=True) if second.trial not in kept else ():
            remove_networks(fit.paths)
