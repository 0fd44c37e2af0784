"""Apply one of Optuna's pruners to the scores of a study."""

import dataclasses
from collections.abc import Callable, Sequence

import optuna
from optuna.pruners import BasePruner

from hpsearch.data.folds import Folds
from hpsearch.search.pruners import Pruner
from hpsearch.search.racing import FoldOrder, TrialScores, decide
from hpsearch.search.suggest import quiet
from hpsearch.store.trials import PruneDecision

Report = dict[int, float]
"""Values by step that are reported to Optuna together, before its pruner is asked for a decision."""


def epochs_of_first_fold(trial: TrialScores, folds: Folds) -> list[Report]:
    """Return one report for each epoch of fold 0: the mean score. The step is the epoch, counted from 1."""
    return [{epoch: float(mean)} for epoch, mean in enumerate(trial.curves.get(0, ()), start=1)]


def images(trial: TrialScores, folds: Folds) -> list[Report]:
    """Return one report for each finished fold: its image scores.

    Optuna's steps are the indices of the images in the pool.
    """
    return [
        dict(zip(folds.held_out(fold).tolist(), trial.scores[fold][-1].tolist(), strict=True))
        for fold in trial.finished
    ]


class OptunaPruner(Pruner):
    """Pruner that delegates its decisions to one of Optuna's pruners.

    Optuna's pruner sees an in-memory study that contains only the reports of all trials and the values of complete
    trials. This study is built from the recorded scores, so it is the same after a restart.
    """

    folds: FoldOrder = "in order"

    def __init__(self, make: Callable[[], BasePruner], reports: Callable[[TrialScores, Folds], list[Report]]) -> None:
        """Create Optuna's pruner by calling `make`.

        `reports` returns all reports of a trial so far. The pruner makes one decision after each report.
        """
        self._reports = reports
        with quiet():
            pruner = make()
            # Hyperband's brackets depend on the study's name, so the name is fixed.
            self._study = optuna.create_study(study_name="pruner", pruner=pruner, direction="maximize")
        self._name = type(pruner).__name__
        self._trials: list[optuna.Trial] = []
        self._answers: dict[int, list[bool]] = {}
        """Optuna's answers by trial number, one per report; True to prune the trial."""

    def should_prune(
        self, candidate: TrialScores, others: Sequence[TrialScores], folds: Folds
    ) -> PruneDecision | None:
        n_reports = len(self._reports(candidate, folds))
        if candidate.is_full(folds.k) or n_reports == len(self._reports(_an_epoch_ago(candidate), folds)):
            return None
        for trial in sorted(others, key=lambda trial: trial.number):
            self._bring_up_to_date(trial, folds)
        self._bring_up_to_date(candidate, folds)
        drop = self._answers[candidate.number][n_reports - 1]
        reason = f"{candidate.place}: {'pruned' if drop else 'kept'} by Optuna's {self._name}"
        return decide(drop, candidate, others, folds, reason)

    def _bring_up_to_date(self, trial: TrialScores, folds: Folds) -> None:
        """Pass a trial's new reports to Optuna and ask for a decision after each.

        If the trial is complete, its value is passed too.
        """
        while len(self._trials) <= trial.number:
            # Include infeasible trials, which have no scores, because Hyperband assigns brackets by trial number.
            self._trials.append(self._study.ask())
        optunas, answers = self._trials[trial.number], self._answers.setdefault(trial.number, [])
        for report in self._reports(trial, folds)[len(answers) :]:
            for step, value in report.items():
                optunas.report(value, step)
            # Some pruners return a NumPy bool, which cannot be written as JSON.
            answers.append(bool(optunas.should_prune()))
        if trial.is_full(folds.k):
            with quiet():
                self._study.tell(optunas, trial.value, skip_if_finished=True)


def _an_epoch_ago(trial: TrialScores) -> TrialScores:
    scores = {**trial.scores, trial.latest: trial.scores[trial.latest][:-1]}
    return dataclasses.replace(trial, scores={fold: each for fold, each in scores.items() if len(each)})
