"""Ask the pruner about a trial, with the scores that it may compare with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from hpsearch.search import pruners
from hpsearch.search.pruners import Pruner
from hpsearch.search.racing import PruneDecision, TrialScores, decide
from hpsearch.store.record import StudyRecord
from hpsearch.store.trials import TrialRecord


class Judge:
    """The study's pruner and the scores of the ended trials, each read once."""

    def __init__(self, record: StudyRecord, trials: Mapping[int, TrialRecord]) -> None:
        """`trials` are all trials by number, kept up to date by the caller."""
        self.pruner: Pruner = pruners.make_pruner(record.config)
        self._record = record
        self._trials = trials
        self._scores: dict[int, TrialScores] = {}

    def judge(self, trial: TrialRecord, fold: int) -> PruneDecision | None:
        """Return what the pruner decides after an epoch of this fold; None where it has nothing to say."""
        candidate = self._scores_of(trial.number)
        # Other folds that are fitted at the same time do not count: how far they are depends on chance.
        scores = {each: candidate.scores[each] for each in candidate.finished if each != fold}
        candidate = dataclasses.replace(candidate, scores={**scores, fold: candidate.scores[fold]})
        others = self._ended_scores()
        if lookahead := self._record.config.study.lookahead:
            # Which later trials have ended depends on the number of workers.
            others = [each for each in others if each.number <= trial.number - lookahead]
        # A copy must not lose against itself.
        others = [each for each in others if self._trials[each.number].params != trial.params]
        return self.pruner.judge(candidate, others, self._record.folds)

    def decision_on_request(self, trial: TrialRecord, reason: str) -> PruneDecision | None:
        """Return the decision to prune a trial that a user stops; None if it has no scores yet."""
        candidate = self._scores_of(trial.number)
        if not candidate.scores:
            return None
        return decide(True, candidate, self._ended_scores(), self._record.n_folds, reason)

    def _scores_of(self, number: int) -> TrialScores:
        """Return the per-image scores after every epoch of every fold that was begun."""
        if number in self._scores:
            return self._scores[number]
        scores = {
            fold: found
            for fold in range(self._record.n_folds)
            if len(found := self._record.fit(number, fold).scores()) > 0
        }
        train = self._trials[number].study_config.train
        return TrialScores(number, scores, train.epochs, train.schedule)

    def _ended_scores(self) -> list[TrialScores]:
        """Return the scores of the ended trials by number, as the same objects each time: pruners cache by them."""
        for trial in self._trials.values():
            may_count = trial.can_win or trial.outcome == "pruned"
            if may_count and trial.number not in self._scores:
                self._scores[trial.number] = self._scores_of(trial.number)
        return [self._scores[number] for number in sorted(self._scores)]
