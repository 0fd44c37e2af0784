"""Run a study: execute the scheduler's actions and record the results.

This module does not import torch. Every change is written to the study folder before it takes effect. A study whose
process dies at any point therefore continues as if it had not been interrupted.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hpsearch.data.prepare import PoolCaches
from hpsearch.errors import StorageError, WorkerError
from hpsearch.paths import remove_stale_temporaries
from hpsearch.search import replicates
from hpsearch.search.callbacks import StudyCallback
from hpsearch.search.constant_predictions import constant_warnings
from hpsearch.search.evaluation import Evaluation, StudyPruner, fold_job
from hpsearch.search.new_trials import end_early, next_trial
from hpsearch.search.racing import decide
from hpsearch.search.scheduler import Fit, MakeShortlist, StudyState, Suggest, next_action
from hpsearch.search.stopping import Stop
from hpsearch.store.fits import remove_checkpoints
from hpsearch.store.record import StudyRecord
from hpsearch.store.trials import COUNTED, Outcome, TrialRecord
from hpsearch.store.versions import now
from hpsearch.training.rows import EpochRow
from hpsearch.typed_json import to_json
from hpsearch.workers.jobs import EpochEnded, Failed, Finished, FitJob, Job, Stopped
from hpsearch.workers.loop import DEATHS_PER_JOB
from hpsearch.workers.plan import ExecutionPlan, why_infeasible
from hpsearch.workers.pool import Event, Worker, WorkerPool

logger = logging.getLogger(__name__)

SILENCE_FACTOR = 10.0
SILENCE_MIN_S = 300.0
"""Limits for a hanging fit. A worker is killed if it has finished no epoch for longer than both `SILENCE_FACTOR`
times the expected duration of an epoch and `SILENCE_MIN_S` seconds."""


@dataclass(eq=False)
class Coordinator:
    """Coordinator of one run of a study. The event loop (`workers.loop`) calls its methods.

    It gives jobs to the workers and records their results.
    """

    record: StudyRecord
    pool: WorkerPool
    plan: ExecutionPlan
    caches: PoolCaches
    callback: StudyCallback
    stop: Stop
    wake_views: Callable[[], None]
    """Function that wakes the background threads that update Optuna's database and MLflow."""
    open: dict[tuple[int, int], Evaluation] = field(default_factory=dict)
    """Evaluations that have not ended, by trial number and replicate number: first the trials by number, then the
    replicates in shortlist order."""
    has_shortlist: bool = False
    """Whether the search has ended and the trials to replicate are selected."""
    leader: tuple[int, float] | None = None
    """Number and expected value of the leading trial."""
    warned: set[int] = field(default_factory=set)
    """Numbers of the trials for which a warning about constant predictions was shown."""

    def __post_init__(self) -> None:
        self.trials = {trial.number: trial for trial in self.record.trials()}
        self.pruner = StudyPruner(self.record, self.trials, lambda number: self.open[number, 0].finished)

    @property
    def is_over(self) -> bool:
        """Whether there are no further jobs, because the study is finished or was asked to stop."""
        return self.stop.is_requested or (self.has_shortlist and not self.open)

    def resume(self) -> None:
        """Continue the trials that an earlier run left open, and remove networks that are no longer needed."""
        for trial in list(self.trials.values()):
            if trial.outcome is None:
                self._open(Evaluation(self.record, trial, trial.study_config), "continues")
            else:
                replicates.remove_networks_of_losers(self.record, self.trials, trial.number)
            for fit in self.record.fits(trial.number):
                if fit.is_finished:
                    remove_checkpoints(fit.paths)
        _prune_waiting(self)

    def poll(self) -> bool:
        """Check for stop requests, the time limit and hanging fits. Return False if the study must end at once."""
        if text := self.stop.poll(self.record.paths):
            self._say(text)
        # One listing, instead of a look for the request of each open trial.
        requests = set(self.record.paths.root.glob("stop-trial-*"))
        for opened in list(self.open.values()) if requests else ():
            request = self.record.paths.trial_stop_request(opened.record.number)
            if isinstance(opened.record, TrialRecord) and request in requests:
                _stop_trial(self, opened)
                request.unlink(missing_ok=True)
        _kill_hanging(self)
        _follow_cluster(self)
        return not self.stop.is_urgent

    def next_job(self, worker: Worker) -> Job | None:
        """Execute the scheduler's actions until one is a fit. Return its job, or None if nothing can start now."""
        while not self.stop.is_requested:
            match next_action(_study_state(self, worker)):
                case Fit(number, fold, replicate):
                    evaluation = self.open[number, replicate]
                    evaluation.running.add(fold)
                    self._write(evaluation, workers={**evaluation.record.workers, str(fold): worker.name})
                    return fold_job(evaluation, fold, self.caches)
                case Suggest():
                    self._begin_trial()
                case MakeShortlist():
                    self._end_search()
                case None:
                    break
        return None

    def on_event(self, event: Event) -> None:
        """Handle a worker's report about a fit."""
        job, report = event.job, event.report
        if job is None and isinstance(report, Failed):
            text = f"{event.worker.name} ended before it had a job ({report.text}): it is replaced"
            self._say(f"worker {report.text}" if event.worker.machine else text)
        if not isinstance(job, FitJob) or (evaluation := self.open.get((job.trial, job.replicate))) is None:
            # The trial has ended, and its workers were killed. Their last reports are ignored.
            return
        if isinstance(report, EpochEnded):
            self.pool.reply(event.worker, go=self._on_epoch(evaluation, job.fold, report.row))
            return
        evaluation.running.discard(job.fold)
        if isinstance(report, Finished) or evaluation.fits()[job.fold].is_finished:
            evaluation.finished.add(job.fold)
        match report:
            case Finished(value):
                self._on_finished(evaluation, job.fold, math.nan if value is None else value)
            case Stopped():
                self._end_if_finished(evaluation)
            case Failed(error="DivergedError", text=text):
                self._end(evaluation, "diverged", reason=f"{text} of fold {job.fold + 1}", constraint=1.0)
            case Failed(error="OutOfMemoryError", text=text):
                self._end(evaluation, "infeasible", reason=text, constraint=1.0)
            case Failed():
                self._on_death(evaluation, job, report)
        _prune_waiting(self)
        if (leader := self.pruner.leader()) not in (None, self.leader):
            self.leader = leader
            self.callback.leader_changed(*leader)

    def _begin_trial(self) -> None:
        """Record the next enqueued or suggested trial, and start it if it is feasible."""
        last = max(self.trials, default=-1) + 1 - self.record.config.study.lookahead
        trial, infeasible = next_trial(self.record, self.trials, self.plan, self.pruner.true_means(last))
        evaluation = Evaluation(self.record, trial, trial.study_config)
        self._write(evaluation)
        if infeasible is not None:
            self._end(evaluation, "infeasible", reason=infeasible.reason, constraint=infeasible.excess)
        else:
            self._open(evaluation, "began")

    def _open(self, evaluation: Evaluation, verb: str) -> None:
        self.open[evaluation.key] = evaluation
        if isinstance(trial := evaluation.record, TrialRecord):
            logger.info("trial %d %s: %s", trial.number, verb, trial.params)
            self.callback.trial_began(trial)
        self._end_if_finished(evaluation)

    def _end_search(self) -> None:
        """Select the trials to replicate, and start their replicates."""
        if text := end_early(self.record, self.trials):
            self._say(text)
        self.has_shortlist = True
        for second in replicates.open_replicates(self.record):
            evaluation = Evaluation(self.record, second, self.trials[second.trial].study_config)
            self._write(evaluation)
            self._open(evaluation, "")
        if self.open:
            self.callback.replicating(*replicates.progress(self.record))
        else:
            replicates.remove_unneeded_networks(self.record)

    def _on_epoch(self, evaluation: Evaluation, fold: int, row: EpochRow) -> bool:
        """Report an epoch, record the pruner's decision, and return whether the fit should continue."""
        metric = self.record.config.study.metric
        text = "%s, fold %d, epoch %d: loss %.4f, %s %.4f"
        score = getattr(row.scores, metric)
        logger.info(text, evaluation.name, fold + 1, row.epoch, row.train.loss, metric, score)
        self.callback.epoch_ended(evaluation.record.number, fold, row)
        self.wake_views()
        if isinstance(evaluation.record, TrialRecord) and evaluation.pruned is None:
            decision = self.pruner.should_prune(evaluation.record, fold)
            if decision is not None:
                self._write(evaluation, decisions=evaluation.decisions_with(decision))
        return evaluation.pruned is None and not self.stop.is_requested

    def _on_finished(self, evaluation: Evaluation, fold: int, score: float) -> None:
        (number, replicate), metric = evaluation.key, self.record.config.study.metric
        logger.info("%s, fold %d finished: %s %.4f", evaluation.name, fold + 1, metric, score)
        self.callback.fold_ended(number, fold, score)
        for line in constant_warnings(self.record, [number]) if number not in self.warned else ():
            self.warned.add(number)
            self._say(f"warning: {line}")
        self.wake_views()
        self._end_if_finished(evaluation)
        if replicate:
            self.callback.replicating(*replicates.progress(self.record))

    def _on_death(self, evaluation: Evaluation, job: FitJob, failure: Failed) -> None:
        """Retry the fit from its checkpoint, unless too many workers died in this fold after the same epoch.

        Raises StorageError or WorkerError if a retry would fail in the same way, and WorkerError if every trial so
        far has failed.
        """
        what, fold, fit = job.name, job.fold, evaluation.fits()[job.fold]
        if failure.error == "StorageError":
            raise StorageError(failure.text)
        if failure.error not in ("", "died"):
            raise WorkerError(f"{what}: {failure.text}")
        logger.warning("%s", f"{what}: worker {failure.text}\n{failure.traceback}".rstrip())
        remove_stale_temporaries(fit.paths.root)
        # Only deaths after the same epoch are counted together. If epochs finish between two deaths, the cause is the
        # machine and not the configuration.
        place = f"after epoch {len(fit.epochs())}: "
        failures = evaluation.record.failures
        deaths = [*failures.get(str(fold), []), place + failure.text]
        workers = {each: name for each, name in evaluation.record.workers.items() if each != str(fold)}
        self._write(evaluation, failures={**failures, str(fold): deaths}, workers=workers)
        if fit.is_finished or evaluation.pruned is not None:
            self._end_if_finished(evaluation)
        elif sum(each.startswith(place) for each in deaths) >= DEATHS_PER_JOB:
            reason = f"{DEATHS_PER_JOB} workers died in fold {fold + 1} {place}{failure.text}"
            self._end(evaluation, "failed", reason=reason)
            ended = [trial for trial in self.trials.values() if trial.outcome in COUNTED]
            if len(ended) >= 3 and all(trial.outcome == "failed" for trial in ended):
                raise WorkerError(f"every trial so far failed; {reason}")
        else:
            self.callback.message(f"{what}: worker {failure.text}; the fit continues on the next free worker")

    def _end_if_finished(self, evaluation: Evaluation) -> None:
        """End a trial or replicate if it has no fits left to do."""
        if not evaluation.is_finished:
            return
        if (pruned := evaluation.pruned) is not None:
            self._end(evaluation, "pruned", value=pruned.estimate, reason=pruned.reason)
        elif isinstance(evaluation.record, TrialRecord):
            self._end(evaluation, "complete", value=self.record.value(evaluation.record.number))
        else:
            self._end(evaluation, "complete")

    def _end(self, evaluation: Evaluation, outcome: Outcome, *, reason: str = "", **of_trial: Any) -> None:
        """Record how a trial or replicate ended, stop its workers, and remove the files that it no longer needs.

        `of_trial` contains new values of fields that only the record of a trial has, such as `value`.
        """
        self.open.pop(evaluation.key, None)
        number, replicate = evaluation.key
        self._write(evaluation, outcome=outcome, reason=reason, ended_at=now(), **({} if replicate else of_trial))
        if isinstance(trial := evaluation.record, TrialRecord):
            result = reason if trial.value is None else f"{trial.value:.4f}"
            logger.info("trial %d ended: %s, %s", number, outcome, result)
            replicates.remove_networks_of_losers(self.record, self.trials, number)
            self.callback.trial_ended(trial)
        else:
            text = f"{outcome} ({reason}), so it cannot win"
            if outcome == "complete":
                score = float(np.nanmean(self.record.out_of_fold(number, replicate=1)))
                text = f"{score:.4f}, first fit {self.trials[number].value:.4f}"
            self._say(f"trial {number} refitted: {text}")
            if not self.open:
                replicates.remove_unneeded_networks(self.record)
        for worker in self.pool.busy():
            if isinstance(worker.job, FitJob) and (worker.job.trial, worker.job.replicate) == evaluation.key:
                worker.kill()

    def _write(self, evaluation: Evaluation, **changes: Any) -> None:
        """Change fields in the record of a trial or replicate, and write the record to the study folder."""
        evaluation.record = dataclasses.replace(evaluation.record, **changes)
        self.record.write_evaluation(evaluation.record)
        if isinstance(evaluation.record, TrialRecord):
            self.trials[evaluation.record.number] = evaluation.record
        self.wake_views()

    def _say(self, text: str) -> None:
        logger.info("%s", text)
        self.callback.message(text)


def _kill_hanging(coordinator: Coordinator) -> None:
    """Kill every worker whose fit has not finished an epoch for too long."""
    for worker in coordinator.pool.busy():
        silence_s, job = time.monotonic() - worker.last_report_at, worker.job
        if not isinstance(job, FitJob) or (evaluation := coordinator.open.get((job.trial, job.replicate))) is None:
            continue
        if silence_s > SILENCE_MIN_S and silence_s > SILENCE_FACTOR * evaluation.epoch_s(job, coordinator.plan):
            logger.warning("%s: no epoch for %.0f s", job.name, silence_s)
            worker.kill()


def _stop_trial(coordinator: Coordinator, evaluation: Evaluation) -> None:
    """End a trial at the user's request as if it had been pruned, with its estimated score."""
    reason = "stopped on request"
    trial = coordinator.trials[evaluation.record.number]
    coordinator._say(f"trial {trial.number} is {reason}")
    candidate = coordinator.pruner.scores_of(trial)
    if not candidate.scores:
        coordinator._end(evaluation, "failed", reason=f"{reason} before its first epoch")
    elif evaluation.pruned is None:
        others = [each for each in coordinator.pruner.known_scores() if each.number != trial.number]
        decision = decide(True, candidate, others, coordinator.record.folds, reason)
        coordinator._write(evaluation, decisions=evaluation.decisions_with(decision))
        coordinator._end_if_finished(evaluation)


def _prune_waiting(coordinator: Coordinator) -> None:
    """Prune the open trials that can no longer win, if folds are fitted as needed: a trial or a fit may have ended.

    With a lookahead, the result must not depend on the number of workers. Trials are then pruned only after all of
    them have finished a first fold, and while none gets further folds.
    """
    opened, pruner, study = list(coordinator.open.values()), coordinator.pruner, coordinator.record.config.study
    is_settled = all(not each.running and len(each.finished) == 1 for each in opened)
    if study.lookahead and (pruner.n_left(len(opened)) > len(opened) or not is_settled):
        return
    waiting = {each.record.number for each in opened if not each.running and not each.pruned}
    # When a trial is pruned, the estimates of the others change.
    while losers := {number: each for number, each in pruner.losers().items() if number in waiting}:
        for number, decision in losers.items():
            evaluation = coordinator.open[number, 0]
            coordinator._write(evaluation, decisions=evaluation.decisions_with(decision))
            coordinator._end_if_finished(evaluation)
        waiting -= losers.keys()


def _follow_cluster(coordinator: Coordinator) -> None:
    """Store changes of the cluster in the plan, and end the trials that need a larger worker than there is.

    Raises WorkerError if only refits are left, and all of them need a larger worker.
    """
    cluster = tuple(coordinator.pool.machines.values())
    if cluster != coordinator.plan.cluster:
        coordinator.plan = coordinator.plan.with_cluster(cluster)
        coordinator.record.write_plan(to_json(coordinator.plan))
        coordinator.callback.replanned(coordinator.plan)
    capacities = {worker.capacity for worker in cluster}
    idle = [each for each in coordinator.open.values() if cluster and not each.running]
    too_large = [each for each in idle if not any(map(each.fits_memory, capacities))]
    is_stuck = len(too_large) == len(coordinator.open)
    for evaluation in too_large:
        why = why_infeasible(evaluation.config, coordinator.plan)
        assert why is not None
        if isinstance(evaluation.record, TrialRecord):
            coordinator._end(evaluation, "infeasible", reason=why.reason, constraint=why.excess)
        elif is_stuck:
            # A refit that is not trained must not cost its trial the first place.
            advice = "start a larger worker, then run the same command again to continue"
            raise WorkerError(f"{evaluation.name} {why.reason}: {advice}")


def _study_state(coordinator: Coordinator, worker: Worker) -> StudyState:
    """Return the state of the study that the scheduler needs to choose the next job of an idle worker."""
    record, trials, pruner = coordinator.record, list(coordinator.trials.values()), coordinator.pruner
    capacities = {each.capacity for each in coordinator.plan.cluster}
    # Equal workers can train all open trials.
    unlike, capacity = (capacities, worker.capacity) if len(capacities) > 1 else ((), None)
    n_fitting = {key: sum(map(each.fits_memory, unlike)) for key, each in coordinator.open.items()}
    open_fits = [coordinator.open[key].open_fits(capacity) for key in sorted(n_fitting, key=n_fitting.__getitem__)]
    known = pruner.known_scores() if pruner.as_needed else []
    refine = () if coordinator.has_shortlist else pruner.refine_order()
    # Before the time limit, the leader is completed instead of beginning further trials.
    left_s = coordinator.stop.left_s
    is_late = bool(refine) and left_s < math.inf and left_s < _completion_s(coordinator, refine[0])
    return StudyState(
        n_left=len(open_fits) if is_late else pruner.n_left(len(open_fits)),
        n_suggested=len(trials),
        open=tuple(open_fits),
        has_shortlist=coordinator.has_shortlist,
        lookahead=record.config.study.lookahead,
        folds=pruner.rule.folds,
        refine=refine,
        n_screened=sum(bool(each.finished) for each in known),
        n_further=sum(len(each.finished) - 1 for each in known if each.finished and each.number > 0)
        + sum(len(fits.running) for fits in open_fits if fits.finished and fits.trial > 0),
    )


def _completion_s(coordinator: Coordinator, number: int) -> float:
    """Return the seconds that the missing folds of a trial will probably take, with a margin of 50 %."""
    fits = coordinator.open[number, 0].fits()
    fit_s = max(sum(row.seconds for row in fit.epochs()) for fit in fits)
    return 1.5 * fit_s * math.ceil(sum(not fit.is_finished for fit in fits) / max(1, len(coordinator.pool)))
