"""Optuna's Wilcoxon pruner, applied to the image scores of the finished folds."""

from optuna.pruners import WilcoxonPruner

from hpsearch.config import StudyConfig
from hpsearch.search.optuna_pruner import OptunaPruner, images


def make(config: StudyConfig) -> OptunaPruner:
    """Return the pruner."""
    return OptunaPruner(WilcoxonPruner, images)
