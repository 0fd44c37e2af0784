"""The pruners that `study.pruner` can name: one module each, found by its name.

A pruner's module has a function `make(config)` that returns an object with the methods of `Pruner`.
"""

import importlib
from collections.abc import Sequence
from typing import Protocol

from hpsearch.config import StudyConfig
from hpsearch.data.folds import Folds
from hpsearch.search.racing import TrialScores
from hpsearch.store.trials import PruneDecision


class Pruner(Protocol):
    """A rule that ends trials early. It decides from recorded scores alone, so a restart changes nothing."""

    is_sequential: bool
    """Whether the folds of a trial are fitted one after another, as long as other trials can be fitted."""
    takes_any_fold: bool
    """Whether it can judge a trial by any finished folds, not only by the first ones."""

    def judge(self, candidate: TrialScores, others: Sequence[TrialScores], folds: Folds) -> PruneDecision | None:
        """Return the decision after the latest epoch of fold `candidate.latest`; None to make no decision.

        `others` are all other trials that have scores, in any order, whether they have ended or not.
        """


def make_pruner(config: StudyConfig) -> Pruner:
    """Return the pruner that `study.pruner` names."""
    pruner: Pruner = importlib.import_module(f"hpsearch.search.pruners.{config.study.pruner}").make(config)
    return pruner
