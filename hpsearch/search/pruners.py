"""Owns the choice of the rule that ends trials early: our race, Optuna's own pruners, or none."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, WilcoxonPruner
from optuna.samplers import RandomSampler
from optuna.storages import InMemoryStorage

from hpsearch.config import StudyConfig
from hpsearch.data.folds import Folds
from hpsearch.search.racing import Race, TrialScores, Verdict, compare


class Pruner(Protocol):
    """A rule that ends trials early. What is on record decides, so a restart changes nothing."""

    @property
    def is_sequential(self) -> bool:
        """Whether the folds of a trial are to run one after another where there are other trials to run."""

    @property
    def takes_any_fold(self) -> bool:
        """Whether it can judge by whichever folds are finished, not only by the first ones."""

    def judge(self, candidate: TrialScores, others: Sequence[TrialScores], folds: Folds) -> Verdict | None:
        """Asked after every epoch, which is that of `candidate.latest`; None where the rule has nothing to say.

        `others` are all other trials that have scores, in whatever order: ended or not, full or not.
        """


def make_pruner(config: StudyConfig) -> Pruner:  # type: ignore[return]
    """The rule that `study.pruner` names."""
    match config.study.pruner:
        case "race":
            return Race()
        case "median":
            return OptunaPruner(MedianPruner, epochs_of_first_fold)
        case "hyperband":
            return OptunaPruner(lambda: HyperbandPruner(max_resource=config.train.epochs), epochs_of_first_fold)
        case "wilcoxon":
            return OptunaPruner(WilcoxonPruner, images)
        case "none":
            return NoPruner()


class NoPruner:
    """Every trial is evaluated on all folds."""

    is_sequential = False
    takes_any_fold = True

    def judge(self, candidate: TrialScores, others: Sequence[TrialScores], folds: Folds) -> None:
        return None


Report = dict[int, float]
"""Step to value: what is reported to Optuna before it is asked once."""


def epochs_of_first_fold(trial: TrialScores, folds: Folds) -> list[Report]:
    """The mean score after every epoch of fold 0; step = epoch, from 1."""
    return [{epoch: float(mean)} for epoch, mean in enumerate(trial.curves.get(0, ()), start=1)]


def fold_means(trial: TrialScores, folds: Folds) -> list[Report]:
    """The mean score of every finished fold; step = fold."""
    return [{fold: float(trial.curves[fold][-1])} for fold in trial.finished]


def images(trial: TrialScores, folds: Folds) -> list[Report]:
    """The score of every held-out image of every finished fold, a fold at a time; step = place in the pool."""
    return [
        dict(zip(folds.held_out(fold).tolist(), trial.scores[fold][-1].tolist(), strict=True))
        for fold in trial.finished
    ]


class OptunaPruner:
    """One of Optuna's pruners, through Optuna's API.

    It sees a study of its own in memory, where only full trials are COMPLETE and only reports count. In the study's
    database dropped trials are COMPLETE too, with an estimate for a value, which teaches the sampler, but would
    change what these pruners compare with. Built up from the record, this study is the same after a restart.
    """

    is_sequential = True
    takes_any_fold = False

    def __init__(self, make: Callable[[], BasePruner], reports: Callable[[TrialScores, Folds], list[Report]]) -> None:
        """`make` gives the pruner, fresh; `reports` what it is told, one report for each time it is asked."""
        self._reports = reports
        with _quiet():
            pruner = make()
            # The study's name decides Hyperband's brackets, so it is fixed.
            self._study = optuna.create_study(
                study_name="pruner",
                storage=InMemoryStorage(),
                sampler=RandomSampler(seed=0),
                pruner=pruner,
                direction="maximize",
            )
        self._name = type(pruner).__name__
        self._trials: list[optuna.Trial] = []
        self._answers: dict[int, list[bool]] = {}
        """Trial number to what was answered to each of its reports."""
        self._told: set[int] = set()

    def judge(self, candidate: TrialScores, others: Sequence[TrialScores], folds: Folds) -> Verdict | None:
        n_reports = len(self._reports(candidate, folds))
        if candidate.is_full(folds.k) or n_reports == len(self._reports(_an_epoch_ago(candidate), folds)):
            return None
        for trial in sorted(others, key=lambda trial: trial.number):
            self._bring_up_to_date(trial, folds)
        self._bring_up_to_date(candidate, folds)
        drop = self._answers[candidate.number][n_reports - 1]
        fold = candidate.latest
        epoch = len(candidate.scores[fold])
        where = f"at epoch {epoch} of fold {fold}" if epoch < candidate.n_epochs else f"after fold {fold}"
        reason = f"{where}: {'dropped' if drop else 'kept'} by Optuna's {self._name}"
        found = compare(candidate, others, folds.k)
        if found is not None:
            return Verdict(drop=drop, fold=fold, epoch=epoch, reason=reason, **found._asdict())
        so_far = np.concatenate([scores[-1] for scores in candidate.scores.values()]).mean(dtype=np.float64)
        return Verdict(drop=drop, estimate=float(so_far), fold=fold, epoch=epoch, reason=reason)

    def _bring_up_to_date(self, trial: TrialScores, folds: Folds) -> None:
        """Report what is new, ask after each report, and tell the value of a full trial."""
        if trial.number in self._told:
            return
        while len(self._trials) <= trial.number:
            # Also numbers that never have scores (infeasible): Hyperband's brackets go by the number.
            self._trials.append(self._study.ask())
        optunas, answers = self._trials[trial.number], self._answers.setdefault(trial.number, [])
        for report in self._reports(trial, folds)[len(answers) :]:
            for step, value in report.items():
                optunas.report(value, step)
            answers.append(optunas.should_prune())
        if trial.is_full(folds.k):
            self._study.tell(optunas, trial.value)
            self._told.add(trial.number)


def _an_epoch_ago(trial: TrialScores) -> TrialScores:
    scores = {**trial.scores, trial.latest: trial.scores[trial.latest][:-1]}
    return TrialScores(
        trial.number, {fold: each for fold, each in scores.items() if len(each)}, trial.n_epochs, trial.schedule
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's notes on what is experimental and on a study in memory that is nobody's business."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
