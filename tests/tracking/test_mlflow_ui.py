"""A real `mlflow ui` on 127.0.0.1: it shows every trial, and its absence costs nothing but delay."""

from __future__ import annotations

import contextlib
import functools
import http.client
import http.server
import json
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from hpsearch.errors import TrackingError
from hpsearch.search.optuna_view import OptunaView, sqlite_url
from hpsearch.tracking import MlflowTracker
from hpsearch.views import ViewThread
from tests.recorded import FakeStudy
from tests.servers import PATIENCE_S, mlflow_server
from tests.tracking.tracked import Run, read, view_of
from tests.workers.dask_cluster import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

mlflow_ui = functools.partial(mlflow_server, command="ui")


def ask(address: str, request: str, **arguments: Any) -> Any:
    """The answer of MLflow's API, as its page in the browser asks it."""
    asked = urllib.request.Request(
        f"{address}/api/2.0/mlflow/{request}",
        data=json.dumps(arguments).encode() if arguments else None,
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(asked, timeout=60) as answer:
        return json.load(answer)


def test_a_plain_mlflow_ui_in_the_project_folder_shows_every_trial(
    tmp_path: Path,
    empty_mlflow_db: Path,
) -> None:
    shutil.copy(empty_mlflow_db, tmp_path / "mlflow.db")
    study = FakeStudy(tmp_path, n_folds=5)
    for outcome in ("complete", "pruned", "infeasible", "diverged", "failed", "complete"):
        study.trial(outcome)  # type: ignore[arg-type]
    study.final(0)
    view_of(study).update()
    with mlflow_ui(tmp_path, free_port()) as address:
        experiments = ask(address, "experiments/search", max_results=10)["experiments"]
        (number,) = [each["experiment_id"] for each in experiments if each["name"] == "fake"]
        runs = {run["info"]["run_name"]: run for run in ask(address, "runs/search", experiment_ids=[number])["runs"]}
        assert set(runs) == {"fake", *(f"trial {n:04d}" for n in range(6)), "final of trial 0000"}
        for trial in study.record.trials():
            data = runs[f"trial {trial.number:04d}"]["data"]
            params = {each["key"]: each["value"] for each in data["params"]}
            assert params["unet.depth"] == str(trial.study_config.unet.depth)
            assert set(params) == set(trial.study_config.flat())
            metrics = {each["key"]: each["value"] for each in data.get("metrics", [])}
            assert metrics.get("cv/dice_mean") == (trial.value if trial.outcome == "complete" else None)
        run_id = runs["trial 0000"]["info"]["run_id"]
        history = ask(address, f"metrics/get-history?run_id={run_id}&metric_key=fold3/train_loss")["metrics"]
        rows = study.record.fit(0, 3).epochs()
        assert [(each["step"], each["value"], each["timestamp"]) for each in history] == [
            (row.epoch, row.train.loss, round(row.time * 1000)) for row in rows
        ]
        with urllib.request.urlopen(
            f"{address}/get-artifact?path=curves.png&run_uuid={run_id}", timeout=60
        ) as answer:
            assert answer.read().startswith(b"\x89PNG")


def test_after_a_refit_that_changes_the_winner_the_saved_view_begins_with_it_as_optuna_does(
    tmp_path: Path,
    empty_mlflow_db: Path,
) -> None:
    shutil.copy(empty_mlflow_db, tmp_path / "mlflow.db")
    study = FakeStudy(tmp_path, n_images=40, overrides=("study.confirm=2", "study.trials=4"))
    for lr in (0.01, 0.05, 0.045, 0.04):
        study.trial(**{"train.lr": lr, "unet.depth": 4, "unet.base_channels": 16})
    record = study.record
    with mlflow_ui(tmp_path, free_port()) as address:
        view = view_of(study, address)
        for winner in (1, 2):
            if winner == 2:
                # Trial 3 was not fitted again and has the highest mean of all.
                study.confirm(1, 2, gains={1: -0.08, 2: -0.02})
                assert record.standing().values[3] > record.standing().values[2]
            view.update()
            OptunaView(record.paths).update()
            worth = record.standing().values[winner]
            experiments = ask(address, "experiments/search", max_results=10)["experiments"]
            (experiment,) = [each for each in experiments if each["name"] == "fake"]
            tags = {each["key"]: each["value"] for each in experiment["tags"]}
            state = json.loads(json.loads(tags["mlflow.sharedViewState.hpsearch"])["state"])
            order = f"{state['orderByKey']} {'ASC' if state['orderByAsc'] else 'DESC'}"
            runs = ask(address, "runs/search", experiment_ids=[experiment["experiment_id"]], order_by=[order])["runs"]
            assert runs[0]["info"]["run_name"] == f"trial {winner:04d}"
            metrics = {each["key"]: each["value"] for each in runs[0]["data"]["metrics"]}
            assert metrics["cv/dice_mean"] == worth
            is_winner = [
                run["info"]["run_name"]
                for run in runs
                if {"key": "winner", "value": "true"} in run["data"].get("tags", [])
            ]
            assert is_winner == [f"trial {winner:04d}"]
            (parent,) = [run for run in runs if run["info"]["run_name"] == "fake"]
            of_study = {each["key"]: each["value"] for each in parent["data"]["metrics"]}
            assert of_study["study/best_dice"] == worth
            note = next(each["value"] for each in parent["data"]["tags"] if each["key"] == "mlflow.note.content")
            assert f"trial {winner}" in note
            # As optuna-dashboard reads it, with a storage of its own.
            storage = optuna.storages.RDBStorage(sqlite_url(study.project.optuna_db))
            best = storage.get_best_trial(storage.get_study_id_from_name("fake"))
            assert (best.number, best.value) == (winner, worth)
        assert metrics["cv/dice_first"] == record.trial(2).value


class Line:
    """Passes requests on to a server, or answers as told: the network between a study and its server."""

    def __init__(self, port: int) -> None:
        self.trouble: Callable[[int], str] = lambda number: ""
        """Of each request, by its number: `refuse` (500, not done), `lose` (done, but 500), `delay` or nothing."""
        self.n_requests = 0
        self.n_troubles = 0
        line = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                line.n_requests += 1
                trouble = line.trouble(line.n_requests)
                status, headers, content = 500, {}, b"{}"
                if trouble == "delay":
                    time.sleep(0.5)
                if trouble != "refuse":
                    server = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
                    passed_on = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")}
                    server.request(self.command, self.path, body, passed_on)
                    answer = server.getresponse()
                    content = answer.read()
                    if trouble != "lose":
                        status, headers = answer.status, {"Content-Type": answer.getheader("Content-Type", "")}
                    server.close()
                line.n_troubles += bool(trouble)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def as_planned(study: FakeStudy, between: Callable[[], None]) -> None:
    """Three trials, epoch by epoch; `between` is called after each."""
    for outcome in ("complete", "pruned", "complete"):
        trial = study.begin()
        for fold in range(study.record.n_folds if outcome == "complete" else 1):
            for _ in range(study.n_epochs if outcome == "complete" else 1):
                study.epoch(trial, fold)
                between()
        study.end(trial, outcome)  # type: ignore[arg-type]
        between()


def track(project: Path, uri: str | None, between: Callable[[FakeStudy], None]) -> FakeStudy:
    study = FakeStudy(project)
    thread = ViewThread(view_of(study, uri), pause_s=0, retry_s=0.05, max_retry_s=0.5)

    def step() -> None:
        thread.wake()
        between(study)

    as_planned(study, step)
    assert thread.close(PATIENCE_S) == 0
    return study


def without_files_that_name_a_place(runs: dict[str, Run]) -> dict[str, Any]:
    """What two projects have in common."""
    return {name: {**vars(run), "files": sorted(run.files)} for name, run in runs.items()}


@pytest.mark.usefixtures("quick_figures")
def test_a_server_that_fails_is_killed_and_comes_back_ends_with_what_an_undisturbed_one_has(
    tmp_path: Path,
    empty_mlflow_db: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in ("server", "calm"):
        (tmp_path / name).mkdir()
        shutil.copy(empty_mlflow_db, tmp_path / name / "mlflow.db")
    calm = track(tmp_path / "calm", None, lambda study: None)
    expected = read(calm.project)

    port = free_port()
    line = Line(int(port))
    disturbances = iter(range(1000))
    with contextlib.ExitStack() as servers:
        servers.enter_context(mlflow_ui(tmp_path / "server", port))

        def disturb(study: FakeStudy) -> None:
            """Refused requests at first, then lost and late answers, then no server at all, then a server again."""
            step = next(disturbances)
            troubles = {1: "refuse", 4: "lose", 6: "delay"}
            if step in troubles:
                line.trouble = lambda number: troubles[step] if number % 3 == 0 else ""
            elif step == 8:
                servers.close()
            elif step == 11:
                line.trouble = lambda number: ""
                servers.enter_context(mlflow_ui(tmp_path / "server", port))
            # Time for a few requests; none of what is asserted depends on how many.
            threading.Event().wait(0.3)

        stormy = track(tmp_path / "stormy", line.address, disturb)
        assert line.n_troubles > 0
        found = read(stormy.project, uri=line.address)
        line.close()
    assert without_files_that_name_a_place(found) == without_files_that_name_a_place(expected)
    assert "MLflow is not up to date, retrying" in caplog.text


@pytest.mark.usefixtures("quick_figures")
def test_without_a_server_the_study_goes_on_and_says_what_is_missing(
    tmp_path: Path,
) -> None:
    study = FakeStudy(tmp_path)
    tracker = MlflowTracker(study.project, f"http://127.0.0.1:{free_port()}")
    thread = ViewThread(tracker.view(study.record.paths), pause_s=0)
    as_planned(study, thread.wake)
    assert thread.close() == 3
    with pytest.raises(TrackingError):
        tracker.view(study.record.paths).update()


def test_the_way_out_of_an_old_file_store_exists(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mlflow", "migrate-filestore", "--help"], capture_output=True, text=True, check=True
    )
    assert "--source" in done.stdout
    assert "--target" in done.stdout
