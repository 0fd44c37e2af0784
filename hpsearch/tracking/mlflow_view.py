"""Bring MLflow up to date with the record of a study; the only writer to MLflow.

MLflow may lag behind the record. An update adds what is missing, so an outage costs only delay, and a deleted
database is restored. Nothing is logged twice: runs are identified by their tags and start, metrics by key and step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hpsearch.errors import TrackingError, redact
from hpsearch.paths import ProjectPaths, StudyPaths
from hpsearch.store.record import StudyRecord
from hpsearch.store.trials import TrialRecord
from hpsearch.tracking import run_files, runs
from hpsearch.tracking.experiment import Experiment, Rebuilt, find_study_run, temporary_folder
from hpsearch.tracking.mlflow_server import MlflowServer, is_external, is_outage


class MlflowTracker(MlflowServer):
    """Tracks studies in MLflow: one experiment per study, with a run for the study and child runs below it."""

    def view(self, study: StudyPaths) -> MlflowView:
        """Return the view of a study. Does not connect yet."""
        return MlflowView(self, study)


def make_tracker(project: ProjectPaths, uri: str | None = None) -> MlflowTracker | None:
    """Return the tracker for the option `--tracking`: a tracking URI of MLflow, or `none` for no tracking.

    Without `uri`, the environment variable MLFLOW_TRACKING_URI counts. Without that, runs go to `mlflow.db` in the
    project folder, which a plain `mlflow ui` shows. Connects to nothing yet.

    Raises TrackingError for a file store, which MLflow no longer writes.
    """
    return None if uri == "none" else MlflowTracker(project, uri)


class MlflowView:
    """One study in MLflow."""

    name = "MLflow"

    def __init__(self, server: MlflowServer, study: StudyPaths) -> None:
        self._server = server
        self._study = study
        self._experiment: Experiment | None = None
        self._ended_trials: dict[int, TrialRecord] = {}
        self._up_to_date: set[str] = set()
        """Keys of the child runs that lacked nothing at the last update."""
        self._has_failed = False

    def update(self, *, is_last: bool = False) -> None:
        """Log everything that is on record and missing in MLflow. Restores a deleted experiment or run.

        With `is_last`, open runs get the status KILLED. An error that concerns one run is raised after the other runs
        were logged.
        """
        if is_last and self._has_failed:
            # A request that timed out may have been executed later: read again to find runs that exist twice.
            self._experiment = None
        with self._tracking_errors():
            self._update(StudyRecord.open(self._study), is_last)

    def n_behind(self) -> int:
        """Return the number of trials, refits and finals on record that MLflow may lack."""
        return len(runs.run_keys(self._study) - self._up_to_date)

    def rebuild(self) -> Rebuilt:
        """Make MLflow equal to the record, also after the project folder was moved.

        Runs that agree with the record keep their ids; runs that contradict it are created anew; runs of trials that
        are not on record are moved to MLflow's trash (`mlflow gc` empties it). Nothing else may write meanwhile.
        """
        self._experiment = None
        rebuilt = Rebuilt(0, 0, 0)
        with self._tracking_errors():
            record = StudyRecord.open(self._study)
            if trials := self._trials(record):
                contents = [source.read() for source in runs.run_sources(record, trials, record.standing(trials))]
                rebuilt = self._open_experiment(record, contents[0].began_ms).reconcile(contents)
            self._update(record, is_last=True)
        return rebuilt

    def log_report(self) -> None:
        """Add the report and its figures to the files of the study's run. The study may be running.

        Raises TrackingError if that is impossible now.
        """
        if not self._server.has_data:
            raise TrackingError(f"nothing is tracked in {self._server.project.root} yet")
        with self._tracking_errors():
            client, _ = self._server.connect(self._study.name)
            run_id = find_study_run(client, self._study.name)
            if run_id is None:
                raise TrackingError(f"study {self._study.name!r} is not in MLflow yet")
            with temporary_folder(self._study.tracking) as folder:
                run_files.write_report_files(self._study, folder)
                client.log_artifacts(run_id, str(folder))

    def _update(self, record: StudyRecord, is_last: bool) -> None:
        trials = self._trials(record)
        if not trials:
            return
        standing = record.standing(trials)
        study, *children = runs.run_sources(record, trials, standing)
        content = study.read()
        experiment = self._open_experiment(record, content.began_ms)
        parent_tag = {"mlflow.parentRunId": experiment.ensure(content, {}).id}
        failures: list[Exception] = []
        for source in children:
            if experiment.is_complete(source):
                continue
            self._up_to_date.discard(source.key)
            try:
                experiment.deliver(source, source.read(), parent_tag, is_last=is_last)
            except Exception as error:
                if is_outage(error):
                    raise
                # A damaged trial or a run that MLflow refuses must not keep the other runs back.
                failures.append(error)
            else:
                self._up_to_date.add(source.key)
        experiment.show_ranking(standing)
        experiment.deliver(study, content, {}, is_last=is_last)
        if not is_last:
            run_files.import_figures()
        if failures:
            raise failures[0]

    def _open_experiment(self, record: StudyRecord, began_ms: int) -> Experiment:
        """Return the experiment as read before; read it if it was discarded."""
        if self._experiment is None:
            client, artifact_root = self._server.connect(record.name)
            self._experiment = Experiment(client, record, began_ms, artifact_root)
        return self._experiment

    def _trials(self, record: StudyRecord) -> list[TrialRecord]:
        """Return all trials on record. Trials that have ended are read once."""
        trials = [self._ended_trials.get(number) or record.trial(number) for number in record.trial_numbers()]
        self._ended_trials |= {trial.number: trial for trial in trials if trial.ended_at is not None}
        return trials

    @contextmanager
    def _tracking_errors(self) -> Iterator[None]:
        """Turn errors of MLflow, its database and the network into a TrackingError without credentials."""
        try:
            yield
        except Exception as error:
            # The server may have executed a request whose answer was lost, so read everything again next time.
            self._experiment = None
            self._has_failed = True
            if not is_external(error):
                raise
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise TrackingError(f"{self._server.uri}: {redact(lines[0])[:300]}") from error
