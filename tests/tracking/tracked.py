"""Reads back what MLflow holds, in a form that can be compared."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
import sqlite3
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from hpsearch.paths import ProjectPaths
from hpsearch.tracking import MlflowTracker, MlflowView
from tests.recorded import FakeStudy


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as MLflow has it, without what differs between two runs that are the same: ids."""

    params: dict[str, str]
    metrics: dict[str, list[tuple[int, float, int]]]
    """Key to (step, value, time in ms), in order."""
    tags: dict[str, str]
    status: str
    began_ms: int
    ended_ms: int | None
    parent: str | None
    """Name of the parent."""
    files: dict[str, bytes]

    @functools.cached_property
    def latest(self) -> dict[str, float]:
        return {key: values[-1][1] for key, values in self.metrics.items()}


def make_study(project: Path, empty_mlflow_db: Path, **options: Any) -> FakeStudy:
    """Return an empty study in a new project that has a database."""
    project.mkdir(parents=True)
    shutil.copy(empty_mlflow_db, project / "mlflow.db")
    return FakeStudy(project, **options)


def view_of(study: FakeStudy, uri: str | None = None) -> MlflowView:
    """Return a new view of the study, as a new process has it."""
    return MlflowTracker(study.project, uri).view(study.record.paths)


def deliver(study: FakeStudy, *, is_last: bool = False) -> dict[str, Run]:
    """Update MLflow as a new process would; return what it has then."""
    view_of(study).update(is_last=is_last)
    return read(study.project)


def client(project: ProjectPaths) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{project.mlflow_db}")


def read(project: ProjectPaths, experiment: str = "fake", uri: str | None = None) -> dict[str, Run]:
    """Every active run of an experiment by its name; no two may share one."""
    from mlflow import MlflowClient

    reader = client(project) if uri is None else MlflowClient(tracking_uri=uri)
    found = reader.get_experiment_by_name(experiment)
    runs = reader.search_runs([found.experiment_id]) if found is not None else []
    names = {run.info.run_id: run.info.run_name for run in runs}
    assert len(set(names.values())) == len(names)
    result = {}
    for run in runs:
        tags = dict(run.data.tags)
        parent = tags.pop("mlflow.parentRunId", None)
        history = {key: reader.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
        result[run.info.run_name] = Run(
            params=run.data.params,
            metrics={key: sorted((m.step, m.value, m.timestamp) for m in each) for key, each in history.items()},
            tags=tags,
            status=run.info.status,
            began_ms=run.info.start_time,
            ended_ms=run.info.end_time,
            parent=None if parent is None else names[parent],
            files=read_files(reader, run.info),
        )
    return result


def read_files(reader: Any, info: Any) -> dict[str, bytes]:
    """Artifacts by their path."""
    if info.artifact_uri.startswith("file:"):
        # As `mlflow` would, but at once.
        folder = Path(unquote(urlparse(info.artifact_uri).path))
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    items = reader.list_artifacts(info.run_id)
    return {item.path: Path(reader.download_artifacts(info.run_id, item.path)).read_bytes() for item in items}


def rows_in(project: ProjectPaths) -> dict[str, int]:
    """Rows of every table of the database."""
    with contextlib.closing(sqlite3.connect(project.mlflow_db)) as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {name: database.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0] for name in tables}


def all_runs(project: ProjectPaths) -> list[Any]:
    reader = client(project)
    return list(reader.search_runs([reader.get_experiment_by_name("fake").experiment_id]))
