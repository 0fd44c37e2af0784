"""Select the trials to replicate after the search, and track their refits.

The best of many scores is partly due to chance: to the sample of images and to the seeds of the fits. The top
candidates are therefore replicated, to separate run-to-run variance from the effect of the configuration. The
replicate of a trial is a second set of fits on the same folds with new seeds. Each of these fits is called a refit.
"""

import logging
from collections.abc import Mapping

import numpy as np

from hpsearch.stats.best import rank
from hpsearch.stats.selection import select_for_replication
from hpsearch.store.fits import remove_networks
from hpsearch.store.record import StudyRecord, has_all_replicates, wants_replicates
from hpsearch.store.trials import ReplicateRecord, Shortlist, TrialRecord
from hpsearch.store.versions import code_version, now

logger = logging.getLogger(__name__)

N_KEPT = 2
"""Number of replicated trials that keep the networks of their refits. A `final` run uses these networks to select the
post-processing, because they can predict the images that they held out."""


def n_left(record: StudyRecord, n_trials: int) -> int:
    """Return the maximum number of trials still to be replicated, if `n_trials` trials are still to be evaluated."""
    study = record.config.study
    if study.folds == "fixed" or study.trials < 2 or (n_trials == 0 and has_all_replicates(record)):
        return 0
    return min(study.confirm, study.trials)


def shortlist(record: StudyRecord) -> Shortlist | None:
    """Return the trials to replicate; None if no trial should be replicated.

    The shortlist is selected and written on the first call. It is selected again if more trials have become complete
    or if `study.confirm` has changed.
    """
    count, contenders = record.config.study.confirm, record.contenders(record.trials())
    if not wants_replicates(record, contenders):
        return None
    stored = record.valid_shortlist(contenders)
    if stored is not None and stored.count == count:
        return stored
    complete = tuple(trial.number for trial in contenders)
    picked = select_for_replication(np.stack([record.out_of_fold(number) for number in complete]), count)
    chosen = Shortlist(tuple(complete[index] for index in picked), complete, count)
    record.write_shortlist(chosen)
    logger.info("trials to refit: %s", ", ".join(map(str, chosen.trials)))
    return chosen


def open_replicates(record: StudyRecord) -> list[ReplicateRecord]:
    """Return the replicates that have not ended, in shortlist order.

    A replicate that has not begun gets a new record, which is not written yet.
    """
    chosen = shortlist(record)
    seconds = [
        record.replicate(number) or ReplicateRecord(trial=number, began_at=now(), code=code_version())
        for number in (chosen.trials if chosen is not None else ())
    ]
    return [second for second in seconds if second.outcome is None]


def progress(record: StudyRecord) -> tuple[tuple[int, ...], int, int]:
    """Return the trials on the shortlist, the number of their finished refits, and the number of all their refits."""
    chosen = record.shortlist()
    trials = chosen.trials if chosen is not None else ()
    fits = [fit for number in trials for fit in record.fits(number, replicate=1)]
    return trials, sum(fit.is_finished for fit in fits), len(fits)


def remove_unneeded_networks(record: StudyRecord) -> None:
    """Remove the networks of all refits except those of the best `N_KEPT` trials, once all replicates have ended."""
    standing = record.standing()
    # Trials with a complete replicate come first in the ranking.
    kept = standing.ranking[: min(N_KEPT, len(standing.confirmed))]
    for second in record.replicate_records() if standing.confirmed else ():
        for fit in record.fits(second.trial, replicate=1) if second.trial not in kept else ():
            remove_networks(fit.paths)


def remove_networks_of_losers(record: StudyRecord, trials: Mapping[int, TrialRecord], number: int) -> None:
    """Remove networks after the trial `number` has ended, so that only the two best complete trials keep theirs."""
    ranking = rank({each.number: each.value or 0.0 for each in record.contenders(trials.values())})
    for each in {number, *ranking[2:4]} - set(ranking[:2]):
        for fit in record.fits(each):
            remove_networks(fit.paths)
