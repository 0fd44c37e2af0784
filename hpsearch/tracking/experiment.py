"""Write the runs of one study to its MLflow experiment: batched, and nothing twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hpsearch.config import StudyConfig
from hpsearch.store.record import StudyRecord
from hpsearch.store.trials import Standing
from hpsearch.tracking import notes
from hpsearch.tracking.metrics import is_metric
from hpsearch.tracking.runs import RANK, WINNER, RunContent, RunSource, key_of, people_tags, ranking_tags

MAX_METRICS, MAX_PARAMS = 1000, 100
"""Limits of MLflow for one request."""
DELIVERED = "hpsearch.delivered"
"""Tag of a complete run: the digest of its content."""
SAVED_VIEW = "hpsearch"
"""Name of the saved view of the runs table in addresses: `#/experiments/ID/runs?viewStateShareKey=hpsearch`."""


@dataclass
class Run:
    """A run as it is in MLflow."""

    id: str
    tags: dict[str, str]
    params: dict[str, str]
    metric_keys: tuple[str, ...]
    status: str
    ended_ms: int | None
    places: set[tuple[str, int, int]] | None = None
    """Key, step and time of every point of a metric; None: not read yet."""
    has_files: bool = False
    """Whether its files were written since the experiment was read."""

    @classmethod
    def of(cls, run: Any) -> Run:
        """Convert a run that MLflow returned."""
        data, info = run.data, run.info
        return cls(info.run_id, dict(data.tags), dict(data.params), tuple(data.metrics), info.status, info.end_time)


@dataclass(frozen=True)
class Rebuilt:
    """Result of comparing MLflow with the record."""

    n_kept: int
    """Runs that agree with the record; anything missing was added."""
    n_replaced: int
    """Runs that contradicted the record and were created anew, with the tags that people had added."""
    n_removed: int
    """Runs of trials that are not on record."""


class Experiment:
    """The experiment of a study. It is read once, then kept in memory, and discarded after any failed request."""

    def __init__(self, client: Any, record: StudyRecord, began_ms: int, artifact_root: str | None) -> None:
        """Open the experiment and read its runs. Creates a missing experiment and restores a deleted one."""
        self._client = client
        self._folder = record.paths.tracking
        self._id = self._open(record, began_ms, artifact_root)
        self._runs = self._read(record.name)
        self._current: dict[str, Run] = {}
        """Run of each key, without those of an earlier study of the same name."""
        self._complete: dict[str, object] = {}
        """Key of each run that is complete in MLflow, to the version of its source."""
        self._ranking: Standing | None = None

    def _open(self, record: StudyRecord, began_ms: int, artifact_root: str | None) -> str:
        found = self._client.get_experiment_by_name(record.name)
        if found is None:
            number, tags = str(self._client.create_experiment(record.name, artifact_location=artifact_root)), {}
        else:
            number, tags = str(found.experiment_id), found.tags
            if found.lifecycle_stage == "deleted":
                self._client.restore_experiment(number)
        for key, value in _experiment_tags(record.config, number, began_ms).items():
            # Keep what people have changed.
            if key not in tags:
                self._client.set_experiment_tag(number, key, value)
        return number

    def _read(self, study: str) -> dict[tuple[str, int], Run]:
        found: dict[tuple[str, int], list[Any]] = {}
        for run in pages(self._client, self._id):
            if (key := key_of(run.data.tags)) and run.data.tags["hpsearch.study"] == study:
                found.setdefault((key, run.info.start_time), []).append(run)
        for same in found.values():
            # A run exists twice if the server created it but its answer was lost.
            same.sort(key=lambda run: (-len(run.data.metrics), -len(run.data.params), run.info.run_id))
            for run in same[1:]:
                self._client.delete_run(run.info.run_id)
        return {identity: Run.of(same[0]) for identity, same in found.items()}

    def ensure(self, content: RunContent, more_tags: Mapping[str, str]) -> Run:
        """Return the run with that key and start; create it if it is missing."""
        identity, tags = (content.key, content.began_ms), {**content.tags, **more_tags}
        if identity not in self._runs:
            created = self._client.create_run(self._id, content.began_ms, tags, content.name)
            self._runs[identity] = Run.of(created)
        self._current[content.key] = self._runs[identity]
        return self._runs[identity]

    def is_complete(self, source: RunSource) -> bool:
        """Return whether a run is complete in MLflow and its source has not changed since."""
        return source.key in self._complete and self._complete[source.key] == source.version

    def deliver(self, source: RunSource, content: RunContent, more_tags: Mapping[str, str], *, is_last: bool) -> None:
        """Bring one run up to date: params, tags and metrics first; files, status and digest once it is complete."""
        from mlflow.entities import Metric, Param

        run = self.ensure(content, more_tags)
        tags = {**content.tags, **more_tags}
        if source.key == "study":
            # The description of the study changes while it runs.
            tags |= notes.new_note_tags(run.tags, content.note)
        is_delivered = content.is_complete and run.tags.get(DELIVERED) == content.digest
        if not (is_delivered and tags.items() <= run.tags.items()):
            params = {key: value for key, value in content.params.items() if key not in run.params}
            self._log(run, "params", [Param(key, value) for key, value in params.items()], MAX_PARAMS)
            run.params |= params
            self._tag(run, tags)
            points = self._new_points(run, content)
            metrics = [Metric(point.key, point.value, point.time_ms, point.step) for point in points]
            self._log(run, "metrics", metrics, MAX_METRICS)
            if content.is_complete or (source.key == "study" and not run.has_files):
                self._log_files(run, source, content)
            self._set_status(run, content, is_last)
        if content.is_complete:
            self._tag(run, {DELIVERED: content.digest, **notes.new_note_tags(run.tags, content.note)})
            self._complete[source.key] = source.version

    def _log(self, run: Run, kind: str, entities: Sequence[Any], limit: int) -> None:
        for start in range(0, len(entities), limit):
            self._client.log_batch(run.id, **{kind: entities[start : start + limit]})

    def _tag(self, run: Run, tags: Mapping[str, str]) -> None:
        """Set those of the tags that the run does not have yet."""
        from mlflow.entities import RunTag

        new = [RunTag(key, value) for key, value in tags.items() if run.tags.get(key) != value]
        self._log(run, "tags", new, MAX_PARAMS)
        run.tags |= tags

    def _new_points(self, run: Run, content: RunContent) -> list[Any]:
        """Return the points that the run lacks, and remember them as logged."""
        if run.places is None:
            run.places = {place for place, _ in self._history(run)}
        steps = {place[:2] for place in run.places}
        # A repeated epoch has a different time but is the same epoch; a revision has a different time on purpose.
        new = [
            point
            for point in content.points
            if (point.place not in run.places if point.is_revision else point.place[:2] not in steps)
        ]
        run.places.update(point.place for point in new)
        return new

    def _log_files(self, run: Run, source: RunSource, content: RunContent) -> None:
        """Upload the files of a run; register the model of a final."""
        with temporary_folder(self._folder) as folder:
            source.write_files(folder)
            self._client.log_artifacts(run.id, str(folder))
        run.has_files = True
        if content.is_complete and source.weights is not None and source.weights.is_file():
            # `pack` runs this module as a program, so no other module imports it at its start.
            from hpsearch.tracking import mlflow_model

            with temporary_folder(self._folder) as folder:
                mlflow_model.register(self._client, source.weights, folder, self._id, run.id, content)

    def _set_status(self, run: Run, content: RunContent, is_last: bool) -> None:
        status = "KILLED" if is_last and not content.is_complete else content.status
        if (run.status, run.ended_ms) == (status, content.ended_ms):
            return
        if content.is_complete:
            self._client.set_terminated(run.id, status, end_time=content.ended_ms)
        else:
            self._client.update_run(run.id, status=status)
        run.status, run.ended_ms = status, content.ended_ms

    def show_ranking(self, standing: Standing) -> None:
        """Tag every trial that can win with its rank, and the winner alone as winner."""
        if standing == self._ranking:
            return
        tags_of = ranking_tags(standing)
        shown = [(run, tags_of[key]) for key, run in self._current.items() if key in tags_of]
        winners = [run.id for run, tags in shown if WINNER in tags]
        for found in pages(self._client, self._id, f"tags.{WINNER} = 'true'"):
            if found.info.run_id not in winners:
                self._client.delete_tag(found.info.run_id, WINNER)
        for run, tags in shown:
            if WINNER not in tags:
                run.tags.pop(WINNER, None)
            self._tag(run, tags)
        self._ranking = standing

    def reconcile(self, contents: Iterable[RunContent]) -> Rebuilt:
        """Delete runs that contradict the record or are not in it, and create those that are in it anew.

        Runs that are kept lose their digest in memory, so that the next delivery adds what they lack.
        """
        wanted = {(content.key, content.began_ms): content for content in contents}
        n_kept = n_replaced = n_removed = 0
        for identity, run in list(self._runs.items()):
            content = wanted.get(identity)
            if content is not None and not self._contradicts(run, content):
                run.tags.pop(DELIVERED, None)
                n_kept += 1
                continue
            self._client.delete_run(run.id)
            # The new run registers its model again.
            for version in self._client.search_model_versions(f"run_id = '{run.id}'"):
                self._client.delete_model_version(version.name, version.version)
            del self._runs[identity]
            n_removed += content is None
            if content is not None:
                self.ensure(content, people_tags(run.tags))
                n_replaced += 1
        return Rebuilt(n_kept, n_replaced, n_removed)

    def _contradicts(self, run: Run, content: RunContent) -> bool:
        """Return whether a param or metric that hpsearch wrote differs from the record."""
        if any(run.params.get(key, value) != value for key, value in content.params.items()):
            return True
        points = [(place, value) for place, value in self._history(run) if is_metric(place[0])]
        run.places = {place for place, _ in points}
        return len(run.places) < len(points) or not {(p.place, p.value) for p in content.points}.issuperset(points)

    def _history(self, run: Run) -> Iterator[tuple[tuple[str, int, int], float]]:
        """Return key, step and time, and value of every point of the run's metrics."""
        for key in run.metric_keys:
            for metric in self._client.get_metric_history(run.id, key):
                yield (metric.key, metric.step, metric.timestamp), metric.value


def find_study_run(client: Any, study: str) -> str | None:
    """Return the id of the latest run of the study itself; None if MLflow has none."""
    experiment = client.get_experiment_by_name(study)
    runs = pages(client, experiment.experiment_id) if experiment is not None else ()
    parents = [run.info for run in runs if key_of(run.data.tags) == "study"]
    return max(parents, key=lambda info: int(info.start_time)).run_id if parents else None


@contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """Provide an empty folder and delete it afterwards. A fixed path, so leftovers of a killed process go too."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def pages(client: Any, experiment_id: str, filter_string: str = "") -> Iterator[Any]:
    """Return all runs of an experiment that match the filter."""
    token, search = None, partial(client.search_runs, [experiment_id], filter_string, max_results=1000)
    while True:
        page = search(page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _experiment_tags(config: StudyConfig, experiment_id: str, began_ms: int) -> dict[str, str]:
    """Return the tags that make MLflow's page of the study readable: a description and a saved view of the runs."""
    metric, name = config.study.metric, "Trials, best first"
    metrics = (f"cv/{metric}_mean", f"cv/{metric}_std", f"test/{metric}", "cost/seconds")
    columns = [f"tags.`{RANK}`", f"tags.`{WINNER}`", *(f"metrics.`{key}`" for key in metrics)]
    columns += [*(f"params.`{key}`" for key, _ in config.search), "tags.`outcome`"]
    # Sorted by the mean, a trial that was not refitted or a refit could come before the winner.
    state = json.dumps({"orderByKey": f"tags.`{RANK}`", "orderByAsc": True, "selectedColumns": columns})
    page = f"#/experiments/{experiment_id}/runs?viewStateShareKey={SAVED_VIEW}&workflowType=machine_learning"
    return {
        "mlflow.experimentKind": "custom_model_development",
        notes.NOTE: f"A search by `hpsearch`: the parent run is the study, each child run a trial. [{name}]({page})",
        f"mlflow.sharedViewState.{SAVED_VIEW}": json.dumps(
            {"name": name, "createdAt": began_ms, "updatedAt": began_ms, "state": state}
        ),
    }
