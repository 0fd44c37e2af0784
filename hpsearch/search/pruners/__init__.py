"""Find the pruner that `study.pruner` names. Each pruner is a module of this package.

A pruner's module has a function `make(config)`, which returns an object with the methods of `Pruner`.
"""

import importlib
from collections.abc import Sequence
from typing import Protocol

from hpsearch.config import StudyConfig
from hpsearch.data.folds import Folds
from hpsearch.search.racing import FoldOrder, TrialScores
from hpsearch.store.trials import PruneDecision


class Pruner(Protocol):
    """Rule that ends trials early. It uses recorded scores only, so its decisions do not change after a restart."""

    folds: FoldOrder
    """How the folds of a trial are fitted."""

    def should_prune(
        self, candidate: TrialScores, others: Sequence[TrialScores], folds: Folds
    ) -> PruneDecision | None:
        """Return the decision after the latest epoch of fold `candidate.latest`; None to make no decision.

        `others` contains the trials to compare with, in any order. They have scores, but need not be complete. Open
        trials are among them only if folds are fitted as needed.
        """
        return None

    def order(self, trials: Sequence[TrialScores], folds: Folds) -> list[int]:
        """Return the numbers of the open trials that may still win, those first that should get the next folds.

        `should_prune` is called for the open trials that have a finished fold and are not in the list. This method is
        only called if folds are fitted as needed.
        """
        return []


def make_pruner(config: StudyConfig) -> Pruner:
    """Return the pruner named in `study.pruner`."""
    pruner: Pruner = importlib.import_module(f"hpsearch.search.pruners.{config.study.pruner}").make(config)
    return pruner
