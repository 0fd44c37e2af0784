"""Optuna's median pruner, applied to the mean score after each epoch of the first fold."""

from optuna.pruners import MedianPruner

from hpsearch.config import StudyConfig
from hpsearch.search.optuna_pruner import OptunaPruner, epochs_of_first_fold


def make(config: StudyConfig) -> OptunaPruner:
    """Return the pruner."""
    return OptunaPruner(MedianPruner, epochs_of_first_fold)
