"""Update MLflow from the folder of a study. Only this module and `mlflow_model` write to MLflow.

The runs in MLflow are a view: a copy of the study's data that may lag behind the study folder. An update adds all
missing data, so it also catches up after an outage and restores a deleted database. Nothing is logged twice: runs are
identified by their tags and start time, and metrics by key, step and time. The kinds of runs are described in `runs`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpsearch.config import StudyConfig
from hpsearch.errors import TrackingError, redact
from hpsearch.paths import ProjectPaths, StudyPaths
from hpsearch.store.record import StudyRecord
from hpsearch.store.trials import Standing
from hpsearch.tracking import run_files, runs
from hpsearch.tracking.mlflow_server import MlflowServer, is_external, is_outage
from hpsearch.tracking.runs import RANK, WINNER, RunContent, RunSource, key_of

MAX_METRICS, MAX_PARAMS, MAX_RUNS = 1000, 100, 50_000
"""Maximum numbers of metrics, params and runs in one MLflow request."""
DELIVERED = "hpsearch.delivered"
"""Tag of a run that was logged completely. Its value is the digest of the run's content."""
SAVED_VIEW = "hpsearch"
"""Name of the saved view of the runs table, as used in `#/experiments/ID/runs?viewStateShareKey=hpsearch`."""


class MlflowTracker(MlflowServer):
    """Tracker of studies in MLflow. Each study is an experiment with one parent run and its child runs."""

    def view(self, study: StudyPaths) -> MlflowView:
        """Return the view that copies a study to MLflow. Does not connect yet."""
        return MlflowView(self, study)


def make_tracker(project: ProjectPaths, uri: str | None = None) -> MlflowTracker | None:
    """Return the tracker for a value of the option `--tracking`: an MLflow tracking URI, or `none` for no tracking.

    `uri` defaults to the environment variable MLFLOW_TRACKING_URI. If this is not set either, runs are logged to
    `mlflow.db` in the project folder, which `mlflow ui` shows without options. Does not connect yet.

    Raises TrackingError for a file store, which MLflow no longer supports.
    """
    return None if uri == "none" else MlflowTracker(project, uri)


class MlflowView:
    """Copy of a study in MLflow that is updated from the study folder."""

    name = "MLflow"

    def __init__(self, server: MlflowServer, study: StudyPaths) -> None:
        self._server = server
        self._study = study
        self._experiment: Experiment | None = None
        self._up_to_date: set[str] = set()
        """Keys of the child runs that were up to date after the last update."""
        self._has_failed = False

    def update(self, *, is_last: bool = False) -> None:
        """Log all data of the study that is missing from MLflow. Deleted experiments and runs are restored.

        With `is_last`, no process works on the study any more, and unfinished runs get the status KILLED. An error
        that affects only one run is raised after the other runs were logged.
        """
        if is_last and self._has_failed:
            # The server may have executed a request after its timeout, so read the runs again to find duplicates.
            self._experiment = None
        with self._tracking_errors():
            self._update(StudyRecord.open(self._study), is_last)

    def n_behind(self) -> int:
        """Return the number of trials, refits and `final` runs that may not be up to date in MLflow."""
        return len(runs.run_keys(self._study) - self._up_to_date)

    def rebuild(self) -> tuple[int, int]:
        """Delete all runs of the study in MLflow, and log them again. This also works after the project was moved.

        Registered versions of the models are also deleted and created again. Descriptions, tags, metrics and files
        that users added to the runs are lost. MLflow keeps deleted runs until `mlflow gc` removes them. No other
        process may write to the experiment at the same time.

        Returns the number of deleted runs and the number of logged runs.
        """
        self._experiment = None
        with self._tracking_errors():
            record = StudyRecord.open(self._study)
            trials = record.trials()
            if not trials:
                return 0, 0
            experiment = self._open_experiment(record, runs.began_ms(record, trials))
            n_deleted = experiment.delete_runs()
            self._update(record, is_last=True)
        return n_deleted, len(experiment.runs)

    def log_report(self) -> None:
        """Add the report and its figures to the artifacts of the study's run. The study may be running.

        Raises TrackingError if the study has no run yet, or if MLflow cannot be used.
        """
        name = self._study.name
        with self._tracking_errors():
            client, _ = self._server.connect(name)
            experiment = client.get_experiment_by_name(name)
            found = runs_of(client, experiment.experiment_id) if experiment is not None else ()
            latest = next((run for run in found if key_of(run.data.tags) == "study"), None)
            if latest is None:
                raise TrackingError(f"study {name!r} is not in MLflow yet")
            with temporary_folder(self._study.tracking) as folder:
                run_files.write_report_files(self._study, folder)
                client.log_artifacts(latest.info.run_id, str(folder))

    def _update(self, record: StudyRecord, is_last: bool) -> None:
        # Matplotlib takes half a second to import. Here this happens in the background, before the first trial ends.
        import hpsearch.report.figures  # noqa: F401

        trials = record.trials()
        if not trials:
            return
        standing = record.standing(trials)
        study, *children = runs.run_sources(record, trials, standing)
        content = study.read()
        experiment = self._open_experiment(record, content.began_ms)
        parent_tag = {"mlflow.parentRunId": experiment.ensure(content, {}).info.run_id}
        failures: list[Exception] = []
        for source in children:
            if experiment.complete.get(source.key, ()) == source.version:
                continue
            self._up_to_date.discard(source.key)
            try:
                experiment.deliver(source, source.read(), parent_tag, is_last=is_last)
            except Exception as error:
                if is_outage(error):
                    raise
                # A damaged trial or a rejected request must not prevent the logging of other runs.
                failures.append(error)
            else:
                self._up_to_date.add(source.key)
        experiment.show_ranking(standing)
        experiment.deliver(study, content, {}, is_last=is_last)
        if failures:
            raise failures[0]

    def _open_experiment(self, record: StudyRecord, began_ms: int) -> Experiment:
        """Return the experiment from memory. It is read from MLflow if it has not been read yet or was discarded."""
        if self._experiment is None:
            client, artifact_root = self._server.connect(record.name)
            self._experiment = Experiment(client, record, began_ms, artifact_root)
        return self._experiment

    @contextmanager
    def _tracking_errors(self) -> Iterator[None]:
        """Convert errors of MLflow, its database and the network to a TrackingError without credentials."""
        try:
            yield
        except Exception as error:
            # The server may have executed a request whose response was lost, so read everything again next time.
            self._experiment = None
            self._has_failed = True
            if not is_external(error):
                raise
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise TrackingError(f"{self._server.uri}: {redact(lines[0])[:300]}") from error


class Experiment:
    """The experiment of a study in MLflow. It is read once, kept in memory, and discarded after a failed request."""

    def __init__(self, client: Any, record: StudyRecord, began_ms: int, artifact_root: str | None) -> None:
        """Open the experiment and read its runs. Creates a missing experiment and restores a deleted one."""
        self._client = client
        self._folder = record.paths.tracking
        self._id = self._open(record, began_ms, artifact_root)
        self.runs = self._read(record.name)
        """Runs in MLflow by (key, start time), with their current tags and params."""
        self._points: dict[str, set[tuple[str, int, int]]] = {}
        """Maps a run id to the (key, step, time) of all logged points; filled when the points are first read."""
        self._current: dict[str, Any] = {}
        """Maps a key to the run of the current study. Runs of an earlier study with the same name are left out."""
        self.complete: dict[str, object] = {}
        """Maps the key of each run that is complete in MLflow to the version of its source."""

    def _open(self, record: StudyRecord, began_ms: int, artifact_root: str | None) -> str:
        found = self._client.get_experiment_by_name(record.name)
        if found is None:
            number, tags = str(self._client.create_experiment(record.name, artifact_location=artifact_root)), {}
        else:
            number, tags = str(found.experiment_id), found.tags
            if found.lifecycle_stage == "deleted":
                self._client.restore_experiment(number)
        for key, value in _experiment_tags(record.config, number, began_ms).items():
            # Keep tags that users have changed.
            if key not in tags:
                self._client.set_experiment_tag(number, key, value)
        return number

    def _read(self, study: str) -> dict[tuple[str, int], Any]:
        found: dict[tuple[str, int], Any] = {}
        # A run exists twice if the server created it but its response was lost. Keep the run with the most data.
        runs_found = runs_of(self._client, self._id)
        for run in sorted(
            runs_found, key=lambda run: (-len(run.data.metrics), -len(run.data.params), run.info.run_id)
        ):
            key = key_of(run.data.tags)
            if key is None or run.data.tags["hpsearch.study"] != study:
                continue
            if found.setdefault((key, run.info.start_time), run) is not run:
                self._client.delete_run(run.info.run_id)
        return found

    def ensure(self, content: RunContent, more_tags: Mapping[str, str]) -> Any:
        """Return the run with the key and start time of `content`. Create it with all tags if it is missing."""
        identity = (content.key, content.began_ms)
        if identity not in self.runs:
            tags = {**more_tags, **content.tags}
            self.runs[identity] = self._client.create_run(self._id, content.began_ms, tags, content.name)
        self._current[content.key] = self.runs[identity]
        return self.runs[identity]

    def deliver(self, source: RunSource, content: RunContent, more_tags: Mapping[str, str], *, is_last: bool) -> None:
        """Log what is missing from one run. Its status is set after params, tags, metrics and files, its digest last.

        Files are uploaded once the run is complete; those of the study are also uploaded at the start.
        `more_tags` are tags that are not part of `content`, such as the id of the parent run. With `is_last`, an
        unfinished run gets the status KILLED.
        """
        from mlflow.entities import Metric, Param

        run = self.ensure(content, more_tags)
        run_id, tags = run.info.run_id, {**content.tags, **more_tags}
        if source.key == "study":
            # The study's description changes while it runs. Other runs get theirs when they are complete.
            tags |= runs.new_note_tags(run.data.tags, content.note)
        is_delivered = content.is_complete and run.data.tags.get(DELIVERED) == content.digest
        if not (is_delivered and tags.items() <= run.data.tags.items()):
            params = {key: value for key, value in content.params.items() if key not in run.data.params}
            self._log(run, "params", [Param(key, value) for key, value in params.items()], MAX_PARAMS)
            run.data.params.update(params)
            self._tag(run, tags)
            is_first = run_id not in self._points
            points = self._new_points(run, content)
            metrics = [Metric(point.key, point.value, point.time_ms, point.step) for point in points]
            self._log(run, "metrics", metrics, MAX_METRICS)
            if content.is_complete or (source.key == "study" and is_first):
                self._log_files(run_id, source, content)
            if content.is_complete:
                self._client.set_terminated(run_id, content.status, end_time=content.ended_ms)
            else:
                self._client.update_run(run_id, status="KILLED" if is_last else content.status)
        if content.is_complete:
            self._tag(run, {DELIVERED: content.digest, **runs.new_note_tags(run.data.tags, content.note)})
            self.complete[source.key] = source.version

    def _log(self, run: Any, kind: str, entities: Sequence[Any], limit: int) -> None:
        for start in range(0, len(entities), limit):
            self._client.log_batch(run.info.run_id, **{kind: entities[start : start + limit]})

    def _tag(self, run: Any, tags: Mapping[str, str]) -> None:
        """Set the tags that are missing from the run or have another value there."""
        from mlflow.entities import RunTag

        new = [RunTag(key, value) for key, value in tags.items() if run.data.tags.get(key) != value]
        self._log(run, "tags", new, MAX_PARAMS)
        run.data.tags.update(tags)

    def _new_points(self, run: Any, content: RunContent) -> list[Any]:
        """Return the metric points that are missing from the run, and remember them as logged."""
        if run.info.run_id not in self._points:
            self._points[run.info.run_id] = {
                (metric.key, metric.step, metric.timestamp)
                for key in run.data.metrics
                for metric in self._client.get_metric_history(run.info.run_id, key)
            }
        places = self._points[run.info.run_id]
        # An epoch that was trained again after a restart has a new time, but its point must not be logged twice.
        # For any other metric, a point with a new time is a revised value.
        steps = {place[:2] for place in places if place[0].startswith(("fold", "seed"))}
        new = [point for point in content.points if not (point.place in places or point.place[:2] in steps)]
        places.update(point.place for point in new)
        return new

    def _log_files(self, run_id: str, source: RunSource, content: RunContent) -> None:
        """Upload the artifacts of a run, and register the model of a complete `final` run."""
        with temporary_folder(self._folder) as folder:
            source.write_files(folder)
            self._client.log_artifacts(run_id, str(folder))
            if content.is_complete and source.weights is not None and source.weights.is_file():
                # `pack` runs `python -m hpsearch.tracking.mlflow_model`. That process imports the package, and with
                # it this file, first. An import at the top of this file would therefore load mlflow_model twice.
                from hpsearch.tracking import mlflow_model

                mlflow_model.register(self._client, source.weights, folder, self._id, run_id, content)

    def show_ranking(self, standing: Standing) -> None:
        """Tag every trial that can win with its rank, and tag only the best one as winner."""
        winner = self._current.get(f"trial {standing.winner}")
        for run in self.runs.values():
            if WINNER in run.data.tags and run is not winner:
                self._client.delete_tag(run.info.run_id, WINNER)
                del run.data.tags[WINNER]
        for place, number in enumerate(standing.ranking, start=1):
            if (run := self._current.get(f"trial {number}")) is not None:
                self._tag(run, {RANK: f"{place:04d}", **({WINNER: "true"} if run is winner else {})})

    def delete_runs(self) -> int:
        """Delete all runs and the registered versions of their models. Return the number of runs."""
        n_runs = len(self.runs)
        for run in self.runs.values():
            for version in self._client.search_model_versions(f"run_id = '{run.info.run_id}'"):
                self._client.delete_model_version(version.name, version.version)
            self._client.delete_run(run.info.run_id)
        self.runs.clear()
        return n_runs


@contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """Provide an empty folder and delete it afterwards.

    The path is fixed, so files that a killed process left behind are deleted by the next use.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def runs_of(client: Any, experiment_id: str) -> Sequence[Any]:
    """Return all runs of an experiment, latest first."""
    return client.search_runs([experiment_id], max_results=MAX_RUNS)  # type: ignore[no-any-return]


def _experiment_tags(config: StudyConfig, experiment_id: str, began_ms: int) -> dict[str, str]:
    """Return the tags for the experiment page in MLflow: a description and a saved view of the runs table."""
    metric, name = config.study.metric, "Trials, best first"
    metrics = (f"cv/{metric}_mean", f"cv/{metric}_std", f"test/{metric}", "cost/seconds")
    columns = [f"tags.`{RANK}`", f"tags.`{WINNER}`", *(f"metrics.`{key}`" for key in metrics)]
    columns += [*(f"params.`{key}`" for key in config.search), "tags.`outcome`"]
    # Sort by rank. If sorted by the mean, a refit, or a trial without a refit, could come before the winner.
    state = json.dumps({"orderByKey": f"tags.`{RANK}`", "orderByAsc": True, "selectedColumns": columns})
    page = f"#/experiments/{experiment_id}/runs?viewStateShareKey={SAVED_VIEW}&workflowType=machine_learning"
    view = {"name": name, "createdAt": began_ms, "updatedAt": began_ms, "state": state}
    return {
        "mlflow.experimentKind": "custom_model_development",
        runs.NOTE: f"A search by `hpsearch`: the parent run is the study, each child run a trial. [{name}]({page})",
        f"mlflow.sharedViewState.{SAVED_VIEW}": json.dumps(view),
    }
