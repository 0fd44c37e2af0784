"""Compute scores and rankings from the files of a study."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hpsearch.config import get_setting
from hpsearch.errors import RecordError, StudyError
from hpsearch.paths import ProjectPaths
from hpsearch.stats.best import rank
from hpsearch.store import lock
from hpsearch.store.files import StudyFiles
from hpsearch.store.fits import FitRecord
from hpsearch.store.trials import Shortlist, Standing, TrialRecord, count_trials

Scores = npt.NDArray[np.float64]


class StudyRecord(StudyFiles):
    """Record of one study: its files, and the scores and ranking computed from them."""

    def out_of_fold(self, trial: int, replicate: int = 0) -> Scores:
        """Return the out-of-fold score of each pool image, (pool,); NaN if no finished fit held the image out."""
        result = np.full(len(self.folds.ids), np.nan)
        for fold, fit in enumerate(self.fits(trial, replicate)):
            if fit.is_finished:
                result[self.folds.held_out(fold)] = self.final_scores(fit, fold)
        return result

    def final_scores(self, fit: FitRecord, fold: int) -> Scores:
        """Return the per-image scores after the last epoch of a finished fit, in the order of `folds.held_out(fold)`.

        Raises RecordError if the number of scores differs from the number of images in the fold.
        """
        path, scores = fit.paths.scores, fit.scores()
        n_images = len(self.folds.held_out(fold))
        if scores.shape[0] == 0 or scores.shape[1] != n_images:
            raise RecordError(f"{path} contains {scores.shape} scores, but fold {fold + 1} has {n_images} images")
        return np.asarray(scores[-1], np.float64)

    def value(self, trial: int) -> float:
        """Return a trial's mean score over all held-out images. Raises RecordError if a fold is not finished."""
        held_out = np.concatenate([self.folds.held_out(fold) for fold in range(self.n_folds)])
        scores = self.out_of_fold(trial)[held_out]
        if np.isnan(scores).any():
            raise RecordError(f"trial {trial} of study {self.name!r} has no score for some images")
        return float(np.mean(scores))

    def mean_over_fits(self, trial: int) -> float:
        """Return the mean score over all images and both fits of a trial whose replicate is complete.

        Raises RecordError if a fit is not finished.
        """
        both = (self.out_of_fold(trial) + self.out_of_fold(trial, replicate=1)) / 2
        if np.isnan(both).any():
            raise RecordError(f"trial {trial} of study {self.name!r} or its refit has no score for some images")
        return float(np.mean(both))

    def verify(self) -> None:
        """Check the files of all ended trials. Raises RecordError, naming the damaged file."""
        trials = self.trials()
        for expected, trial in enumerate(trials):
            if trial.number != expected and not any(each.outcome == "orphaned" for each in trials):
                path = self.paths.trial(expected).trial
                advice = "restore the folder from a backup, or start another study with --study NAME"
                raise RecordError(f"{path} is missing, but later trials exist: {advice}")
        for trial in trials:
            if trial.outcome in (None, "orphaned"):
                continue
            second = self.replicate(trial.number)
            replicates = self.fits(trial.number, replicate=1) if second is not None and second.outcome else []
            for fit in (*self.fits(trial.number), *replicates):
                fit.verify()
            if trial.outcome == "complete" and self.value(trial.number) != trial.value:
                root = self.paths.trial(trial.number).root
                fault = f"the scores in {root} do not match the recorded value {trial.value}"
                raise RecordError(f"{fault}: restore them from a backup")

    def forget_workers(self) -> None:
        """Remove the workers of unfinished fits, which belong to an earlier run, from the record."""
        for trial in self.trials():
            for replicate, each in enumerate((trial, self.replicate(trial.number))):
                if each is None or each.outcome is not None:
                    continue
                fits = self.fits(trial.number, replicate)
                workers = {fold: name for fold, name in each.workers.items() if fits[int(fold)].is_finished}
                self.write_evaluation(dataclasses.replace(each, workers=workers))

    def contenders(self, trials: Iterable[TrialRecord]) -> list[TrialRecord]:
        """Return the trials among `trials` that can win, by number.

        A trial can win if it is complete and was trained with exactly the suggested params. (Version 0.1 could split
        the batches of a trial that did not fit in memory.) Among such trials with the same configuration, only the
        earliest can win. Otherwise a configuration with several trials would have the advantage of being represented
        by its best run.
        """
        found: dict[tuple[Any, ...], TrialRecord] = {}
        for trial in sorted(trials, key=lambda trial: trial.number):
            if trial.can_win:
                found.setdefault(self.configuration(trial.params), trial)
        return list(found.values())

    def configuration(self, params: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return a key that is equal for params of the same configuration. Missing params have their defaults."""
        search = self.config.search
        return search.key({name: params.get(name, get_setting(self.config, name)) for name in search})

    def is_default(self, trial: TrialRecord) -> bool:
        """Return whether the trial has the default configuration, like trial 0."""
        return self.configuration(trial.params) == self.configuration({})

    def n_unused(self, trials: Iterable[TrialRecord]) -> int | None:
        """Return the number of configurations that no trial in `trials` uses; None if the space is infinite."""
        n_configurations = self.config.search.n_configurations
        if n_configurations is None:
            return None
        return max(0, n_configurations - len({self.configuration(trial.params) for trial in trials}))

    def n_left(self, trials: Sequence[TrialRecord]) -> int:
        """Return the maximum number of trials still to be evaluated, including trials that have not ended."""
        n_left = max(0, self.config.study.trials - count_trials(trials))
        n_unused = self.n_unused(trials)
        return n_left if n_unused is None else min(n_left, n_unused + sum(each.outcome is None for each in trials))

    def is_searched(self, trials: Sequence[TrialRecord]) -> bool:
        """Return whether the search is over, given all trials of the study. Replicates may still be unfinished."""
        return all(trial.outcome is not None for trial in trials) and self.n_left(trials) == 0

    def valid_shortlist(self, contenders: Sequence[TrialRecord]) -> Shortlist | None:
        """Return the shortlist; None if there is none, or if it was not selected from exactly `contenders`."""
        stored = self.shortlist()
        return stored if stored is not None and stored.of == tuple(each.number for each in contenders) else None

    def standing(self, trials: Iterable[TrialRecord] | None = None) -> Standing:
        """Return the ranking of the trials that can win. If `trials` is given, the trials are not read again.

        Trials with a complete replicate come first, ranked by the mean over both fits. Trials without a replicate
        follow, ranked by their value. Trials whose replicate failed come last. Among equal trials, the earlier one
        comes first.
        """
        contenders = self.contenders(self.trials() if trials is None else trials)
        values = {trial.number: trial.value or 0.0 for trial in contenders}
        shortlist = self.valid_shortlist(contenders)
        seconds = [self.replicate(number) for number in (shortlist.trials if shortlist is not None else ())]
        ended = {second.trial: second.outcome for second in seconds if second is not None and second.outcome}
        if len(ended) < len(seconds):
            ended = {}
        confirmed = tuple(sorted(number for number, outcome in ended.items() if outcome == "complete"))
        values |= {number: self.mean_over_fits(number) for number in confirmed}
        groups = confirmed, values.keys() - ended, ended.keys() - confirmed
        ranking = [number for group in groups for number in rank({each: values[each] for each in group})]
        return Standing(tuple(ranking), values, confirmed)

    def best(self) -> TrialRecord | None:
        """Return the winner of the ranking; None if no trial is complete."""
        winner = self.standing().winner
        return None if winner is None else self.trial(winner)


def has_all_replicates(record: StudyRecord) -> bool:
    """Return whether all replicates have ended, assuming that the search is over."""
    contenders = record.contenders(record.trials())
    if not wants_replicates(record, contenders):
        return True
    shortlist = record.valid_shortlist(contenders)
    if shortlist is None or shortlist.count != record.config.study.confirm:
        return False
    return all((second := record.replicate(number)) and second.outcome for number in shortlist.trials)


def wants_replicates(record: StudyRecord, contenders: Sequence[TrialRecord]) -> bool:
    """Return whether any of these trials should be replicated."""
    study = record.config.study
    return study.folds != "fixed" and study.confirm > 0 and len(contenders) > 1


def no_study(project: ProjectPaths) -> StudyError:
    """Return the error for a project folder without a study."""
    root = project.root.absolute()
    return StudyError(f"there is no study in {root}: start one with `hpsearch study`, or choose a project with --out")


def study_record(project: ProjectPaths, name: str | None) -> StudyRecord:
    """Return the study `name`.

    Without a name, the only study is returned, or the only one that is running. Raises StudyError, listing the
    studies, if the choice is ambiguous.
    """
    if name is not None:
        return StudyRecord.open(project.study(name))
    names = project.study_names()
    if not names:
        raise no_study(project)
    if len(names) > 1:
        running = [each for each in names if lock.is_held(project.study(each))]
        if len(running) != 1:
            listed = ", ".join(f"{each} (running)" if each in running else each for each in names)
            raise StudyError(f"several studies in {project.root}: {listed}; choose one with --study NAME")
        names = running
    return StudyRecord.open(project.study(names[0]))
