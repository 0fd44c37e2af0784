"""Optuna's Hyperband (Li et al., JMLR 2018), applied to the mean score after each epoch of the first fold."""

from optuna.pruners import HyperbandPruner

from hpsearch.config import StudyConfig
from hpsearch.search.optuna_pruner import OptunaPruner, epochs_of_first_fold


def make(config: StudyConfig) -> OptunaPruner:
    """Return the pruner."""
    return OptunaPruner(lambda: HyperbandPruner(max_resource=config.train.epochs), epochs_of_first_fold)
