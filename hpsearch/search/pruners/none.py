"""No pruning: every trial is evaluated on all folds."""

from hpsearch.config import StudyConfig
from hpsearch.search.pruners import Pruner
from hpsearch.search.racing import FoldOrder


class NoPruner(Pruner):
    """Pruner that never prunes."""

    folds: FoldOrder = "all"


def make(config: StudyConfig) -> NoPruner:
    """Return the pruner."""
    return NoPruner()
