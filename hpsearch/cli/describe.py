"""Describe settings, plans and next steps as text for the terminal."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import hpsearch
from hpsearch.config import StudyConfig
from hpsearch.errors import redact
from hpsearch.paths import ProjectPaths, command_line
from hpsearch.report.formats import count, duration, setting

if TYPE_CHECKING:
    from hpsearch.search.status import StudyStatus
    from hpsearch.tracking import MlflowTracker
    from hpsearch.workers.plan import ExecutionPlan, Forecast


def describe_params(params: Mapping[str, Any]) -> str:
    """Format params without their sections: `base_channels=8 depth=3 lr=0.0123`."""
    return " ".join(f"{name.partition('.')[2]}={setting(value)}" for name, value in params.items())


def listed_trials(numbers: Sequence[int]) -> str:
    """Format trial numbers as a list: `trial 4`, `trials 4, 2`."""
    return f"trial{'' if len(numbers) == 1 else 's'} {', '.join(map(str, numbers))}"


def describe_best(status: StudyStatus) -> str:
    """Describe the best trial of a study so far, or the leading trial if it is not complete yet; "" if unknown."""
    metric = status.config.study.metric
    if (leader := status.leader) is not None:
        folds = f"{status.n_finished[leader.number]} of {count(status.n_folds, 'fold')}"
        text = f"leading: trial {leader.number}, {metric} {status.leader_value:.4f} expected after {folds}"
        return f"{text}  {describe_params(leader.params)}".rstrip()
    if (best := status.best) is None:
        return ""
    both = ", mean of both fits" if status.is_confirmed else ""
    value = f"{metric} {status.values[best.number]:.4f} out of fold{both}"
    return f"best: trial {best.number}, {value}  {describe_params(best.params)}".rstrip()


def describe_folds(config: StudyConfig) -> str:
    """Describe the folds of a study: `5 folds` or `the fixed split`."""
    folds = config.study.folds
    return "the fixed split" if folds == "fixed" else count(folds, "fold")


def describe_machine(plan: ExecutionPlan) -> str:
    """Describe the machine of a plan, such as `on NAME, float32, 2 workers x 1 thread`, or the hosts of a cluster."""
    name = plan.machine.get("device_name", plan.device)
    if hosts := {worker.host for worker in plan.connected}:
        devices = dict.fromkeys(worker.device_name for worker in plan.connected)
        name = f"{count(len(hosts), 'host')} ({', '.join(devices)})"
    workers, threads = count(len(plan.workers), "worker"), count(plan.workers[0].threads, "thread")
    return f"on {name}, {plan.precision}, {workers} x {threads}"


def describe_forecast(forecast: Forecast, place: str = "this machine") -> str:
    """Describe in one sentence how long the rest of a search will take on `place`, a machine or cluster."""
    then = f", then up to {count(forecast.n_replicates, 'refit')}" if forecast.n_replicates else ""
    without = f" (without pruning {duration(forecast.total_s)})" if forecast.expected_s < forecast.total_s else ""
    fit = duration(forecast.fit_s) if forecast.fit_s >= 10 else f"{forecast.fit_s:.1f} s"
    return (
        f"{count(forecast.n_trials, 'trial')} left{then}: about {duration(forecast.expected_s)} of training on "
        f"{place}{without}, {fit} per fit, as measured"
    )


def program(name: str = "hpsearch") -> str:
    """Return the shell command for a program of this installation: its name, or its path if it is not on PATH."""
    folders = (Path(sys.argv[0]).absolute().parent, Path(sys.executable).parent)
    path = next((folder / name for folder in folders if (folder / name).is_file()), None)
    return name if path is None or shutil.which(name) else shlex.quote(str(path))


def next_command(command: str, study: str, project: ProjectPaths, cluster: str = "") -> str:
    """Return the full shell command that runs an hpsearch command on a study, with `--cluster` if it is given."""
    option = f" --cluster {shlex.quote(cluster)}" if cluster else ""
    return program() + command_line(command, study, project).removeprefix("hpsearch") + option


def mlflow_command(project: ProjectPaths) -> str:
    """Return the shell command that opens the MLflow UI with a project's runs."""
    folder = "" if str(project.root) == "." else f"cd {shlex.quote(str(project.root))} && "
    return f"{folder}{program('mlflow')} ui"


def describe_behind(study: str, project: ProjectPaths, tracking: str | None, error: str) -> str:
    """Return the message for a study whose MLflow runs are not up to date.

    It contains `error`, if there is one, and the command that updates MLflow. `tracking` is the value of the option
    `--tracking`, or None if the option was not given.
    """
    retry = next_command("track", study, project)
    if tracking is not None:
        retry += f" --tracking {shlex.quote(redact(tracking))}"
    because = f" ({error})" if error else ""
    return f"MLflow is not up to date{because}. No result is lost. To log the missing runs: {retry}"


def tracker_of_existing(project: ProjectPaths, tracking: str | None) -> MlflowTracker | None:
    """Return the tracker for an existing study, or None if its runs are not to be logged to MLflow.

    `tracking` is the value of the option `--tracking`. If it is None and nothing of this project was logged before,
    print a note and return None.
    """
    tracker = hpsearch.make_tracker(project, tracking)
    if tracker is None or tracking is not None or tracker.has_data:
        return tracker
    click.echo("not logged to MLflow, because this project is not tracked; `hpsearch track` logs it")
    return None
