"""The coordinator: owns a study, hands out fold fits, hears epochs, decides, and keeps every record in step.

It imports no torch. What it decides is written to the study folder first, then told to Optuna, then to MLflow; so a
process that dies between any two instructions leaves a study that goes on as if it had not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpsearch import paths
from hpsearch.config import StudyConfig, stable_seed
from hpsearch.data import duplicates
from hpsearch.data import folds as fold_making
from hpsearch.data.cache import open_cache
from hpsearch.data.folds import Folds
from hpsearch.data.pool_caches import PoolCaches
from hpsearch.data.prepare import Prepared, count_pool
from hpsearch.errors import (
    CacheError,
    ConfigError,
    StoppedError,
    StorageError,
    StudyChangedError,
    StudyError,
    WorkerError,
)
from hpsearch.paths import ProjectPaths, StudyPaths
from hpsearch.search import enqueue, pruners
from hpsearch.search import replicates as confirmation
from hpsearch.search.autotune import MachineChoice, first_workers, make_plan
from hpsearch.search.callbacks import Listener, Silent
from hpsearch.search.constant_predictions import ConstantWarnings
from hpsearch.search.optuna_view import StudyDatabase
from hpsearch.search.pruners import Pruner
from hpsearch.search.racing import TrialScores, Verdict, verdict_on_request
from hpsearch.stats.best import rank
from hpsearch.store import lock
from hpsearch.store.record import COUNTED, Outcome, StudyRecord, TrialRecord, code_version, now
from hpsearch.tracking import Tracker, TrackingThread
from hpsearch.workers import jobs as fits
from hpsearch.workers import plan as plans
from hpsearch.workers.local_pool import POLL_S, Event, Worker, Workers
from hpsearch.workers.plan import ExecutionPlan

logger = logging.getLogger(__name__)

INFEASIBLE_PER_TRIAL = 10
"""Infeasible suggestions that are free, for each trial asked for."""
SPARE_BYTES = 16 * 2**20
"""Room for scores, figures and databases of a study."""
LAST_DELIVERY_S = 180.0
URGENT_DELIVERY_S = 5.0
"""How long the end of a study waits for the next trial to reach MLflow, and where it must end at once."""
GRACE_S = 12.0
"""How long a budget waits for the epoch to end before it stops the workers at once."""


class Stop:
    """Asks a running study to end: once after the current epochs, twice at once."""

    def __init__(self) -> None:
        self.requests = 0
        self.signal = 0
        """Number of the signal that asked, 0 if none did."""
        self.epoch_left_s: Callable[[], float | None] = lambda: None
        """Seconds until the epochs being trained end; NaN if not known, None if none is trained."""

    def request(self, signal_number: int = 0, *, at_once: bool = False) -> None:
        """May be called from a signal handler or another thread."""
        self.requests += 2 if at_once else 1
        self.signal = self.signal or signal_number

    def heed(self, study: StudyPaths) -> None:
        """Read and remove the request that `hpsearch stop` leaves in the study's folder, if there is one."""
        if study.stop_request.exists():
            self.request(at_once=study.stop_request.read_text().strip() == "now")
            study.stop_request.unlink(missing_ok=True)

    @property
    def is_requested(self) -> bool:
        return self.requests > 0

    @property
    def is_urgent(self) -> bool:
        return self.requests > 1


@dataclass(frozen=True)
class StudySummary:
    """How a call of `run_study` ended."""

    record: StudyRecord
    """The study's folder: trials, scores, folds."""
    n_counted: int
    """Trials that count toward `study.trials`, over all starts."""
    stopped: bool
    """Whether it was asked to stop before it was done."""
    undelivered: int
    """Number of MLflow runs that lack something; it is on record."""
    tracking_error: str = ""
    """Why MLflow could not be brought up to date; empty if it is."""


def run_study(
    project: ProjectPaths,
    name: str,
    config: StudyConfig,
    *,
    machine: MachineChoice | None = None,
    tracker: Tracker | None = None,
    listener: Listener | None = None,
    stop: Stop | None = None,
    hours: float | None = None,
    enqueued: Sequence[Mapping[str, Any]] = (),
) -> StudySummary:
    """Search until `config.study.trials` trials are evaluated, over all starts of the study `name`.

    Begins the study or continues it. `hours` is a budget after which it stops with checkpoints, `enqueued` are params
    to try next, each once over all starts.

    Raises StudyLockedError if another process runs it, StudyChangedError if its fixed settings differ, DatasetError
    for data that cannot be used, StorageError when the disk refuses, WorkerError when workers cannot start.
    """
    config = config.absolute()
    stop_at = time.monotonic() + hours * 3600 if hours is not None else math.inf
    study = project.study(name)
    listener, stop, machine = listener or Silent(), stop or Stop(), machine or MachineChoice()

    def check() -> None:
        if stop.is_requested:
            raise StoppedError("stopped before the first trial; run the same command again to continue", stop.signal)

    def preparing(done: int, total: int) -> None:
        check()
        listener.preparing(done, total)

    with (
        paths.refusals_named(study.root),
        lock.hold(study),
        log_file(study.log),
        Workers(study.root, check) as workers,
    ):
        for request in (study.stop_request, *study.root.glob("stop-trial-*")):
            request.unlink(missing_ok=True)
        if study.toml.is_file():
            record = StudyRecord.open(study)
            record.verify()
            record.check_config(config)
        else:
            _require_folds(config, cache_root(project, config))
        stop.epoch_left_s = workers.epoch_left_s
        # While they import torch, the images are looked at.
        workers.become(first_workers(record if study.toml.is_file() else None, machine))
        try:
            caches = PoolCaches(config, cache_root(project, config), progress=preparing)
            caches.prepare_listed(config)
        except CacheError:
            # A signal to stop may have ended the process that decodes, too.
            check()
            raise
        prepared = dataclasses.replace(caches.scored, notes=tuple(caches.notes))
        listener.prepared(prepared)
        for note in prepared.notes:
            logger.info("data: %s", note)
        if not study.toml.is_file():
            # Only now: a first start that fails for its data or folds leaves no study that binds the next one.
            folds = _make_folds(config, prepared, cache_root(project, config))
            stats = open_cache(prepared.cache_path).index.stats
            for note in fold_making.lesion_notes(folds, [each.view_foreground > 0 for each in stats]):
                listener.said(f"note: {note}")
            record = StudyRecord.create(study, config)
            if not record.has_folds:
                record.write_folds(folds, prepared.key)
        _fix_folds(record, config, prepared, cache_root(project, config))
        # Only now: a folder that does not hold the study's images must not be remembered as theirs.
        record.update_config(config)
        for said in enqueue.add(record, enqueued):
            listener.said(f"the configuration {said}")
        database = StudyDatabase(record)
        database.catch_up()
        if not study.plan.is_file():
            listener.said("measuring how fast this machine trains")
        plan = make_plan(record, caches, machine, workers)
        _require_space(record, plan)
        workers.become(plan.workers)
        tracking = TrackingThread(tracker, study) if tracker is not None else None
        coordinator = Coordinator(record, database, plan, caches, listener, tracking, stop, stop_at)
        listener.planned(record, plan, coordinator.forecast())
        try:
            coordinator.run(workers)
        finally:
            workers.close()
            undelivered, error = deliver_the_rest(tracking, stop) if tracking is not None else (0, "")
            # Workers that were killed while they wrote may have left some.
            paths.remove_stale_temporaries(study.root)
        return StudySummary(record, coordinator.n_counted, coordinator.was_stopped, undelivered, error)


def cache_root(project: ProjectPaths, config: StudyConfig) -> Path:
    """Where the decoded images of a study lie."""
    return Path(config.data.cache_dir) if config.data.cache_dir else project.cache


@dataclass
class _OpenTrial:
    """A trial that is being evaluated."""

    record: TrialRecord
    config: StudyConfig
    fitting: dict[int, Worker] = field(default_factory=dict)
    """Fold to the worker that fits it."""
    dropped: Verdict | None = None
    """Set while its worker is still to stop."""


class Coordinator:
    """The loop of one start: hand out, hear, decide, until enough trials are evaluated or it is asked to stop."""

    def __init__(
        self,
        record: StudyRecord,
        database: StudyDatabase,
        plan: ExecutionPlan,
        caches: PoolCaches,
        listener: Listener,
        tracking: TrackingThread | None,
        stop: Stop,
        stop_at: float,
    ) -> None:
        """`stop_at` is when the budget is used up, as `time.monotonic` counts."""
        self._record = record
        self._database = database
        self._plan = plan
        self._caches = caches
        self._listener = listener
        self._tracking = tracking
        self._stop = stop
        self._stop_at = stop_at
        self._pruner: Pruner = pruners.make_pruner(record.config)
        self._workers: Workers
        self._open: dict[int, _OpenTrial] = {}
        self._scores: dict[int, TrialScores] = {}
        """Scores of the ended trials, read once."""
        self._trials = {trial.number: trial for trial in record.trials()}
        self._constant = ConstantWarnings(record, listener.said)

    @property
    def n_counted(self) -> int:
        """Trials that were evaluated, over all starts."""
        return sum(trial.outcome in COUNTED for trial in self._trials.values())

    @property
    def was_stopped(self) -> bool:
        return self._stop.is_requested

    def forecast(self) -> plans.Forecast:
        """What is left to do, as far as measured steps tell."""
        n_trials = self._record.n_left(list(self._trials.values()))
        return plans.forecast(
            self._record.config,
            self._plan,
            n_images=self._caches.scored.n,
            n_trials=n_trials,
            n_folds=self._record.n_folds,
            n_confirm=confirmation.n_left(self._record, n_trials),
        )

    def run(self, workers: Workers) -> None:
        """Evaluate until the study has its trials, or until it is asked to stop."""
        self._workers = workers
        self._adopt_open_trials()
        while not self._stop.is_urgent:
            self._keep_to_budget()
            self._heed_requests()
            if not self._stop.is_requested:
                self._hand_out()
            if not workers.busy() and (self._stop.is_requested or not self._has_work()):
                break
            for event in workers.events(POLL_S):
                self._hear(event)
            fits.end_silent(workers, self._epoch_s)
        if not self._stop.is_requested:
            self._note_used_up()
            self._confirm()
        if self._stop.is_requested:
            logger.info("stopped; run the same command to continue")

    def _note_used_up(self) -> None:
        """Say so if the search ends before its trials are there; StudyError if nothing in the space is feasible."""
        trials, config = list(self._trials.values()), self._record.config
        if self.n_counted >= config.study.trials or self._record.n_unused(trials) != 0:
            return
        n_configurations = config.search.n_configurations
        if all(trial.outcome == "infeasible" for trial in trials):
            reason = trials[-1].reason
            if not len(config.search):
                raise StudyError(f"the configuration is infeasible, and there is no search for another: {reason}")
            raise StudyError(
                f"all {n_configurations} configurations of the search are infeasible, the last because {reason}: "
                "widen it or change data.size"
            )
        which = (
            "its only configuration has" if n_configurations == 1 else f"all {n_configurations} configurations have"
        )
        text = (
            f"the search space is used up: {which} been tried, so the search ends with {self.n_counted} of "
            f"{config.study.trials} trials"
        )
        logger.info("%s", text)
        self._listener.said(text)

    def _confirm(self) -> None:
        """Fit the few that may be the best once more."""

        def keep_to_requests() -> None:
            self._keep_to_budget()
            self._heed_requests()

        confirmation.Confirmation(
            self._record,
            self._caches,
            self._listener,
            keep_to_requests=keep_to_requests,
            is_stopping=lambda: self._stop.is_requested,
            is_urgent=lambda: self._stop.is_urgent,
            epoch_s=self._epoch_s_of,
            wake_tracking=self._wake_tracking,
            show_ranking=self._database.show_ranking,
        ).run(self._workers)

    def _has_work(self) -> bool:
        return bool(self._open) or self._wants_trials()

    def _wants_trials(self) -> bool:
        """Return whether another trial may begin: the count is not reached and a configuration is unused."""
        n_taken = self.n_counted + len(self._open)
        return n_taken < self._record.config.study.trials and self._record.n_unused(self._trials.values()) != 0

    def _may_ask(self) -> bool:
        """Whether all that the next suggestion shall know of has ended."""
        lookahead = self._record.config.study.lookahead
        last = len(self._trials) - lookahead
        return not lookahead or all(number > last for number in self._open)

    def _adopt_open_trials(self) -> None:
        """Continue every trial that an earlier start left open, under its number and with its params."""
        for number in self._database.running():
            if number not in self._trials:
                enqueued = self._enqueued()
                self._begin(number, self._database.adopt(number, enqueued), enqueued)
        for trial in list(self._trials.values()):
            if trial.outcome is None:
                self._go_on(trial)
            else:
                # A start that was killed between the record and the clearing left them.
                self._clear(trial.number)
            for fold in self._record.finished_folds(trial.number):
                fits.remove_checkpoints(self._record.paths.trial(trial.number).fold(fold))

    def _go_on(self, trial: TrialRecord) -> None:
        """Continue a trial that an earlier start began, or end it if all its folds are finished."""
        self._open[trial.number] = _OpenTrial(trial, trial.study_config)
        logger.info("trial %d continues", trial.number)
        self._listener.trial_began(trial)
        if trial.decisions and trial.decisions[-1]["drop"]:
            self._open[trial.number].dropped = Verdict(**trial.decisions[-1])
        self._settle(self._open[trial.number])

    def _hand_out(self) -> None:
        for worker in self._workers.idle():
            task = self._next_fit()
            if task is None:
                return
            trial, fold = task
            trial.fitting[fold] = worker
            self._workers.submit(worker, self._fit_job(trial, fold))

    def _next_fit(self) -> tuple[_OpenTrial, int] | None:
        """What an idle worker shall do: go on with a trial, begin one, or help with another fold of one.

        In a race all help with the first trial, since nothing can be dropped before one is full; and later with those
        that have survived a fold, where none is left to begin.
        """
        for trial in self._open.values():
            if not trial.fitting and (fold := self._next_fold(trial)) is not None:
                return trial, fold
        is_first = self._pruner.is_sequential and not any(trial.can_win for trial in self._trials.values())
        if is_first and (task := self._help(list(self._open.values())[:1])) is not None:
            return task
        while self._wants_trials() and self._may_ask():
            if (begun := self._begin_next()) is not None and (fold := self._next_fold(begun)) is not None:
                return begun, fold
        if self._pruner.is_sequential:
            return self._help([t for t in self._open.values() if self._record.finished_folds(t.record.number)])
        return self._help(self._open.values())

    def _help(self, trials: Iterable[_OpenTrial]) -> tuple[_OpenTrial, int] | None:
        """Another fold of one of these trials, beside those that are being fitted."""
        if not self._pruner.takes_any_fold or (self._pruner.is_sequential and self._record.config.study.lookahead):
            # How far the others are when one is judged would depend on the number of workers.
            return None
        for trial in trials:
            if trial.dropped is None and (fold := self._next_fold(trial)) is not None:
                return trial, fold
        return None

    def _next_fold(self, trial: _OpenTrial) -> int | None:
        """The first unfinished fold that nobody fits; of a dropped trial only one that lacks no epoch."""
        for fold in range(self._record.n_folds):
            if fold not in trial.fitting and not self._record.fit(trial.record.number, fold).is_finished:
                dropped = trial.dropped
                # Dropped after the last epoch of a fold: that fold is finished, also where a death came between.
                if dropped is None or (dropped.fold, dropped.epoch) == (fold, trial.config.train.epochs):
                    return fold
        return None

    def _begin_next(self) -> _OpenTrial | None:
        """Begin the next enqueued trial, or the one that the sampler suggests; None if it is infeasible."""
        infeasible = sum(trial.outcome == "infeasible" for trial in self._trials.values())
        if infeasible >= INFEASIBLE_PER_TRIAL * self._record.config.study.trials:
            last = max(t.number for t in self._trials.values() if t.outcome == "infeasible")
            raise StudyError(
                f"{infeasible} suggested configurations were infeasible, the last one because "
                f"{self._trials[last].reason}; make the search space smaller or data.size other"
            )
        enqueued = self._enqueued()
        number, params = self._database.ask(enqueued)
        return self._begin(number, params, enqueued)

    def _enqueued(self) -> Mapping[str, Any] | None:
        """Return the params that a user wants tried next; None if there are none."""
        return enqueue.next_params(self._record, list(self._trials.values()))

    def _begin(self, number: int, params: dict[str, Any], enqueued: Mapping[str, Any] | None) -> _OpenTrial | None:
        """Record a new trial and open it; None if it is infeasible, which costs no training."""
        try:
            config = self._record.config.with_params(params)
            reason = plans.why_infeasible(config, self._plan)
        except ConfigError as error:
            config, reason = self._record.config.with_params({}), plans.Infeasible(str(error), 1.0)
        record = TrialRecord(
            number=number,
            params=params,
            config=config.to_dict(),
            began_at=now(),
            source="default" if number == 0 else "enqueued" if enqueue.is_same(params, enqueued) else "sampler",
            code=code_version(),
        )
        self._write(record)
        if reason is not None:
            self._end(record, "infeasible", reason=reason.reason, constraint=reason.excess)
            return None
        logger.info("trial %d began: %s", number, params)
        self._listener.trial_began(record)
        self._open[number] = _OpenTrial(record, config)
        self._wake_tracking()
        return self._open[number]

    def _fit_job(self, trial: _OpenTrial, fold: int) -> dict[str, Any]:
        folder = self._record.paths.trial(trial.record.number).fold(fold)
        seed = fit_seed(self._record.config, trial.record.place, fold)
        return fits.fold_job(self._record, trial.record, fold, folder, self._caches, seed=seed, keep_best=True)

    def _hear(self, event: Event) -> None:
        if event.job is None or event.job["trial"] not in self._open:
            # A worker that had to be ended together with its trial.
            return
        trial, fold = self._open[event.job["trial"]], int(event.job["fold"])
        number = trial.record.number
        if event.kind == "epoch":
            self._hear_epoch(event.worker, trial, fold, event.message["row"])
            return
        trial.fitting.pop(fold, None)
        if event.kind == "finished":
            score = event.message["summary"]["value"]
            logger.info("trial %d fold %d finished: %s %.4f", number, fold, self._record.config.study.metric, score)
            self._listener.fold_ended(number, fold, score)
            self._constant.check(number)
            self._wake_tracking()
            self._settle(trial)
        elif event.kind == "stopped":
            self._settle(trial)
        elif event.kind == "diverged":
            reason = f"{event.message['text']} of fold {fold}"
            self._end(trial.record, "diverged", reason=reason, constraint=1.0)
        elif event.kind == "out_of_memory":
            self._end(trial.record, "infeasible", reason=event.message["text"], constraint=1.0)
        else:
            self._hear_failure(trial, fold, event)

    def _hear_epoch(self, worker: Worker, trial: _OpenTrial, fold: int, row: dict[str, Any]) -> None:
        number = trial.record.number
        held_out = row["held_out"] or row["train"]
        logger.info(
            "trial %d fold %d epoch %d: loss %.4f, %s %.4f",
            number,
            fold,
            row["epoch"],
            row["train"]["loss"],
            self._record.config.study.metric,
            held_out[self._record.config.study.metric],
        )
        self._listener.epoch_ended(number, fold, row)
        self._wake_tracking()
        if trial.dropped is None and trial.record.outcome is None:
            self._judge(trial, fold)
        go = trial.dropped is None and number in self._open and not self._stop.is_requested
        self._workers.reply(worker, go=go)

    def _hear_failure(self, trial: _OpenTrial, fold: int, event: Event) -> None:
        """A worker died or raised: once more from the checkpoint, unless this fold has done it too often."""
        what, fit = f"trial {trial.record.number}, fold {fold}", self._record.fit(trial.record.number, fold)
        failures, reason = fits.count_death(fit, fold, trial.record.failures, event.message, what)
        self._listener.said(f"{what}: worker {event.message['text']}")
        trial.record = dataclasses.replace(trial.record, failures=failures)
        self._write(trial.record)
        if fit.is_finished or trial.dropped is not None:
            self._settle(trial)
        elif reason:
            self._end(trial.record, "failed", reason=reason)
            ended = [t for t in self._trials.values() if t.outcome in COUNTED]
            if len(ended) >= 3 and all(t.outcome == "failed" for t in ended):
                raise WorkerError(f"every trial so far failed; {reason}")

    def _settle(self, trial: _OpenTrial) -> None:
        """When a fit ended, however, or after a restart: end the trial if nothing of it is left to do."""
        number = trial.record.number
        if trial.dropped is not None:
            if not trial.fitting and self._next_fold(trial) is None:
                self._end(trial.record, "dropped", value=trial.dropped.estimate, reason=trial.dropped.reason)
        elif len(self._record.finished_folds(number)) == self._record.n_folds:
            summaries = [self._record.fit(number, fold).summary() or {} for fold in range(self._record.n_folds)]
            parts = [summary["micro_batch"] for summary in summaries if summary.get("micro_batch")]
            if parts:
                trial.record = dataclasses.replace(trial.record, micro_batch=min(parts))
            self._end(trial.record, "full", value=self._record.value(number))

    def _judge(self, trial: _OpenTrial, fold: int) -> None:
        """Ask the pruner after an epoch of this fold; keep what it says on record before anything follows from it."""
        candidate = self._trial_scores(trial.record.number)
        # Without what others do beside it: a fold that they have not finished tells of no end.
        scores = {each: candidate.scores[each] for each in candidate.finished if each != fold}
        candidate = dataclasses.replace(candidate, scores={**scores, fold: candidate.scores[fold]})
        others = self._ended_scores()
        if lookahead := self._record.config.study.lookahead:
            # What has ended besides depends on how many workers there are.
            others = [each for each in others if each.number <= trial.record.number - lookahead]
        # A copy must not lose against itself.
        others = [each for each in others if self._trials[each.number].params != trial.record.params]
        verdict = self._pruner.judge(candidate, others, self._record.folds)
        if verdict is not None:
            self._keep_decision(trial, verdict)

    def _keep_decision(self, trial: _OpenTrial, verdict: Verdict) -> None:
        decision = verdict.to_dict()
        # An epoch that was judged before a restart is not entered twice.
        before = [each for each in trial.record.decisions if not _is_at_or_after(each, decision)]
        trial.record = dataclasses.replace(trial.record, decisions=(*before, decision))
        self._write(trial.record)
        if verdict.drop:
            trial.dropped = verdict

    def _end(
        self,
        trial: TrialRecord,
        outcome: Outcome,
        *,
        value: float | None = None,
        reason: str = "",
        constraint: float = 0.0,
    ) -> None:
        """Record, tell, clear, in this order."""
        ended = dataclasses.replace(
            trial, outcome=outcome, value=value, reason=reason, constraint=constraint, ended_at=now()
        )
        self._write(ended)
        self._database.tell(ended)
        if outcome == "full":
            self._database.show_ranking()
        opened = self._open.pop(trial.number, None)
        for worker in (opened.fitting if opened else {}).values():
            self._workers.kill(worker)
        result = f"{value:.4f}" if value is not None else reason
        logger.info("trial %d ended: %s, %s", trial.number, outcome, result)
        self._clear(trial.number)
        self._listener.trial_ended(ended)
        self._wake_tracking()

    def _clear(self, number: int) -> None:
        """Remove checkpoints of ended trials; weights stay for the two best full trials only."""
        values = {trial.number: trial.value or 0.0 for trial in self._record.contenders(self._trials.values())}
        ranking = rank(values)
        for each in {number, *ranking[2:4]} - set(ranking[:2]):
            for fold in range(self._record.n_folds):
                fits.remove_networks(self._record.paths.trial(each).fold(fold))

    def _trial_scores(self, number: int) -> TrialScores:
        """Per-image scores after every epoch of every fold that was begun."""
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
        """Those of the ended trials, by number; read once, so that what a pruner works out about them can be kept."""
        for trial in self._trials.values():
            may_count = trial.can_win or trial.outcome == "dropped"
            if may_count and trial.number not in self._scores:
                self._scores[trial.number] = self._trial_scores(trial.number)
        return [self._scores[number] for number in sorted(self._scores)]

    def _epoch_s(self, number: int, fold: int) -> float | None:
        trial = self._open.get(number)
        return self._epoch_s_of(trial.config, fold, self._record.fit(number, fold).epochs()) if trial else None

    def _epoch_s_of(self, config: StudyConfig, fold: int, rows: list[dict[str, Any]]) -> float:
        """Seconds of the longest epoch of a fit so far; before the first, those that the plan foresees."""
        folds = self._record.folds
        return max((row["train_s"] + row["eval_s"] for row in rows), default=0.0) or self._plan.epoch_s(
            config, len(folds.train(fold)), len(folds.held_out(fold))
        )

    def _keep_to_budget(self) -> None:
        over = time.monotonic() - self._stop_at
        if over >= 0 and not self._stop.is_requested:
            logger.info("the budget of hours is used up")
            self._listener.said("the budget of hours is used up: stopping after this epoch")
            self._stop.request()
        elif over > GRACE_S:
            self._stop.request(at_once=True)

    def _heed_requests(self) -> None:
        """Act on the files that `hpsearch stop` leaves in the study's folder, possibly from another machine."""
        request = self._record.paths.stop_request
        if request.exists():
            logger.info("stop was requested")
            self._listener.said("stop was requested from outside")
            self._stop.heed(self._record.paths)
        for trial in list(self._open.values()):
            request = self._record.paths.trial_stop_request(trial.record.number)
            if request.exists():
                self._stop_trial(trial)
                request.unlink(missing_ok=True)

    def _stop_trial(self, trial: _OpenTrial) -> None:
        """Have a trial end as if it were raced out, with the value that its scores so far let one expect."""
        number, reason = trial.record.number, "stopped on request"
        logger.info("trial %d is to stop", number)
        self._listener.said(f"trial {number} is stopped on request")
        candidate = self._trial_scores(number)
        if not candidate.scores:
            self._end(trial.record, "failed", reason=f"{reason} before its first epoch")
        elif trial.dropped is None:
            verdict = verdict_on_request(candidate, self._ended_scores(), self._record.n_folds, reason)
            self._keep_decision(trial, verdict)
            self._settle(trial)

    def _write(self, trial: TrialRecord) -> None:
        self._record.write_trial(trial)
        self._trials[trial.number] = trial

    def _wake_tracking(self) -> None:
        if self._tracking is not None:
            self._tracking.wake()


def _is_at_or_after(decision: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the decision was made at the same epoch as the other, or at a later one of the same fold."""
    return bool(decision["fold"] == other["fold"] and decision["epoch"] >= other["epoch"])


def fit_seed(config: StudyConfig, place: int, fold: int) -> int:
    """Seed of one fit of the trial at that place: first weights, order and augmentation."""
    return stable_seed(config.study.seed, "fit", place, fold)


def _fix_folds(record: StudyRecord, config: StudyConfig, prepared: Prepared, caches: Path) -> None:
    """Make the folds of a new study; make sure that an old one still has the images they were made from."""
    if record.has_folds:
        data = config.data
        if record.folds.ids != prepared.ids or record.data_key() != prepared.key:
            before, after = set(record.folds.ids), set(prepared.ids)
            what = f"{len(before - after)} are gone, {len(after - before)} are new" if before != after else "content"
            raise StudyChangedError(
                f"the images in {data.images or data.root} are not those that study {record.name!r} was begun with "
                f"({what}): put the old ones back, or begin another study with --study NAME"
            )
        return
    record.write_folds(_make_folds(config, prepared, caches), prepared.key)


def _require_folds(config: StudyConfig, caches: Path) -> None:
    """Raise, before any image is decoded, what is wrong with the groups or makes so many folds impossible."""
    table = fold_making.groups_file(config.data)
    groups = fold_making.read_groups(table) if table else None
    n_images = count_pool(config.data, caches)
    # Without any image the data are at fault, and decoding says why.
    if config.study.folds != "fixed" and n_images:
        fold_making.require_enough(n_images, config.study.folds, "images with a mask")
        if groups is not None:
            fold_making.require_enough(len(set(groups.values())), config.study.folds, "groups")


def _make_folds(config: StudyConfig, prepared: Prepared, caches: Path) -> Folds:
    table = fold_making.groups_file(config.data)
    groups: Mapping[str, str] | None = fold_making.read_groups(table) if table else None
    if config.data.group_duplicates:
        pairs = duplicates.find_in_dataset(config.data, caches, with_test=False)
        logger.info("%d near-duplicate pairs are kept in one fold each", len(pairs))
        groups = duplicates.groups_of(pairs, prepared.ids, groups)
    return fold_making.make_folds(
        prepared.ids,
        prepared.splits,
        open_cache(prepared.cache_path).sha256,
        folds=config.study.folds,
        seed=config.study.seed,
        groups=groups,
    )


def _require_space(record: StudyRecord, plan: ExecutionPlan) -> None:
    """StorageError if the disk has less room than the rest of the study will need: better now than in the night."""
    root, settings = record.paths.root, record.config.study
    needed = plans.disk_bytes(record.config, record.n_folds, len(plan.workers)) + SPARE_BYTES
    there = sum(
        path.stat().st_size for path in root.glob("trials/*/fold*/*.*") if path.suffix in (".pt", ".safetensors")
    )
    n_open = settings.trials - sum(trial.outcome in COUNTED for trial in record.trials())
    free = paths.free_bytes(root)
    if n_open > 0 and free < needed - there:
        raise StorageError(
            f"{root} has {free / 2**20:.0f} MiB free, the study may need {(needed - there) / 2**20:.0f} MiB more for "
            "weights and checkpoints: make room, or choose another folder with --out"
        )


def deliver_the_rest(tracking: TrackingThread, stop: Stop) -> tuple[int, str]:
    """Bring MLflow up to date and end tracking; return how many runs lack something, and why."""
    # A process that must end at once must not wait for a server that does not answer.
    if stop.is_urgent:
        return tracking.close(URGENT_DELIVERY_S), tracking.error
    return tracking.close(LAST_DELIVERY_S, lambda: stop.is_urgent), tracking.error


class _Quiet(logging.FileHandler):
    """A log that a full disk keeps short: what matters is written elsewhere, and complains itself."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        pass

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


@contextlib.contextmanager
def log_file(path: Path) -> Iterator[None]:
    """One line per event of hpsearch in `path`, appended, for the time of the block."""
    handler = _Quiet(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger("hpsearch")
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()
