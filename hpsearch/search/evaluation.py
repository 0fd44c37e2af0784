"""The open fits of a trial or of its replicate: which folds are finished, running, or still to be fitted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from hpsearch.config import StudyConfig
from hpsearch.search.pruners import Pruner
from hpsearch.search.racing import PruneDecision
from hpsearch.search.scheduler import OpenFits, StudyState
from hpsearch.store.fits import FitRecord
from hpsearch.store.record import StudyRecord
from hpsearch.store.trials import ReplicateRecord, TrialRecord, count_trials


@dataclass
class Evaluation:
    """A trial, or its replicate, that is being evaluated."""

    study: StudyRecord
    trial: TrialRecord
    config: StudyConfig
    replicate: ReplicateRecord | None = None
    """The replicate's record; None for the trial itself."""
    running: set[int] = field(default_factory=set)
    """Folds that a worker fits now."""
    pruned: PruneDecision | None = None
    """The decision to prune it, until its fits have stopped."""

    @property
    def key(self) -> tuple[int, int]:
        """Number of the trial, and of the replicate."""
        return self.trial.number, int(self.replicate is not None)

    @property
    def name(self) -> str:
        """Name of the trial or replicate, for messages."""
        return f"{'the refit of ' if self.replicate is not None else ''}trial {self.trial.number}"

    @property
    def failures(self) -> dict[str, list[str]]:
        """Fold to one line per death of a worker that fitted it."""
        return (self.trial if self.replicate is None else self.replicate).failures

    def fit(self, fold: int) -> FitRecord:
        """Return the record of one of its fits."""
        return (self.study.fit if self.replicate is None else self.study.replicate_fit)(self.trial.number, fold)

    def finished_folds(self) -> frozenset[int]:
        """Return the folds whose fit is finished."""
        return frozenset(fold for fold in range(self.study.n_folds) if self.fit(fold).is_finished)

    def open_fits(self) -> OpenFits:
        """Return it as the scheduler sees it."""
        pruned, n_epochs = self.pruned, self.config.train.epochs
        return OpenFits(
            self.trial.number,
            int(self.replicate is not None),
            self.finished_folds(),
            frozenset(self.running),
            is_pruned=pruned is not None,
            # Pruned after the last epoch: the fit is finished, even if its worker dies in between.
            resumable=pruned.fold if pruned is not None and pruned.epoch == n_epochs else None,
        )

    @property
    def is_finished(self) -> bool:
        """Whether nothing of it is left to do."""
        fits = self.open_fits()
        if self.pruned is not None:
            return not fits.running and fits.next_fold(self.study.n_folds) is None
        return len(fits.finished) == self.study.n_folds

    def micro_batch(self) -> int | None:
        """Return the smallest part of a batch that memory forced and that changed the result; None if none did."""
        summaries = [self.fit(fold).summary() or {} for fold in range(self.study.n_folds)]
        return min((each["micro_batch"] for each in summaries if each.get("micro_batch")), default=None)

    def set_failures(self, failures: dict[str, list[str]]) -> None:
        """Enter the deaths of workers."""
        if self.replicate is None:
            self.trial = dataclasses.replace(self.trial, failures=failures)
        else:
            self.replicate = dataclasses.replace(self.replicate, failures=failures)

    def add_decision(self, decision: PruneDecision) -> None:
        """Enter a pruner's decision. An epoch that was judged before a restart is not entered twice."""
        before = [
            each for each in self.trial.decisions if each["fold"] != decision.fold or each["epoch"] < decision.epoch
        ]
        self.trial = dataclasses.replace(self.trial, decisions=(*before, decision.to_dict()))
        if decision.drop:
            self.pruned = decision

    def longest_epoch_s(self, fold: int) -> float:
        """Return the seconds of the longest epoch of a fit so far; 0 before its first."""
        return max((row.seconds for row in self.fit(fold).epochs()), default=0.0)


def study_state(
    record: StudyRecord,
    trials: Mapping[int, TrialRecord],
    evaluations: Iterable[Evaluation],
    pruner: Pruner,
    has_shortlist: bool,
) -> StudyState:
    """Return a running study as the scheduler sees it."""
    fits = [evaluation.open_fits() for evaluation in evaluations]
    return StudyState(
        n_folds=record.n_folds,
        n_trials=record.config.study.trials,
        n_counted=count_trials(trials.values()),
        n_suggested=len(trials),
        n_unused=record.n_unused(trials.values()),
        has_complete=any(trial.can_win for trial in trials.values()),
        open=tuple(each for each in fits if not each.replicate),
        replicates=tuple(each for each in fits if each.replicate) if has_shortlist else None,
        lookahead=record.config.study.lookahead,
        folds_in_turn=pruner.is_sequential,
        judges_any_fold=pruner.takes_any_fold,
    )
