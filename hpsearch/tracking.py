"""Brings MLflow up to date with the record of a study, and is the only writer to it.

The study folder is the record; MLflow may lag behind it. `MlflowTracker.catch_up` logs what is on record and not yet
in MLflow, so that an outage costs nothing but delay, and a deleted database comes back. Nothing is sent twice: runs
are found again by their tags and start, metrics by key and step. `TrackingThread` does it in the background.

Importing this module imports no MLflow. When it is first used, and the environment does not say otherwise, MLflow's
telemetry is off, and MLflow prints no addresses and does not repeat requests by itself (`ENVIRONMENT`).
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import quote

from filelock import FileLock

from hpsearch import tracked_runs as runs
from hpsearch.config import digest
from hpsearch.errors import HpsearchError, TrackingError
from hpsearch.paths import ProjectPaths, StudyPaths, atomic_write
from hpsearch.store.record import Standing, StudyRecord, TrialRecord
from hpsearch.tracked_runs import Point, RunContent

logger = logging.getLogger(__name__)

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # A request that is repeated blindly makes a second run where only the answer was lost: here a retry looks first.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
}
"""What MLflow is told through the environment of this process, where that says nothing yet."""
MAX_METRICS, MAX_PARAMS = 1000, 100
"""MLflow's limits for one request; that of tags is that of params."""
DELIVERED = "hpsearch.delivered"
"""Tag of a run to which nothing will be added: the digest of what it holds."""
MODEL_ADDRESSES = (
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Where MLflow's database keeps the addresses of models, beside those of runs."""
VIEW = "hpsearch"
"""Name, in addresses, of the saved view of the runs table: `#/experiments/ID/runs?viewStateShareKey=hpsearch`."""

T = TypeVar("T")


class Tracker(Protocol):
    """Shows a study to people while it runs. Reads the study folder and nothing else."""

    def catch_up(self, study: StudyPaths, *, stopped: bool = False) -> None:
        """Deliver all that is on record and not delivered yet; `stopped`: nobody works on what is still open.

        TrackingError, without any harm done, if that cannot be now.
        """

    def undelivered(self, study: StudyPaths) -> int:
        """Trials and finals on record of which something may be missing, as far as known without asking."""

    def log_report(self, study: StudyPaths) -> None:
        """Keep the study's report and its figures with the study. TrackingError if that cannot be now."""


class NullTracker:
    """Tracks nothing."""

    def catch_up(self, study: StudyPaths, *, stopped: bool = False) -> None:
        pass

    def undelivered(self, study: StudyPaths) -> int:
        return 0

    def log_report(self, study: StudyPaths) -> None:
        pass


def make_tracker(project: ProjectPaths, uri: str | None = None) -> Tracker:
    """The tracker that `--tracking` names: `none`, or a tracking URI of MLflow.

    Without it the environment's MLFLOW_TRACKING_URI, and without that `mlflow.db` in the project folder, which is
    where a plain `mlflow ui` looks. Imports no MLflow and reaches for nothing yet.

    Raises TrackingError for a file store, which MLflow no longer writes.
    """
    return NullTracker() if uri == "none" else MlflowTracker(project, uri)


def redact(text: str) -> str:
    """`text` with the credentials of every address in it replaced by `***`."""
    text = re.sub(r"(?<=://)(?:[^:/@\s]*:\S*|[^/\s]*)@", "***@", text)
    return re.sub(r"(?i)([?&][^=&\s]*(?:password|passwd|secret|token|key)[^=&\s]*=)[^&\s]+", r"\1***", text)


_THREAD = "tracking"


def is_delivering() -> bool:
    """Whether a tracking thread still runs in this process, also one that nobody waits for any more."""
    return any(thread.name == _THREAD for thread in threading.enumerate())


class TrackingThread:
    """Keeps MLflow up to date in the background, and goes on trying where it cannot be reached."""

    def __init__(
        self,
        tracker: Tracker,
        study: StudyPaths,
        *,
        pause_s: float = 1.0,
        retry_s: float = 1.0,
        longest_retry_s: float = 300.0,
    ) -> None:
        """Begin at once. After each delivery it rests `pause_s`; after failures `retry_s`, twice that, and so on."""
        self._tracker = tracker
        self._study = study
        self._pause_s = pause_s
        self._retry_s = retry_s
        self._longest_retry_s = longest_retry_s
        self._woken = threading.Event()
        self._closing = threading.Event()
        self._n_failures = 0
        self.error = ""
        """Why the last delivery failed; empty if it did not."""
        # A daemon: a server that does not answer shall not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name=_THREAD, daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Something new is on record. Returns at once."""
        self._woken.set()

    def close(self, timeout_s: float = 30.0, give_up: Callable[[], bool] = lambda: False) -> int:
        """Deliver what is left and end; return the number of runs of which something is not delivered.

        Waits as long as it gets on, and gives up after `timeout_s` without progress, or when `give_up` says so.
        """
        self._closing.set()
        self._woken.set()
        left = self._tracker.undelivered(self._study)
        give_up_at = time.monotonic() + timeout_s
        while self._thread.is_alive() and time.monotonic() < give_up_at and not give_up():
            self._thread.join(0.2)
            if (now_left := self._tracker.undelivered(self._study)) < left:
                left, give_up_at = now_left, time.monotonic() + timeout_s
        left = self._tracker.undelivered(self._study)
        if left and self._thread.is_alive():
            self.error = self.error or "MLflow does not answer"
        # The run of the study itself may lack something, too.
        return max(left, 1) if self.error else left

    def _run(self) -> None:
        while True:
            # In this order: whoever closes after the first line has woken it again.
            self._woken.clear()
            is_last = self._closing.is_set()
            self._attempt(is_last)
            if is_last:
                return
            if self._n_failures:
                self._closing.wait(min(self._retry_s * 2 ** (self._n_failures - 1), self._longest_retry_s))
            else:
                self._closing.wait(self._pause_s)
                self._woken.wait()

    def _attempt(self, is_last: bool) -> None:
        try:
            self._tracker.catch_up(self._study, stopped=is_last)
        except Exception as error:
            self._n_failures = min(self._n_failures + 1, 20)
            self.error = str(error) or type(error).__name__
            if self._n_failures == 1:
                # A fault of hpsearch shows where it is, but ends no training.
                details = None if isinstance(error, HpsearchError) else error
                logger.warning("tracking lags behind and will catch up: %s", error, exc_info=details)
        else:
            if self._n_failures:
                logger.info("tracking has caught up")
            self._n_failures = 0
            self.error = ""


@dataclass(frozen=True)
class Rebuilt:
    """What `MlflowTracker.rebuild` did."""

    n_kept: int
    """Runs that agreed with the record; what they lacked was added."""
    n_replaced: int
    """Runs that contradicted the record and were made anew, with the notes that people had put on them."""
    n_removed: int
    """Runs of trials that are not on record."""


class MlflowTracker:
    """Logs studies to MLflow: an experiment a study, a parent run for it, a child run for each trial and final."""

    def __init__(self, project: ProjectPaths, uri: str | None = None) -> None:
        """Raises TrackingError for a file store. Imports no MLflow."""
        self._project = ProjectPaths(project.root.absolute())
        self._uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or None
        self._deliveries: dict[str, _Delivery] = {}
        self._current: dict[str, set[str]] = {}
        """Keys of the runs of each study that lacked nothing when last seen."""
        self._troubled: set[str] = set()
        """Studies for which a request has failed."""
        if self._uri is None:
            _refuse_file_store(self._project.mlruns)
        elif self._uri.startswith("file:") or ("://" not in self._uri and self._uri not in ("databricks", "uc")):
            raise TrackingError(
                f"cannot track to {redact(self._uri)}: MLflow no longer writes to folders; give a database, such as "
                "sqlite:////path/to/mlflow.db, or the address of a server"
            )

    @property
    def uri(self) -> str:
        """Where it tracks to, without credentials."""
        return redact(self._uri or f"sqlite:///{self._project.mlflow_db}")

    def catch_up(self, study: StudyPaths, *, stopped: bool = False) -> None:
        """See `Tracker`. An experiment or run that somebody deleted comes back."""
        if stopped and study.name in self._troubled:
            # A request that was given up may have been done after MLflow was last read: look for runs made twice.
            self._deliveries.pop(study.name, None)
        with self._failing_as_tracking_error(study):
            self._delivery(study).catch_up(stopped)

    def undelivered(self, study: StudyPaths) -> int:
        """See `Tracker`. Before MLflow has been reached that is every trial on record."""
        return len(set(runs.run_keys(study)) - self._current.get(study.name, set()))

    def log_report(self, study: StudyPaths) -> None:
        """See `Tracker`. Adds files to the study's own run and touches nothing else, so the study may be running."""
        if self._uri is None and not self._project.mlflow_db.is_file():
            raise TrackingError(f"nothing is tracked in {self._project.root} yet")
        with self._failing_as_tracking_error(study):
            self._delivery(study).log_report()

    def rebuild(self, study: StudyPaths) -> Rebuilt:
        """Make MLflow equal to the record, also after the project folder was moved.

        What agrees stays as it is, with its run id; what contradicts the record is made anew; runs of trials that are
        not on record go to MLflow's trash (`mlflow gc` empties it). Nobody else may be tracking the study meanwhile.
        """
        self._deliveries.pop(study.name, None)
        with self._failing_as_tracking_error(study):
            result = self._delivery(study).reconcile()
            self._delivery(study).catch_up(stopped=True)
        return result

    @contextmanager
    def _failing_as_tracking_error(self, study: StudyPaths) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # Whether a request whose answer was lost has been done is for MLflow to say: read everything anew.
            self._deliveries.pop(study.name, None)
            self._troubled.add(study.name)
            if not _is_environment(error):
                raise
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise TrackingError(f"{self.uri}: {redact(lines[0])[:300]}") from error

    def _delivery(self, study: StudyPaths) -> _Delivery:
        """The study as MLflow has it, read once and then remembered."""
        record = StudyRecord.open(study)
        if study.name not in self._deliveries:
            client = self._connect(study)
            current = self._current.setdefault(study.name, set())
            self._deliveries[study.name] = _Delivery(client, record, self._artifact_root(study), current)
        self._deliveries[study.name].record = record
        return self._deliveries[study.name]

    def _connect(self, study: StudyPaths) -> Any:
        mlflow = _import_mlflow()
        if self._uri is not None:
            return mlflow.MlflowClient(tracking_uri=self._uri)
        _refuse_file_store(self._project.mlruns)
        uri = _project_database(self._project)
        _repair_moved(self._project, study.name)
        return mlflow.MlflowClient(tracking_uri=uri)

    def _artifact_root(self, study: StudyPaths) -> str | None:
        """Where the files of a study's runs go: into the project, unless a server keeps them."""
        if self._uri is not None and self._uri.partition(":")[0] in ("http", "https", "databricks", "uc"):
            return None
        return _artifact_root(self._project, study.name)


@dataclass
class _Run:
    """What is known of one run in MLflow."""

    id: str
    tags: dict[str, str]
    params: dict[str, str] = field(default_factory=dict)
    metric_keys: tuple[str, ...] = ()
    points: set[tuple[str, int, int]] | None = None
    """Key, step and time of every metric that it has; None: not read yet."""
    status: str = "RUNNING"
    ended_ms: int | None = None
    has_files: bool = False
    """Whether its files were written since MLflow was read."""


@dataclass(frozen=True)
class _Child:
    """A trial or final on record."""

    key: str
    content: Callable[[], RunContent]
    write_files: Callable[[Path], None]
    weights: Path | None = None
    """The model to be registered."""


class _Delivery:
    """One study in MLflow: what is there already, and how to add the rest. Thrown away after any failure."""

    def __init__(
        self,
        client: Any,
        record: StudyRecord,
        artifact_root: str | None,
        current: set[str],
    ) -> None:
        """`current` is kept up to date with the keys of the trials and finals that lack nothing."""
        self.record = record
        self._client = client
        self._artifact_root = artifact_root
        self._current = current
        self._experiment_id = ""
        self._runs: dict[tuple[str, int], _Run] = {}
        """By key and start."""
        self._complete: set[str] = set()
        """Keys of the runs to which nothing will be added."""
        self._ended: dict[int, TrialRecord] = {}
        self._standing: Standing | None = None
        """The ranking that the runs show."""

    def catch_up(self, stopped: bool) -> None:
        """Deliver everything that is missing; raises the first error once the other runs were delivered."""
        trials = self._trials()
        if not trials:
            return
        standing = self.record.standing(trials)
        study = runs.study_run(self.record, trials)
        self._read(study)
        parent = self._ensure(study, {})
        self._reopen(standing)
        failures: list[Exception] = []
        for child in self._children(trials, standing):
            if child.key in self._complete:
                continue
            self._current.discard(child.key)
            try:
                content = child.content()
                self._deliver(content, {"mlflow.parentRunId": parent.id}, child.write_files, stopped, child.weights)
            except Exception as error:
                if _is_away(error):
                    raise
                # One run that MLflow will not have, or whose record is damaged, does not keep back the others.
                failures.append(error)
            else:
                self._current.add(child.key)
                if content.is_complete:
                    self._complete.add(child.key)
        self._show_ranking(trials, standing)
        self._deliver(study, {}, partial(runs.write_study_files, self.record), stopped)
        if not stopped:
            runs.import_figures()
        if failures:
            raise failures[0]

    def _reopen(self, standing: Standing) -> None:
        """Deliver again the trials whose value changed after they had ended."""
        before = self._standing
        for number, value in standing.values.items():
            if before is not None and (
                before.values.get(number) != value or (number in before.confirmed) != (number in standing.confirmed)
            ):
                self._complete.discard(runs.trial_key(number))

    def _show_ranking(self, trials: Sequence[TrialRecord], standing: Standing) -> None:
        """Tag the winner, and it alone, and every trial that can win with its place."""
        from mlflow.entities import RunTag

        if standing == self._standing:
            return
        began_ms = {trial.number: runs.trial_run_began_ms(trial) for trial in trials}
        shown: dict[str, tuple[_Run, dict[str, str]]] = {}
        for number, tags in runs.ranking_tags(standing).items():
            run = self._runs.get((runs.trial_key(number), began_ms[number]))
            if run is not None:
                shown[run.id] = run, tags
        # By MLflow's word: another process may have tagged a run since this one read it.
        search = partial(self._client.search_runs, [self._experiment_id], f"tags.{runs.WINNER} = 'true'")
        for found in _pages(partial(search, max_results=100)):
            if found.info.run_id not in shown or runs.WINNER not in shown[found.info.run_id][1]:
                self._client.delete_tag(found.info.run_id, runs.WINNER)
        for run, tags in shown.values():
            if runs.WINNER not in tags:
                run.tags.pop(runs.WINNER, None)
            if new := [RunTag(key, value) for key, value in tags.items() if run.tags.get(key) != value]:
                self._client.log_batch(run.id, tags=new)
                run.tags.update(tags)
        self._standing = standing

    def log_report(self) -> None:
        """Put the report and its figures into the files of the study's run."""
        name = self.record.name
        found = self._client.get_experiment_by_name(name)
        search = partial(self._client.search_runs, [found.experiment_id] if found else [], max_results=1000)
        parents = [run for run in _pages(search) if runs.key_of(run.data.tags) == "study"] if found else []
        if not parents:
            raise TrackingError(f"study {name!r} is not in MLflow yet")
        parent = max(parents, key=lambda run: int(run.info.start_time))
        with self._folder() as folder:
            runs.write_report_files(self.record, folder)
            self._client.log_artifacts(parent.info.run_id, str(folder))

    def reconcile(self) -> Rebuilt:
        """Take out of MLflow what contradicts the record, and take nothing else for delivered."""
        trials = self._trials()
        wanted: dict[tuple[str, int], RunContent] = {}
        if trials:
            standing = self.record.standing(trials)
            study = runs.study_run(self.record, trials)
            self._read(study)
            contents = [study, *(child.content() for child in self._children(trials, standing))]
            wanted = {(content.key, content.began_ms): content for content in contents}
        n_kept = n_replaced = n_removed = 0
        for identity, run in list(self._runs.items()):
            content = wanted.get(identity)
            if content is not None and not self._contradicts(run, content):
                run.tags.pop(DELIVERED, None)
                n_kept += 1
                continue
            self._client.delete_run(run.id)
            # The run that takes its place registers its model anew.
            for version in self._client.search_model_versions(f"run_id = '{run.id}'"):
                self._client.delete_model_version(version.name, version.version)
            del self._runs[identity]
            if content is None:
                n_removed += 1
            else:
                self._ensure(content, runs.notes(run.tags))
                n_replaced += 1
        return Rebuilt(n_kept, n_replaced, n_removed)

    def _trials(self) -> list[TrialRecord]:
        """All trials on record; those that have ended are read once."""
        trials = []
        for number in self.record.trial_numbers():
            trial = self._ended.get(number) or self.record.trial(number)
            if trial.ended_at is not None:
                self._ended[number] = trial
            trials.append(trial)
        return trials

    def _children(self, trials: Sequence[TrialRecord], standing: Standing) -> Iterator[_Child]:
        for trial in trials:
            yield _Child(
                runs.trial_key(trial.number),
                partial(runs.trial_run, self.record, trial, standing),
                partial(runs.write_trial_files, self.record, trial),
            )
        for second in self.record.second_records():
            yield _Child(
                runs.second_key(second.trial),
                partial(runs.second_run, self.record, second),
                partial(runs.write_second_files, self.record, second.trial),
            )
        for name in runs.final_names(self.record.paths):
            yield _Child(
                runs.final_key(name),
                partial(runs.final_run, self.record, name),
                partial(runs.write_final_files, self.record, name),
                self.record.paths.final(name).model,
            )

    def _read(self, study: RunContent) -> None:
        """Find the experiment, or make it, and every run of the study in it."""
        if self._experiment_id:
            return
        experiment_id = self._find_experiment(study)
        found: dict[tuple[str, int], list[Any]] = {}
        for run in _pages(partial(self._client.search_runs, [experiment_id], max_results=1000)):
            if (key := runs.key_of(run.data.tags)) and run.data.tags["hpsearch.study"] == self.record.name:
                found.setdefault((key, run.info.start_time), []).append(run)
        for identity, same in found.items():
            # Made twice where a server had done what it could not confirm any more.
            kept, *others = sorted(
                same, key=lambda run: (-len(run.data.metrics), -len(run.data.params), run.info.run_id)
            )
            for run in others:
                self._client.delete_run(run.info.run_id)
            self._remember(identity, kept)
        self._experiment_id = experiment_id

    def _remember(self, identity: tuple[str, int], run: Any) -> None:
        self._runs[identity] = _Run(
            id=run.info.run_id,
            tags=dict(run.data.tags),
            params=dict(run.data.params),
            metric_keys=tuple(run.data.metrics),
            status=run.info.status,
            ended_ms=run.info.end_time,
        )

    def _find_experiment(self, study: RunContent) -> str:
        name = self.record.name
        found = self._client.get_experiment_by_name(name)
        if found is None:
            experiment_id = str(self._client.create_experiment(name, artifact_location=self._artifact_root))
            tags = {}
        else:
            experiment_id, tags = str(found.experiment_id), dict(found.tags)
            if found.lifecycle_stage == "deleted":
                self._client.restore_experiment(experiment_id)
        for key, value in _experiment_tags(self.record, experiment_id, study.began_ms).items():
            # What somebody has changed stays.
            if key not in tags:
                self._client.set_experiment_tag(experiment_id, key, value)
        return experiment_id

    def _ensure(self, content: RunContent, more_tags: Mapping[str, str]) -> _Run:
        """The run of that content, made if it is not there."""
        run = self._runs.get((content.key, content.began_ms))
        if run is None:
            tags = {**content.tags, **more_tags}
            made = self._client.create_run(
                self._experiment_id, start_time=content.began_ms, tags=tags, run_name=content.name
            )
            run = self._runs[content.key, content.began_ms] = _Run(made.info.run_id, tags, points=set())
        return run

    def _deliver(
        self,
        content: RunContent,
        more_tags: Mapping[str, str],
        write_files: Callable[[Path], None],
        stopped: bool,
        weights: Path | None = None,
    ) -> None:
        """Bring one run up to date: params, tags, metrics; and when all is there, files, model, status and end."""
        from mlflow.entities import Metric, Param, RunTag

        run = self._ensure(content, more_tags)
        tags = {**content.tags, **more_tags}
        if content.key == "study":
            # Of a run that grows, what a person reads first grows too.
            tags |= _new_note(run, content)
        new_tags = {key: value for key, value in tags.items() if run.tags.get(key) != value}
        delivered = content.digest if content.is_complete else ""
        if content.is_complete and run.tags.get(DELIVERED) == delivered and not new_tags:
            return
        new_params = {key: value for key, value in content.params.items() if key not in run.params}
        for items in _chunks(list(new_params.items()), MAX_PARAMS):
            self._client.log_batch(run.id, params=[Param(key, value) for key, value in items])
            run.params.update(items)
        if new_tags:
            self._client.log_batch(run.id, tags=[RunTag(key, value) for key, value in new_tags.items()])
            run.tags.update(new_tags)
        there = self._points(run)
        steps = {place[:2] for place in there}
        new_points = [
            point
            for point in content.points
            # An epoch that was done again has another time, and is still the same epoch.
            if (_place(point) not in there if point.is_revision else (point.key, point.step) not in steps)
        ]
        for points in _chunks(new_points, MAX_METRICS):
            metrics = [Metric(point.key, point.value, point.time_ms, point.step) for point in points]
            self._client.log_batch(run.id, metrics=metrics)
            there.update(map(_place, points))
        if content.is_complete or (content.key == "study" and not run.has_files):
            self._log_files(run, write_files)
        if content.is_complete and weights is not None and weights.is_file():
            self._register(run, content, weights)
        self._set_status(run, content, stopped)
        if content.is_complete:
            last_tags = {DELIVERED: delivered, **_new_note(run, content)}
            self._client.log_batch(run.id, tags=[RunTag(key, value) for key, value in last_tags.items()])
            run.tags.update(last_tags)

    def _points(self, run: _Run) -> set[tuple[str, int, int]]:
        """Key, step and time of every metric of the run."""
        if run.points is None:
            run.points = {(metric.key, metric.step, metric.timestamp) for metric in self._history(run)}
        return run.points

    def _history(self, run: _Run) -> Iterator[Any]:
        """Every metric of the run as it is in MLflow."""
        for key in run.metric_keys:
            yield from self._client.get_metric_history(run.id, key)

    def _set_status(self, run: _Run, content: RunContent, stopped: bool) -> None:
        if content.ended_ms is not None:
            if (run.status, run.ended_ms) != (content.status, content.ended_ms):
                self._client.set_terminated(run.id, content.status, end_time=content.ended_ms)
                run.status, run.ended_ms = content.status, content.ended_ms
            return
        status = "KILLED" if stopped else content.status
        if run.status != status:
            self._client.update_run(run.id, status=status)
            run.status = status

    def _log_files(self, run: _Run, write_files: Callable[[Path], None]) -> None:
        with self._folder() as folder:
            write_files(folder)
            self._client.log_artifacts(run.id, str(folder))
        run.has_files = True

    def _register(self, run: _Run, content: RunContent, weights: Path) -> None:
        """The model of a final as a version of the registered model that is named like the study."""
        from hpsearch import serving

        with self._folder() as folder:
            serving.register(
                self._client,
                weights,
                folder / serving.MODEL,
                experiment_id=self._experiment_id,
                run_id=run.id,
                name=self.record.name,
                tags={key: content.tags[key] for key in ("hpsearch.study", "hpsearch.final")},
                description=f"{content.note}\n\nFor research; not a medical device.",
            )

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        """An empty folder of the study's own: what a killed process leaves there is known and goes with the next."""
        folder = self.record.paths.tracking
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _contradicts(self, run: _Run, content: RunContent) -> bool:
        """Whether the run holds something of ours that the record does not."""
        if any(run.params.get(key, value) != value for key, value in content.params.items()):
            return True
        wanted = {_place(point): point.value for point in content.points}
        seen: set[tuple[str, int, int]] = set()
        for metric in self._history(run):
            place = metric.key, metric.step, metric.timestamp
            if runs.is_metric(metric.key):
                if place in seen or wanted.get(place) != metric.value:
                    return True
                seen.add(place)
        run.points = seen
        return False


def _place(point: Point) -> tuple[str, int, int]:
    """Return what tells the points of a run apart: sent twice it is still one."""
    return point.key, point.step, point.time_ms


def _new_note(run: _Run, content: RunContent) -> dict[str, str]:
    """Return the tags that give a run its description, empty where it has that or a person's own."""
    there = run.tags.get(runs.NOTE)
    if not content.note or there == content.note:
        return {}
    if there is not None and run.tags.get(runs.OUR_NOTE) != digest(there):
        return {}
    return {runs.NOTE: content.note, runs.OUR_NOTE: digest(content.note)}


def _experiment_tags(record: StudyRecord, experiment_id: str, began_ms: int) -> dict[str, str]:
    """What makes MLflow's own page of the study readable: a note, and a view of the runs with the winner first."""
    metric = record.config.study.metric
    columns = [f"tags.`{runs.RANK}`", f"tags.`{runs.WINNER}`"]
    columns += [
        f"metrics.`{name}`" for name in (f"cv/{metric}_mean", f"cv/{metric}_std", f"test/{metric}", "cost/seconds")
    ]
    columns += [f"params.`{name}`" for name, _ in record.config.search]
    columns += ["tags.`outcome`"]
    # By the mean a trial that was not fitted again, or a run of second fits, may come before the winner.
    state = {"orderByKey": f"tags.`{runs.RANK}`", "orderByAsc": True, "selectedColumns": columns}
    view = {
        "name": "Trials, best first",
        "createdAt": began_ms,
        "updatedAt": began_ms,
        "state": json.dumps(state),
    }
    page = f"#/experiments/{experiment_id}/runs?viewStateShareKey={VIEW}&workflowType=machine_learning"
    note = f"A search by `hpsearch`: the parent run is the study, each child a trial. [{view['name']}]({page})"
    return {
        "mlflow.experimentKind": "custom_model_development",
        "mlflow.note.content": note,
        f"mlflow.sharedViewState.{VIEW}": json.dumps(view),
    }


def _import_mlflow() -> Any:
    """MLflow, told to be quiet if this process has not loaded it before."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow

    # It logs a traceback for every error that it raises, and each step of making a database.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    return mlflow


def _refuse_file_store(mlruns: Path) -> None:
    """TrackingError if `mlruns` is a file store of an earlier MLflow, which would keep `mlflow ui` from starting."""
    old = [path for path in mlruns.glob("*/meta.yaml") if path.parent.name.isdigit()]
    if old:
        raise TrackingError(
            f"{mlruns} holds runs as MLflow kept them before 3.13, and beside them `mlflow ui` does not start. Take "
            "them over with `mlflow migrate-filestore "
            f"--source {mlruns} --target sqlite:///{mlruns.parent}/mlflow.db` "
            f"and move {mlruns} away, or give another folder with --out"
        )


def _artifact_root(project: ProjectPaths, name: str) -> str:
    return (project.mlruns / name).as_uri()


def _project_database(project: ProjectPaths) -> str:
    """The address of the project's own database, which is made if it is not there: once, and whole or not at all."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    path, root = project.mlflow_db, project.mlruns.as_uri()
    uri = _sqlite_uri(path)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            for left in path.parent.glob(f".{path.name}.*.tmp*"):
                left.unlink(missing_ok=True)
            if not path.is_file():
                with atomic_write(path) as temporary:
                    SqlAlchemyStore(_sqlite_uri(temporary), root).engine.dispose()
        # MLflow keeps connections for as long as the process lives: those to a deleted database would swallow all.
        SqlAlchemyStore(uri, root).engine.dispose()
    return uri


def _sqlite_uri(path: Path) -> str:
    """SQLAlchemy's address of a file. TrackingError where it would take it for that of another."""
    from sqlalchemy.engine import make_url

    uri = f"sqlite:///{path}"
    # Quoted names are no way out: MLflow makes a folder of the quoted name.
    if make_url(uri).database != str(path):
        raise TrackingError(
            f"MLflow's database cannot lie in {path.parent}: its address would be misread for the '?' or '%' in it; "
            "choose another folder with --out"
        )
    return uri


def _repair_moved(project: ProjectPaths, name: str) -> None:
    """Let the runs of a project that was moved or copied keep their files where the project is now.

    MLflow stores absolute addresses and has no request that changes them. Without this a copied project would write
    into the original.
    """
    here = _artifact_root(project, name)
    with closing(sqlite3.connect(project.mlflow_db, timeout=20)) as database, database:
        found = database.execute(
            "SELECT experiment_id, artifact_location FROM experiments WHERE name = ?", (name,)
        ).fetchone()
        if found is None or found[1] == here or not str(found[1]).endswith(f"/mlruns/{quote(name)}"):
            return
        number, before = found
        database.execute("UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?", (here, number))
        database.execute(
            "UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?) "
            "WHERE experiment_id = ? AND substr(artifact_uri, 1, ?) = ?",
            (here, len(before) + 1, number, len(before), before),
        )
        for table, column in MODEL_ADDRESSES:
            database.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                (here, len(before) + 1, len(before) + 1, f"{before}/"),
            )
    logger.info("the project was moved: the files of study %r are now looked for in %s", name, project.mlruns)


def _is_environment(error: Exception) -> bool:
    """Whether an error is one of MLflow, its database, the network or the disk, and not a fault in hpsearch."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return isinstance(error, MlflowException | SQLAlchemyError | sqlite3.Error | OSError | ImportError)


def _is_away(error: Exception) -> bool:
    """Whether MLflow as a whole cannot be reached, so that trying the next run is of no use."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    refusals = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "BAD_REQUEST")
    if isinstance(error, MlflowException):
        return error.error_code not in refusals
    return isinstance(error, SQLAlchemyError)


def _pages(search: Callable[..., Any]) -> Iterator[Any]:
    """Everything that a paged search finds."""
    token = None
    while True:
        page = search(page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _chunks(items: Sequence[T], n: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), n):
        yield items[start : start + n]
