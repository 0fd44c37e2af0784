"""Manage the evaluation of a trial or replicate: its open fits, their jobs, and the pruner's decisions."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from hpsearch.config import StudyConfig, stable_seed
from hpsearch.data.prepare import PoolCaches
from hpsearch.paths import FitPaths
from hpsearch.search import pruners
from hpsearch.search.racing import MATTERS, UNLIKELY, TrialScores, leader, probability_of_gain, true_means
from hpsearch.search.scheduler import OpenFits
from hpsearch.store.fits import FitRecord
from hpsearch.store.record import StudyRecord
from hpsearch.store.trials import PruneDecision, ReplicateRecord, TrialRecord
from hpsearch.workers.jobs import CachePaths, Capacity, FitJob
from hpsearch.workers.plan import ExecutionPlan, fits_memory


@dataclass
class Evaluation:
    """A trial or replicate that is being evaluated."""

    study: StudyRecord
    record: TrialRecord | ReplicateRecord
    config: StudyConfig
    running: set[int] = field(default_factory=set)
    """Folds that workers are fitting now."""

    @cached_property
    def finished(self) -> set[int]:
        """Folds whose fit is finished. The coordinator adds to it, so that it need not read the folder again."""
        return {fold for fold, fit in enumerate(self.fits()) if fit.is_finished}

    @property
    def key(self) -> tuple[int, int]:
        """Trial number and replicate number. The replicate number of the trial itself is 0."""
        return self.record.number, int(isinstance(self.record, ReplicateRecord))

    @property
    def name(self) -> str:
        """Name of the trial or replicate, for messages."""
        number, replicate = self.key
        return f"{'the refit of ' if replicate else ''}trial {number}"

    @property
    def pruned(self) -> PruneDecision | None:
        """Decision to prune the trial; None if it was not pruned."""
        return next((each for each in self.record.decisions[-1:] if each.drop), None)

    def decisions_with(self, decision: PruneDecision) -> tuple[PruneDecision, ...]:
        """Return the recorded decisions of the pruner, followed by `decision`.

        After a restart, the pruner may decide on an epoch again. The new decision then replaces the decisions on this
        and later epochs of the same fold.
        """
        fold, epoch = decision.fold, decision.epoch
        before = [each for each in self.record.decisions if each.fold != fold or each.epoch < epoch]
        return (*before, decision)

    def fits(self) -> list[FitRecord]:
        """Return the fits of the trial or replicate, by fold."""
        return self.study.fits(*self.key)

    def fits_memory(self, capacity: Capacity) -> bool:
        """Return whether a worker has enough memory for the fits."""
        return fits_memory(self.config, capacity)

    def open_fits(self, capacity: Capacity | None = None) -> OpenFits:
        """Return the state of the fits for an idle worker, as the scheduler needs it."""
        wanted = frozenset(range(self.study.n_folds))
        if (pruned := self.pruned) is not None:
            # A fit that was pruned after its last epoch must still be finished, even if its worker died.
            wanted = frozenset({pruned.fold} if pruned.epoch == self.config.train.epochs else ())
        fits_worker = capacity is None or self.fits_memory(capacity)
        return OpenFits(*self.key, wanted, frozenset(self.finished), frozenset(self.running), fits_worker)

    @property
    def is_finished(self) -> bool:
        """Whether all fits are done: none is running and none is left to start."""
        fits = self.open_fits()
        return not fits.running and fits.next_fold is None

    def epoch_s(self, job: FitJob, plan: ExecutionPlan) -> float:
        """Return the expected duration of an epoch of a fit in seconds; NaN if unknown."""
        longest_s = max((row.seconds for row in self.fits()[job.fold].epochs()), default=0.0)
        return longest_s or plan.epoch_s(self.config, len(job.train), len(job.held_out))


def fold_job(evaluation: Evaluation, fold: int, caches: PoolCaches) -> FitJob:
    """Return the job that fits one fold of a trial or replicate."""
    record, folds, (number, replicate) = evaluation.record, evaluation.study.folds, evaluation.key
    return FitJob(
        trial=number,
        fold=fold,
        replicate=replicate,
        config=evaluation.config,
        folder=evaluation.fits()[fold].paths.root.absolute(),
        caches=CachePaths(*caches.paths(evaluation.config)),
        train=tuple(folds.train(fold).tolist()),
        held_out=tuple(folds.held_out(fold).tolist()),
        seed=fit_seed(evaluation.study.config, record.place, fold, replicate),
    )


def pool_job(trial: TrialRecord, config: StudyConfig, folder: FitPaths, caches: PoolCaches, *, seed: int) -> FitJob:
    """Return the job that fits a trial's configuration on all images of the pool."""
    return FitJob(
        trial=trial.number,
        fold=0,
        config=config,
        folder=folder.root.absolute(),
        caches=CachePaths(*caches.paths(config)),
        train=tuple(range(len(caches.scored.index))),
        held_out=(),
        seed=seed,
    )


def fit_seed(config: StudyConfig, place: int, fold: int, replicate: int = 0) -> int:
    """Return the seed of a fit, which determines its initial weights, batch order and augmentation.

    `place` is the trial's position among the suggestions.
    """
    return stable_seed(config.study.seed, "second fit" if replicate else "fit", place, fold)


class StudyPruner:
    """The pruner of a study, which reads and caches the scores of the trials for its rule."""

    def __init__(
        self, record: StudyRecord, trials: Mapping[int, TrialRecord], finished: Callable[[int], Collection[int]]
    ) -> None:
        """Create the study's pruner.

        `trials` maps the number of each trial to its record. The caller keeps this mapping up to date. `finished`
        returns the finished folds of an open trial.
        """
        self.rule = pruners.make_pruner(record.config)
        self._record = record
        self._trials = trials
        self._finished = finished
        self._known: dict[int, tuple[int | None, TrialScores | None]] = {}
        """Scores of the trials, and the number of finished folds of those that were open when they were read."""

    @property
    def as_needed(self) -> bool:
        """Whether further folds are fitted in the pruner's order."""
        return self.rule.folds == "as needed"

    def should_prune(self, trial: TrialRecord, fold: int) -> PruneDecision | None:
        """Return the pruner's decision after an epoch of this fold; None if the pruner makes no decision.

        With a lookahead, the latest trials are ignored, because which of them have ended depends on the number of
        workers. For the same reason, no decision is made after the first fold if folds are fitted as needed.
        """
        candidate = self.scores_of(trial)
        # Ignore other folds that are being fitted: their progress depends on timing.
        scores = {each: candidate.scores[each] for each in candidate.finished if each != fold}
        lookahead = self._record.config.study.lookahead
        if lookahead and self.as_needed and scores:
            return None
        candidate = dataclasses.replace(candidate, scores={**scores, fold: candidate.scores[fold]})
        return self._decide(candidate, trial, trial.number - lookahead if lookahead else max(self._trials))

    def losers(self) -> dict[int, PruneDecision]:
        """Return the decisions to prune open trials that can no longer win, by trial number.

        They are based on finished folds, and therefore do not apply to a trial that a worker is fitting.
        """
        known = self.known_scores() if self.as_needed else []
        left = set(self.rule.order(known, self._record.folds)) if known else set()
        checked = [each for each in known if self._trials[each.number].outcome is None and each.number not in left]
        found = {each.number: self._decide(each, self._trials[each.number], max(self._trials)) for each in checked}
        return {number: decision for number, decision in found.items() if decision is not None and decision.drop}

    def _decide(self, candidate: TrialScores, trial: TrialRecord, last: int) -> PruneDecision | None:
        """Let the pruner compare a candidate with the trials up to number `last`.

        A trial is not pruned because of one with the same params.
        """
        others = [
            each
            for each in self.known_scores()
            if each.number <= last and self._trials[each.number].params != trial.params
        ]
        return self.rule.should_prune(candidate, others, self._record.folds)

    def refine_order(self) -> tuple[int, ...]:
        """Return the open trials with a finished fold, in the order in which they should get further folds."""
        known = self.known_scores() if self.as_needed else []
        first = self.rule.order(known, self._record.folds) if known else []
        # A trial is not pruned because of one with the same params, and with a lookahead it is pruned later.
        rest = {each.number: None for each in known if self._trials[each.number].outcome is None}
        return tuple(dict.fromkeys([*first, *rest]))

    def leader(self) -> tuple[int, float] | None:
        """Return the number of the leading trial and its expected value; None if folds are not fitted as needed."""
        known = self.known_scores() if self.as_needed else []
        return leader(known, self._record.folds) if known else None

    def true_means(self, last: int) -> dict[int, float]:
        """Return the estimated mean scores of the trials up to number `last` that have finished a fold."""
        known = [each for each in self.known_scores() if each.number <= last]
        return true_means(known, self._record.folds) if self.as_needed else {}

    def n_left(self, n_open: int) -> int:
        """Return the maximum number of trials still to be evaluated, including the `n_open` open trials.

        No further trials are counted if they are unlikely to improve the score by `study.until_gain`.
        """
        n_left = self._record.n_left(list(self._trials.values()))
        if not self._record.config.study.until_gain or n_left <= n_open:
            return n_left
        return n_open if self.probability_of_gain(n_left - n_open) < UNLIKELY else n_left

    def probability_of_gain(self, n_new: int) -> float:
        """Return the probability that `n_new` further trials improve the best score by `study.until_gain`.

        If this setting is 0, the gain is `racing.MATTERS`. With a lookahead, only the first folds of trials up to the
        last one that the sampler sees are used: the result must not depend on the number of workers.
        """
        study, known = self._record.config.study, self.known_scores()
        if study.lookahead:
            last = max(self._trials, default=0) + 1 - study.lookahead
            known = [_first_fold(each) for each in known if each.number <= last]
        # A new study may have no folds yet.
        return probability_of_gain(known, self._record.folds, study.until_gain or MATTERS, n_new) if known else 1.0

    def scores_of(self, trial: TrialRecord) -> TrialScores:
        """Return a trial's per-image scores after every epoch so far, for each fold that has finished an epoch."""
        found = enumerate(fit.scores() for fit in self._record.fits(trial.number))
        train = trial.study_config.train
        scores = {fold: scores for fold, scores in found if len(scores)}
        return TrialScores(trial.number, scores, train.epochs, train.schedule, is_pruned=trial.outcome == "pruned")

    def known_scores(self) -> list[TrialScores]:
        """Return the scores of the complete trials that can win and of the pruned trials, by trial number.

        If folds are fitted as needed, the finished folds of open trials are included. Repeated calls return the same
        objects for unchanged trials, because pruners use them as cache keys.
        """
        for number, trial in self._trials.items():
            n_finished = len(self._finished(number)) if trial.outcome is None else None
            if number not in self._known or self._known[number][0] != n_finished:
                self._known[number] = n_finished, self._read_known(trial)
        found = (self._known[number][1] for number in sorted(self._trials))
        return [scores for scores in found if scores is not None]

    def _read_known(self, trial: TrialRecord) -> TrialScores | None:
        if trial.can_win or trial.outcome == "pruned":
            return self.scores_of(trial)
        finished = sorted(self._finished(trial.number)) if trial.outcome is None and self.as_needed else []
        if not finished:
            return None
        known = self.scores_of(trial)
        return dataclasses.replace(known, scores={fold: known.scores[fold] for fold in finished})


def _first_fold(trial: TrialScores) -> TrialScores:
    """Return the scores of a trial's first fold only. If it has no finished fold, it counts as pruned."""
    scores = dict(list(trial.scores.items())[:1])
    return dataclasses.replace(trial, scores=scores, is_pruned=not trial.finished)
