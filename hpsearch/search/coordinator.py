"""The coordinator: execute the actions of the scheduler and keep the record.

It imports no torch. Everything is written to the study folder before it takes effect, so a process that dies between
any two instructions leaves a study that continues as if it had not.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

from hpsearch.data.pool_caches import PoolCaches
from hpsearch.errors import WorkerError
from hpsearch.search import failures, replicates
from hpsearch.search.callbacks import StudyCallback
from hpsearch.search.constant_predictions import ConstantWarnings
from hpsearch.search.evaluation import Evaluation, study_state
from hpsearch.search.fit_jobs import fold_job
from hpsearch.search.judging import Judge
from hpsearch.search.ledger import Ledger
from hpsearch.search.new_trials import next_trial, used_up
from hpsearch.search.racing import PruneDecision
from hpsearch.search.scheduler import Fit, MakeShortlist, Suggest, next_action
from hpsearch.search.stopping import Budget, Stop
from hpsearch.store.fits import remove_checkpoints
from hpsearch.store.record import StudyRecord
from hpsearch.store.trials import COUNTED, Outcome, TrialRecord
from hpsearch.training.rows import EpochRow
from hpsearch.workers.jobs import EpochEnded, Failed, Finished, FitJob, FitScore, Job, Stopped
from hpsearch.workers.plan import ExecutionPlan
from hpsearch.workers.pool import Event, WorkerPool

logger = logging.getLogger(__name__)


class Coordinator:
    """One start of a study, as the work of the event loop (`workers.loop`)."""

    def __init__(
        self,
        record: StudyRecord,
        pool: WorkerPool,
        plan: ExecutionPlan,
        caches: PoolCaches,
        callback: StudyCallback,
        stop: Stop,
        budget: Budget,
        wake_views: Callable[[], None],
    ) -> None:
        """`wake_views` has Optuna's database and MLflow brought up to date, in the background."""
        self._record = record
        self._pool = pool
        self._plan = plan
        self._caches = caches
        self._callback = callback
        self._stop = stop
        self._budget = budget
        self._wake_views = wake_views
        self._ledger = Ledger(record, callback, wake_views)
        self._judge = Judge(record, self._ledger.trials)
        self._open: dict[tuple[int, int], Evaluation] = {}
        """(trial, replicate) to what is being evaluated: trials by number, then replicates as listed."""
        self._has_shortlist = False
        self._constant = ConstantWarnings(record, callback.message)

    @property
    def n_counted(self) -> int:
        """Trials that were evaluated, over all starts."""
        return self._ledger.n_counted

    @property
    def is_over(self) -> bool:
        """Whether no further job will come: the study is done, or was asked to stop."""
        return self._stop.is_requested or (self._has_shortlist and not self._open)

    def resume(self) -> None:
        """Continue the trials that an earlier start left open, and remove files that it did not get to remove."""
        for trial in list(self._ledger.trials.values()):
            if trial.outcome is None:
                self._resume(trial)
            else:
                self._ledger.remove_networks(trial.number)
            for fold in self._record.finished_folds(trial.number):
                remove_checkpoints(self._record.fit(trial.number, fold).paths)

    def poll(self) -> bool:
        """Look at requests, the budget and hanging fits; return False if the study must end at once."""
        self._budget.poll()
        if self._stop.poll(self._record.paths):
            logger.info("stop was requested")
            self._callback.message("stop was requested from outside")
        for evaluation in [each for each in self._open.values() if each.replicate is None]:
            request = self._record.paths.trial_stop_request(evaluation.trial.number)
            if request.exists():
                self._stop_trial(evaluation)
                request.unlink(missing_ok=True)
        failures.kill_hanging(self._pool, self._expected_epoch_s)
        return not self._stop.is_urgent

    def next_job(self) -> Job | None:
        """Carry out what the scheduler says until that is a fit; None if nothing can begin now."""
        while not self._stop.is_requested:
            trials, pruner = self._ledger.trials, self._judge.pruner
            state = study_state(self._record, trials, self._open.values(), pruner, self._has_shortlist)
            match next_action(state):
                case Fit(number, fold, replicate):
                    evaluation = self._open[number, replicate]
                    evaluation.running.add(fold)
                    return fold_job(evaluation, fold, self._caches)
                case Suggest():
                    self._begin_trial()
                case MakeShortlist():
                    self._end_search()
                case _:
                    break
        return None

    def on_event(self, event: Event) -> None:
        """Handle a worker's report about a fit."""
        job = event.job
        evaluation = self._open.get((job.trial, job.replicate)) if isinstance(job, FitJob) else None
        if evaluation is None or not isinstance(job, FitJob):
            # A worker that was killed together with its trial.
            return
        if isinstance(event.report, EpochEnded):
            self._pool.reply(event.worker, go=self._on_epoch(evaluation, job.fold, event.report.row))
            return
        evaluation.running.discard(job.fold)
        match event.report:
            case Finished(FitScore(value)):
                self._on_finished(evaluation, job.fold, value)
            case Stopped():
                self._end_if_finished(evaluation)
            case Failed(reason="diverged", text=text):
                self._end(evaluation, "diverged", reason=f"{text} of fold {job.fold + 1}", constraint=1.0)
            case Failed(reason="out_of_memory", text=text):
                self._end(evaluation, "infeasible", reason=text, constraint=1.0)
            case Failed():
                self._on_death(evaluation, job.fold, event.report)

    def _begin_trial(self) -> None:
        """Record the next enqueued or suggested trial, and open it if it is feasible."""
        trial, config, infeasible = next_trial(self._record, self._ledger.trials, self._plan)
        self._ledger.write(trial)
        evaluation = Evaluation(self._record, trial, config)
        if infeasible is not None:
            self._end(evaluation, "infeasible", reason=infeasible.reason, constraint=infeasible.excess)
            return
        logger.info("trial %d began: %s", trial.number, trial.params)
        self._callback.trial_began(trial)
        self._open[evaluation.key] = evaluation

    def _resume(self, trial: TrialRecord) -> None:
        evaluation = Evaluation(self._record, trial, trial.study_config)
        self._open[evaluation.key] = evaluation
        logger.info("trial %d continues", trial.number)
        self._callback.trial_began(trial)
        if trial.decisions and trial.decisions[-1]["drop"]:
            evaluation.pruned = PruneDecision(**trial.decisions[-1])
        self._end_if_finished(evaluation)

    def _end_search(self) -> None:
        """Choose the trials to replicate, and open their replicates."""
        if text := used_up(self._record, self._ledger.trials):
            logger.info("%s", text)
            self._callback.message(text)
        self._has_shortlist = True
        for second in replicates.open_replicates(self._record):
            trial = self._ledger.trials[second.trial]
            evaluation = Evaluation(self._record, trial, trial.study_config, second)
            self._open[evaluation.key] = evaluation
            self._ledger.write_replicate(second)
            self._end_if_finished(evaluation)
        if self._open:
            self._callback.replicating(*replicates.progress(self._record))
        else:
            replicates.remove_unneeded_networks(self._record)

    def _on_epoch(self, evaluation: Evaluation, fold: int, row: EpochRow) -> bool:
        """Record what follows from an epoch, and return whether the fit goes on."""
        number, metric = evaluation.trial.number, self._record.config.study.metric
        score = getattr(row.scores, metric)
        text = "%s fold %d epoch %d: loss %.4f, %s %.4f"
        logger.info(text, evaluation.name, fold, row.epoch, row.train.loss, metric, score)
        self._callback.epoch_ended(number, fold, row)
        self._wake_views()
        if evaluation.replicate is None and evaluation.pruned is None:
            decision = self._judge.judge(evaluation.trial, fold)
            if decision is not None:
                self._record_decision(evaluation, decision)
        return evaluation.pruned is None and not self._stop.is_requested

    def _on_finished(self, evaluation: Evaluation, fold: int, value: float | None) -> None:
        number, score = evaluation.trial.number, value if value is not None else float("nan")
        metric = self._record.config.study.metric
        logger.info("%s fold %d finished: %s %.4f", evaluation.name, fold, metric, score)
        self._callback.fold_ended(number, fold, score)
        self._constant.check(number)
        self._wake_views()
        self._end_if_finished(evaluation)
        if evaluation.replicate is not None:
            self._callback.replicating(*replicates.progress(self._record))

    def _on_death(self, evaluation: Evaluation, fold: int, failure: Failed) -> None:
        """Try the fit again from its checkpoint, unless this fold has ended its worker too often."""
        what, fit = f"{evaluation.name}, fold {fold + 1}", evaluation.fit(fold)
        found, reason = failures.count_death(fit, fold, evaluation.failures, failure, what)
        self._callback.message(f"{what}: worker {failure.text}")
        evaluation.set_failures(found)
        self._ledger.write_evaluation(evaluation)
        if fit.is_finished or evaluation.pruned is not None:
            self._end_if_finished(evaluation)
        elif reason:
            self._end(evaluation, "failed", reason=reason)
            ended = [trial for trial in self._ledger.trials.values() if trial.outcome in COUNTED]
            if len(ended) >= 3 and all(trial.outcome == "failed" for trial in ended):
                raise WorkerError(f"every trial so far failed; {reason}")

    def _end_if_finished(self, evaluation: Evaluation) -> None:
        """End a trial or replicate if nothing of it is left to do."""
        if not evaluation.is_finished:
            return
        if evaluation.pruned is not None:
            self._end(evaluation, "pruned", value=evaluation.pruned.estimate, reason=evaluation.pruned.reason)
            return
        micro_batch = evaluation.micro_batch()
        if evaluation.replicate is None:
            evaluation.trial = dataclasses.replace(evaluation.trial, micro_batch=micro_batch)
            self._end(evaluation, "complete", value=self._record.value(evaluation.trial.number))
        elif micro_batch is None:
            self._end(evaluation, "complete")
        else:
            # Another configuration was fitted.
            self._end(evaluation, "infeasible", reason="memory forced parts of batches, which changed the result")

    def _record_decision(self, evaluation: Evaluation, decision: PruneDecision) -> None:
        """Record a pruner's decision before anything follows from it."""
        evaluation.add_decision(decision)
        self._ledger.write(evaluation.trial)

    def _end(
        self,
        evaluation: Evaluation,
        outcome: Outcome,
        *,
        value: float | None = None,
        reason: str = "",
        constraint: float = 0.0,
    ) -> None:
        """Record how a trial or replicate ended, stop its workers, and remove the files that it no longer needs."""
        self._open.pop(evaluation.key, None)
        if evaluation.replicate is None:
            end = self._ledger.end_trial
            end(evaluation.trial, outcome, value=value, reason=reason, constraint=constraint)
        else:
            assert outcome != "pruned"
            assert outcome != "orphaned"
            self._ledger.end_replicate(evaluation.replicate, outcome, reason)
            if not self._open:
                replicates.remove_unneeded_networks(self._record)
        for worker in self._pool.busy():
            if isinstance(worker.job, FitJob) and (worker.job.trial, worker.job.replicate) == evaluation.key:
                self._pool.kill(worker)

    def _stop_trial(self, evaluation: Evaluation) -> None:
        """End a trial on a user's request as if it were pruned, with the score that it is estimated to reach."""
        number, reason = evaluation.trial.number, "stopped on request"
        logger.info("trial %d is to stop", number)
        self._callback.message(f"trial {number} is stopped on request")
        decision = self._judge.decision_on_request(evaluation.trial, reason)
        if decision is None:
            self._end(evaluation, "failed", reason=f"{reason} before its first epoch")
        elif evaluation.pruned is None:
            self._record_decision(evaluation, decision)
            self._end_if_finished(evaluation)

    def _expected_epoch_s(self, job: FitJob) -> float | None:
        """Return the seconds that an epoch of a fit should take; None if its trial has ended."""
        evaluation = self._open.get((job.trial, job.replicate))
        if evaluation is None:
            return None
        longest_s = evaluation.longest_epoch_s(job.fold)
        return longest_s or self._plan.epoch_s(evaluation.config, len(job.train), len(job.held_out))
