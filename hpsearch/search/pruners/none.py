"""No pruning: every trial is evaluated on all folds."""

from collections.abc import Sequence

from hpsearch.config import StudyConfig
from hpsearch.data.folds import Folds
from hpsearch.search.pruners import Pruner
from hpsearch.search.racing import FoldOrder, TrialScores


class NoPruner(Pruner):
    """Pruner that never prunes."""

    folds: FoldOrder = "all"

    def should_prune(self, candidate: TrialScores, others: Sequence[TrialScores], folds: Folds) -> None:
        return None


def make(config: StudyConfig) -> NoPruner:
    """Return the pruner."""
    return NoPruner()
