"""hpsearch/tracking.py: MLflow equals the record, whatever happens on the way."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpsearch import config as configs
from hpsearch import paths, tracking
from hpsearch.errors import HpsearchError, RecordError, TrackingError
from hpsearch.paths import ProjectPaths, StudyPaths
from hpsearch.store.record import Outcome
from hpsearch.tracking import MlflowTracker, NullTracker, TrackingThread, make_tracker, redact
from tests.recorded import FakeStudy
from tests.tracked import Run, all_runs, client, read, rows_in


@pytest.fixture(autouse=True)
def no_address_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def study(tmp_path: Path, empty_mlflow_db: Path, quick_figures: None) -> FakeStudy:
    """An empty study in a project that has a database."""
    return make_study(tmp_path / "project", empty_mlflow_db)


def make_study(project: Path, empty_mlflow_db: Path, **options: Any) -> FakeStudy:
    project.mkdir(parents=True)
    shutil.copy(empty_mlflow_db, project / "mlflow.db")
    return FakeStudy(project, **options)


def deliver(study: FakeStudy, **options: Any) -> dict[str, Run]:
    """Catch up with a tracker of its own, as a new process would; then what is in MLflow."""
    MlflowTracker(study.project).catch_up(study.record.paths, **options)
    return read(study.project)


class TestWhatIsLogged:
    def test_a_trial_has_its_whole_configuration_as_params(self, study: FakeStudy) -> None:
        trial = study.trial("full")
        run = deliver(study)["trial 0000"]
        assert set(run.params) == set(trial.study_config.flat())
        assert run.params["unet.depth"] == str(trial.study_config.unet.depth)
        assert float(run.params["train.lr"]) == trial.study_config.train.lr

    def test_a_trial_has_every_epoch_of_every_fold_at_its_recorded_time(self, study: FakeStudy) -> None:
        study.trial("full")
        run = deliver(study)["trial 0000"]
        for fold in range(2):
            rows = study.record.fit(0, fold).epochs()
            assert len(rows) == 3
            for score in ("loss", "dice", "jaccard", "accuracy"):
                for key, which in ((f"fold{fold}/train_{score}", "train"), (f"fold{fold}/{score}", "held_out")):
                    expected = [(row["epoch"], row[which][score], round(row["time"] * 1000)) for row in rows]
                    assert run.metrics[key] == expected

    def test_second_fits_have_a_run_of_their_own_and_keep_the_study_open_until_they_are_there(
        self, tmp_path: Path, empty_mlflow_db: Path, quick_figures: None
    ) -> None:
        study = make_study(tmp_path / "project", empty_mlflow_db, overrides=("study.confirm=2", "study.trials=2"))
        study.trial("full")
        study.trial("full")
        before = deliver(study)
        assert before["fake"].status == "RUNNING"
        study.confirm(1, 0)
        runs = deliver(study)
        run = runs["trial 0001, second fits"]
        rows = study.record.second_fit(1, 0).epochs()
        assert run.metrics["fold0/dice"] == [
            (row["epoch"], row["held_out"]["dice"], round(row["time"] * 1000)) for row in rows
        ]
        assert run.latest["cv/dice_mean"] == pytest.approx(study.record.second_out_of_fold(1).mean(), abs=1e-7)
        assert (run.status, run.parent, run.params) == ("FINISHED", "fake", runs["trial 0001"].params)
        assert runs["fake"].status == "FINISHED"
        assert deliver(study) == runs

    def test_five_folds_are_forty_metrics(self, tmp_path: Path, empty_mlflow_db: Path, quick_figures: None) -> None:
        study = make_study(tmp_path / "project", empty_mlflow_db, n_folds=5)
        study.trial("full")
        assert sum(key.startswith("fold") for key in deliver(study)["trial 0000"].metrics) == 40

    def test_a_full_trial_has_means_over_images_and_the_spread_between_folds(self, study: FakeStudy) -> None:
        trial = study.trial("full")
        latest = deliver(study)["trial 0000"].latest
        scores = [study.record.final_scores(0, fold) for fold in range(2)]
        assert latest["cv/dice_mean"] == trial.value
        assert latest["cv/dice_mean"] == pytest.approx(np.concatenate(scores).mean())
        assert latest["cv/dice_std"] == pytest.approx(np.std([each.mean() for each in scores], ddof=1), abs=1e-7)
        counts = np.concatenate([study.record.fit(0, fold).counts() for fold in range(2)])
        tp, fp, fn, tn = counts.T
        assert latest["cv/jaccard_mean"] == pytest.approx((tp / (tp + fp + fn)).mean())
        assert latest["cv/accuracy_mean"] == pytest.approx(((tp + tn) / counts.sum(1)).mean())

    def test_a_trial_has_seconds_speed_and_memory(self, study: FakeStudy) -> None:
        study.trial("full")
        latest = deliver(study)["trial 0000"].latest
        assert latest["cost/seconds"] == pytest.approx(2 * 3 * 1.75)
        assert latest["cost/images_per_s"] == pytest.approx(800.5)
        assert latest["cost/peak_memory_mib"] == 600

    def test_a_dropped_trial_has_an_estimate_and_no_mean(self, study: FakeStudy) -> None:
        study.trial("full")
        study.trial("dropped")
        latest = deliver(study)["trial 0001"].latest
        assert latest["cv/estimate"] == 0.61
        assert "cv/dice_mean" not in latest

    @pytest.mark.parametrize(
        ("outcome", "status"),
        [
            ("full", "FINISHED"),
            ("dropped", "FINISHED"),
            ("infeasible", "FINISHED"),
            ("diverged", "FAILED"),
            ("failed", "FAILED"),
        ],
    )
    def test_outcome_status_and_times_are_the_recorded_ones(
        self, study: FakeStudy, outcome: Outcome, status: str
    ) -> None:
        trial = study.trial(outcome)
        run = deliver(study)["trial 0000"]
        assert (run.tags["outcome"], run.status) == (outcome, status)
        assert run.began_ms == round(trial.began_at * 1000)
        assert run.ended_ms == round((trial.ended_at or 0) * 1000)
        assert run.tags.get("reason", "") == trial.reason
        assert run.parent == "fake"

    def test_a_trial_is_tagged_with_seed_commit_device_and_versions(self, study: FakeStudy) -> None:
        study.trial("full")
        tags = deliver(study)["trial 0000"].tags
        expected = {
            "hpsearch.study": "fake",
            "hpsearch.trial": "0",
            "seed": "0",
            "source": "default",
            "device": "cpu",
            "processor": "a processor",
            "version.torch": "2.9.0",
            "version.hpsearch": "0.1.0",
            "mlflow.source.git.commit": "0123456789abcdef",
        }
        assert expected.items() <= tags.items()

    def test_the_toml_of_a_trial_runs_it_again(self, study: FakeStudy, tmp_path: Path) -> None:
        study.trial("full")
        trial = study.trial("full")
        (tmp_path / "trial.toml").write_bytes(deliver(study)["trial 0001"].files["trial.toml"])
        assert configs.load(tmp_path / "trial.toml") == trial.study_config

    def test_a_trial_has_its_folds_scores_and_figures_as_files(self, study: FakeStudy) -> None:
        study.trial("full")
        files = deliver(study)["trial 0000"].files
        assert set(files) == {"trial.toml", "folds.json", "scores.csv", "curves.png", "panels.png"}
        assert json.loads(files["folds.json"])["folds"] == study.record.folds.to_dict()
        lines = [line.split(",") for line in files["scores.csv"].decode().split()]
        assert lines[0] == ["image", "fold", "dice", "jaccard", "accuracy", "sensitivity", "specificity"]
        assert len(lines) == 21
        out_of_fold = study.record.out_of_fold(0)
        for image, fold, dice, *_ in lines[1:]:
            index = study.record.folds.ids.index(image)
            assert study.record.folds.fold_of[index] == int(fold)
            assert float(dice) == pytest.approx(out_of_fold[index], abs=1e-6)

    def test_verdicts_and_deaths_are_kept_as_decisions(self, study: FakeStudy) -> None:
        study.trial("dropped")
        study.trial("failed")
        runs = deliver(study)
        assert json.loads(runs["trial 0000"].files["decisions.json"])["decisions"][0]["p"] == 0.001
        assert json.loads(runs["trial 0001"].files["decisions.json"])["failures"] == {
            "0": ["was killed by signal 9"] * 3
        }
        assert "scores.csv" not in runs["trial 0000"].files

    def test_the_parent_has_settings_space_best_value_and_counts(self, study: FakeStudy) -> None:
        values = [study.trial("full").value, study.trial("full").value]
        last = study.trial("dropped")
        run = deliver(study)["fake"]
        assert run.params["study.folds"] == "2"
        assert run.params["search.unet.depth"] == "[2, 3, 4]"
        best = [value for _, value, _ in run.metrics["study/best_dice"]]
        assert best == [values[0], max(values), max(values)]  # type: ignore[type-var]
        assert run.metrics["study/n_full"][-1] == (3, 2.0, round((last.ended_at or 0) * 1000))
        assert run.latest["study/n_dropped"] == 1
        assert set(run.files) == {"study.toml", "plan.json", "folds.json"}
        assert tomllib.loads(run.files["study.toml"].decode()) == tomllib.loads(study.record.paths.toml.read_text())

    def test_the_parent_ends_with_the_study(self, study: FakeStudy) -> None:
        for _ in range(5):
            study.trial("full")
        assert deliver(study)["fake"].status == "RUNNING"
        last = study.trial("infeasible")
        assert deliver(study)["fake"].status == "RUNNING"  # an infeasible trial is free
        last = study.trial("dropped")
        run = deliver(study)["fake"]
        assert (run.status, run.ended_ms) == ("FINISHED", round((last.ended_at or 0) * 1000))

    def test_a_final_shows_what_was_promised_beside_what_came(self, study: FakeStudy) -> None:
        study.trial("full")
        study.final(0)
        run = deliver(study)["final of trial 0000"]
        result = paths.read_json(study.record.paths.final("trial-0000").result)
        assert run.parent == "fake"
        assert run.status == "FINISHED"
        assert run.latest["cv/dice_mean"] == result["cv"]["mean"]
        assert run.latest["test/dice"] == result["test"]["dice"]["mean"]
        assert run.latest["test/dice_low"] == result["test"]["dice"]["low"]
        assert len(run.metrics["seed0/train_loss"]) == 3
        assert run.params["final.trial"] == "0"
        assert set(run.files) == {"config.toml", "final.json", "test.csv", "curves.png", "panels.png"}

    def test_an_open_trial_grows_epoch_by_epoch(self, study: FakeStudy) -> None:
        tracker, trial = MlflowTracker(study.project), study.begin()
        seen = []
        for _ in range(3):
            study.epoch(trial, 0)
            tracker.catch_up(study.record.paths)
            run = read(study.project)["trial 0000"]
            seen.append(len(run.metrics["fold0/dice"]))
            assert (run.status, run.ended_ms, run.tags["outcome"]) == ("RUNNING", None, "open")
        assert seen == [1, 2, 3]

    def test_a_stopped_study_has_nothing_running_until_it_goes_on(self, study: FakeStudy) -> None:
        trial = study.begin()
        runs = deliver(study, stopped=True)
        assert {run.status for run in runs.values()} == {"KILLED"}
        study.fold(trial, 0)
        assert {run.status for run in deliver(study).values()} == {"RUNNING"}

    def test_the_report_is_kept_with_the_study_also_when_it_comes_late_or_anew(self, study: FakeStudy) -> None:
        study.trial("full")
        files = deliver(study)["fake"].files
        paths.write_text(study.record.paths.report, "<p>first</p>")
        paths.write_text(study.record.paths.figures / "race.png", "a figure")
        tracker = MlflowTracker(study.project)
        tracker.log_report(study.record.paths)
        with_report = read(study.project)["fake"].files
        assert set(with_report) == {*files, "report.html", "figures/race.png"}
        paths.write_text(study.record.paths.report, "<p>second</p>")
        tracker.log_report(study.record.paths)
        assert read(study.project)["fake"].files["report.html"] == b"<p>second</p>"
        study.project.mlflow_db.unlink()
        shutil.rmtree(study.project.mlruns)
        assert deliver(study)["fake"].files["report.html"] == b"<p>second</p>"

    def test_the_report_of_a_study_that_is_not_tracked_waits_for_it(self, study: FakeStudy) -> None:
        study.trial("full")
        paths.write_text(study.record.paths.report, "<p></p>")
        with pytest.raises(TrackingError, match="study 'fake' is not in MLflow yet"):
            MlflowTracker(study.project).log_report(study.record.paths)

    def test_figures_are_left_out_where_the_images_are_gone(self, study: FakeStudy) -> None:
        study.trial("full")
        shutil.rmtree(study.project.cache)
        files = deliver(study)["trial 0000"].files
        assert "curves.png" in files
        assert "panels.png" not in files

    def test_a_study_without_trials_leaves_no_trace(self, study: FakeStudy) -> None:
        assert deliver(study) == {}

    def test_the_experiment_opens_as_training_with_a_view_that_begins_with_the_best(self, study: FakeStudy) -> None:
        study.trial("full")
        deliver(study)
        tags = client(study.project).get_experiment_by_name("fake").tags
        assert tags["mlflow.experimentKind"] == "custom_model_development"
        view = json.loads(tags["mlflow.sharedViewState.hpsearch"])
        state = json.loads(view["state"])
        # By the mean, a run of second fits may come first.
        assert (view["name"], state["orderByKey"], state["orderByAsc"]) == ("Trials, best first", "tags.`rank`", True)
        assert "params.`unet.depth`" in state["selectedColumns"]


class TestNothingTwice:
    def test_catching_up_again_adds_no_row_to_any_table(self, study: FakeStudy) -> None:
        for outcome in ("full", "dropped", "infeasible"):
            study.trial(outcome)  # type: ignore[arg-type]
        study.epoch(study.begin(), 0)
        runs = deliver(study)
        before = rows_in(study.project)
        assert deliver(study) == runs
        assert rows_in(study.project) == before

    def test_what_was_delivered_is_not_even_sent_again(
        self, study: FakeStudy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        study.trial("full")
        deliver(study)
        from mlflow import MlflowClient

        for name in ("log_batch", "create_run", "log_artifacts", "set_terminated"):
            monkeypatch.setattr(MlflowClient, name, lambda self, run_id, *_, **__: pytest.fail("sent again"))
        # Only the parent goes on: its three files are written anew at each start.
        monkeypatch.setattr(MlflowClient, "log_artifacts", lambda self, run_id, folder: None)
        MlflowTracker(study.project).catch_up(study.record.paths)

    @pytest.mark.parametrize("is_done", [False, True], ids=["lost request", "lost answer"])
    def test_a_request_that_fails_at_any_place_changes_nothing_in_the_end(
        self, tmp_path: Path, empty_mlflow_db: Path, quick_figures: None, is_done: bool
    ) -> None:
        """Fails the first request, then, in a new project, the second, and so on: each time all arrives, once."""
        expected: dict[str, Run] | None = None
        for n_before in range(100):
            study = make_study(tmp_path / f"{n_before}", empty_mlflow_db, epochs=1, size=8)
            study.trial("full")
            tracker = MlflowTracker(study.project)
            with failing_client(n_before, is_done) as has_failed:
                if not has_failed:
                    with contextlib.suppress(TrackingError):
                        tracker.catch_up(study.record.paths)
                failed = bool(has_failed)
            tracker.catch_up(study.record.paths)
            runs = read(study.project)
            expected = expected or runs
            assert runs == expected
            assert rows_in(study.project)["metrics"] == sum(
                len(each) for run in runs.values() for each in run.metrics.values()
            )
            if not failed:
                break
            assert n_before < 90
        assert n_before > 8

    def test_a_run_that_was_made_twice_stays_once(self, study: FakeStudy) -> None:
        study.epoch(study.begin(), 0)
        runs = deliver(study)
        (twin,) = [run for run in all_runs(study.project) if run.info.run_name == "trial 0000"]
        client(study.project).create_run(
            twin.info.experiment_id, start_time=twin.info.start_time, tags=twin.data.tags, run_name="trial 0000"
        )
        assert deliver(study) == runs

    def test_an_epoch_that_was_done_again_stays_as_it_was_logged(self, study: FakeStudy) -> None:
        trial = study.begin()
        study.epoch(trial, 0)
        runs = deliver(study)
        path = study.record.fit(0, 0).paths.epochs
        row = json.loads(path.read_text())
        path.write_text(json.dumps({**row, "time": row["time"] + 60}) + "\n")
        assert deliver(study)["trial 0000"].metrics == runs["trial 0000"].metrics

    def test_a_study_begun_anew_under_an_old_name_has_runs_of_its_own(self, study: FakeStudy, tmp_path: Path) -> None:
        study.trial("full")
        deliver(study)
        old = {run.info.run_id for run in all_runs(study.project)}
        shutil.rmtree(study.record.paths.root)
        again = FakeStudy(study.project.root)
        again.clock += 1000
        again.trial("full")
        MlflowTracker(again.project).catch_up(again.record.paths)
        now = all_runs(study.project)
        assert len(now) == 4
        assert old < {run.info.run_id for run in now}


@contextlib.contextmanager
def failing_client(n_before: int, is_done: bool) -> Iterator[list[str]]:
    """Let one request fail, after `n_before` of them, done or not; gives the names of those that failed."""
    from mlflow import MlflowClient

    failed: list[str] = []
    calls = iter(range(10**6))
    names = (
        "get_experiment_by_name", "create_experiment", "set_experiment_tag", "search_runs", "create_run", "log_batch",
        "log_artifacts", "set_terminated", "set_tag", "update_run", "get_metric_history",
    )  # fmt: skip

    def wrap(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def request(*args: Any, **kwargs: Any) -> Any:
            fails = next(calls) == n_before
            result = None if fails and not is_done else original(*args, **kwargs)
            if fails:
                failed.append(name)
                raise ConnectionError(f"{name}: the line went dead")
            return result

        return request

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(MlflowClient, name, wrap(name, getattr(MlflowClient, name)))
        yield failed


class TestRepair:
    def test_a_deleted_database_comes_back_from_the_record_in_the_same_process(self, study: FakeStudy) -> None:
        for outcome in ("full", "dropped"):
            study.trial(outcome)  # type: ignore[arg-type]
        runs = deliver(study)
        study.project.mlflow_db.unlink()
        shutil.rmtree(study.project.mlruns)
        assert deliver(study) == runs

    def test_the_database_is_made_whole_or_not_at_all(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        project = ProjectPaths(tmp_path)
        (tmp_path / ".mlflow.db.1234567.tmp").write_bytes(b"left by a process that was killed")

        def fail(*args: Any) -> None:
            Path(str(args[1]).removeprefix("sqlite:///")).write_bytes(b"half")
            raise OSError("killed")

        monkeypatch.setattr("mlflow.store.tracking.sqlalchemy_store.SqlAlchemyStore.__init__", fail)
        with pytest.raises(HpsearchError):
            tracking._project_database(project)
        assert [path.name for path in tmp_path.iterdir()] == [".mlflow.db.lock"]

    def test_a_deleted_experiment_and_a_deleted_run_come_back(self, study: FakeStudy) -> None:
        study.trial("full")
        runs = deliver(study)
        writer = client(study.project)
        (run,) = [run for run in all_runs(study.project) if run.info.run_name == "trial 0000"]
        writer.delete_run(run.info.run_id)
        assert deliver(study) == runs
        writer.delete_experiment(run.info.experiment_id)
        assert deliver(study).keys() == runs.keys()

    def test_a_copied_project_keeps_its_files_to_itself(self, study: FakeStudy, tmp_path: Path) -> None:
        study.trial("full")
        runs = deliver(study)
        there = ProjectPaths(tmp_path / "an ö'ther place")
        shutil.copytree(study.project.root, there.root)
        before = sorted(study.project.mlruns.rglob("*"))
        copy = FakeStudy.__new__(FakeStudy)
        copy.__dict__ |= study.__dict__
        copy.project, copy.record = there, type(study.record).open(there.study("fake"))
        copy.trial("dropped")
        after = deliver(copy)
        assert sorted(study.project.mlruns.rglob("*")) == before
        assert after["trial 0000"] == runs["trial 0000"]
        assert {run.info.artifact_uri.startswith((there.mlruns / "fake").as_uri()) for run in all_runs(there)} == {
            True
        }
        assert "trial.toml" in after["trial 0001"].files

    def test_rebuilding_what_agrees_keeps_its_run(self, study: FakeStudy) -> None:
        study.trial("full")
        study.final(0)
        runs = deliver(study)
        ids = {run.info.run_id for run in all_runs(study.project)}
        shutil.rmtree(study.project.mlruns)
        rebuilt = MlflowTracker(study.project).rebuild(study.record.paths)
        assert (rebuilt.n_kept, rebuilt.n_replaced, rebuilt.n_removed) == (3, 0, 0)
        assert {run.info.run_id for run in all_runs(study.project)} == ids
        after = read(study.project)
        assert {name: dataclasses.replace(run, status="") for name, run in after.items()} == {
            name: dataclasses.replace(run, status="") for name, run in runs.items()
        }

    def test_rebuilding_replaces_what_contradicts_the_record_and_keeps_notes(self, study: FakeStudy) -> None:
        for _ in range(3):
            study.trial("full")
        runs = deliver(study, stopped=True)
        by_name = {run.info.run_name: run for run in all_runs(study.project)}
        writer = client(study.project)
        writer.log_metric(by_name["trial 0000"].info.run_id, "fold0/dice", 0.99, step=3)
        writer.set_tag(by_name["trial 0000"].info.run_id, "verdict", "look at this one")
        writer.log_metric(by_name["trial 0001"].info.run_id, "my/own", 1.0)
        shutil.rmtree(study.record.paths.trial(2).root)
        rebuilt = MlflowTracker(study.project).rebuild(study.record.paths)
        # The parent counted three trials.
        assert (rebuilt.n_kept, rebuilt.n_replaced, rebuilt.n_removed) == (1, 2, 1)
        after = read(study.project)
        assert after["trial 0000"].tags.pop("verdict") == "look at this one"
        assert after["trial 0000"] == runs["trial 0000"]
        assert after["trial 0001"].latest["my/own"] == 1
        assert after["fake"].latest["study/n_full"] == 2
        assert after["trial 0001"].parent == "fake"
        assert "trial 0002" not in after

    def test_one_damaged_trial_does_not_keep_back_the_others(self, study: FakeStudy) -> None:
        for _ in range(3):
            study.trial("full")
        counts = study.record.fit(1, 0).paths.counts
        counts.write_bytes(counts.read_bytes()[:50])
        tracker = MlflowTracker(study.project)
        with pytest.raises(RecordError, match=r"0001/fold0/counts\.npy is damaged"):
            tracker.catch_up(study.record.paths)
        runs = read(study.project)
        assert runs["trial 0002"].status == "FINISHED"
        assert tracker.undelivered(study.record.paths) == 1

    def test_nothing_is_left_in_the_study_folder(self, study: FakeStudy) -> None:
        study.trial("full")
        study.record.paths.tracking.mkdir()
        (study.record.paths.tracking / "left by a process that was killed").touch()
        assert "left by a process that was killed" not in deliver(study)["trial 0000"].files
        assert not study.record.paths.tracking.exists()


class TestWhere:
    def test_none_tracks_nothing(self, tmp_path: Path) -> None:
        tracker = make_tracker(ProjectPaths(tmp_path), "none")
        assert isinstance(tracker, NullTracker)
        study = FakeStudy(tmp_path)
        study.trial("infeasible")
        tracker.catch_up(study.record.paths)
        assert tracker.undelivered(study.record.paths) == 0
        assert not (tmp_path / "mlflow.db").exists()

    def test_a_relative_project_is_tracked_where_it_is(
        self, study: FakeStudy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        study.trial("full")
        monkeypatch.chdir(study.project.root)
        tracker = MlflowTracker(ProjectPaths(Path()))
        monkeypatch.chdir(tmp_path)
        tracker.catch_up(study.record.paths)
        assert "curves.png" in read(study.project)["trial 0000"].files
        assert not (tmp_path / "mlruns").exists()

    def test_the_environment_names_another_database(
        self, study: FakeStudy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, empty_mlflow_db: Path
    ) -> None:
        study.trial("full")
        shutil.copy(empty_mlflow_db, tmp_path / "other.db")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
        MlflowTracker(study.project).catch_up(study.record.paths)
        assert "trial 0000" in read(study.project, uri=f"sqlite:///{tmp_path}/other.db")
        assert read(study.project) == {}
        # What the command line says goes before what the environment says.
        MlflowTracker(study.project, f"sqlite:///{study.project.mlflow_db}").catch_up(study.record.paths)
        assert "trial 0000" in read(study.project)

    def test_a_file_store_of_old_is_refused_with_the_way_out(self, tmp_path: Path) -> None:
        (tmp_path / "mlruns" / "0").mkdir(parents=True)
        (tmp_path / "mlruns" / "0" / "meta.yaml").touch()
        with pytest.raises(TrackingError, match="mlflow migrate-filestore --source"):
            make_tracker(ProjectPaths(tmp_path))
        # It is in nobody's way where runs go elsewhere.
        make_tracker(ProjectPaths(tmp_path), "http://127.0.0.1:5000")

    @pytest.mark.parametrize("uri", ["./mlruns", "file:///somewhere", "/somewhere"])
    def test_a_folder_is_no_place_to_track_to(self, tmp_path: Path, uri: str) -> None:
        with pytest.raises(TrackingError, match="no longer writes to folders"):
            make_tracker(ProjectPaths(tmp_path), uri)

    @pytest.mark.parametrize("folder", ["quo'te\"s <script>&amp;", "ha#sh;at@host:80", "ümläut 皮"])
    def test_a_project_folder_may_have_any_name(
        self, tmp_path: Path, empty_mlflow_db: Path, quick_figures: None, folder: str
    ) -> None:
        study = make_study(tmp_path / folder, empty_mlflow_db, name="ä study+1.0", epochs=1)
        study.trial("full")
        MlflowTracker(study.project).catch_up(study.record.paths)
        assert "curves.png" in read(study.project, "ä study+1.0")["trial 0000"].files

    @pytest.mark.parametrize("folder", ["50% off", "what?", "per%41cent"])
    def test_a_folder_that_sqlalchemy_cannot_name_works_or_is_refused(
        self, tmp_path: Path, empty_mlflow_db: Path, quick_figures: None, folder: str
    ) -> None:
        study = make_study(tmp_path / folder, empty_mlflow_db, epochs=1)
        study.trial("full")
        refusal = ""
        try:
            MlflowTracker(study.project).catch_up(study.record.paths)
        except TrackingError as error:
            refusal = str(error)
        assert ("choose another folder" in refusal) != (rows_in(study.project)["runs"] == 2)
        assert [path.name for path in tmp_path.iterdir()] == [folder]

    def test_importing_tracking_loads_no_heavy_library(self) -> None:
        code = (
            "import sys, hpsearch.tracking; "
            "print([m for m in ('torch', 'mlflow', 'optuna', 'matplotlib', 'pandas') if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        assert done.stdout.strip() == "[]"

    def test_telemetry_is_off_unless_the_environment_says_otherwise(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
        tracking._import_mlflow()
        assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
        monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")
        tracking._import_mlflow()
        assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "false"


class TestCredentials:
    @pytest.mark.parametrize(
        ("text", "redacted"),
        [
            ("postgresql://user:secret@host/db", "postgresql://***@host/db"),
            ("postgresql+psycopg://user:se/c@ret@host:5432/db", "postgresql+psycopg://***@host:5432/db"),
            ("cannot reach https://token@host/mlflow: refused", "cannot reach https://***@host/mlflow: refused"),
            ("mysql://host/db?user=me&password=secret&x=1", "mysql://host/db?user=me&password=***&x=1"),
            ("http://host:5000/path and a@b", "http://host:5000/path and a@b"),
            ("sqlite:////home/me/mlflow.db", "sqlite:////home/me/mlflow.db"),
        ],
    )
    def test_redact_hides_credentials_and_nothing_else(self, text: str, redacted: str) -> None:
        assert redact(text) == redacted

    def test_credentials_reach_neither_errors_nor_logs(
        self, study: FakeStudy, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
    ) -> None:
        study.trial("full")
        tracker = MlflowTracker(study.project, "http://user:secret@127.0.0.1:9/mlflow")
        assert "secret" not in tracker.uri
        with caplog.at_level(logging.DEBUG, "hpsearch"):
            thread = TrackingThread(tracker, study.record.paths)
            assert thread.close(60) == 1
        with pytest.raises(TrackingError, match=r"127\.0\.0\.1") as caught:
            tracker.catch_up(study.record.paths)
        assert "secret" not in str(caught.value)
        assert "127.0.0.1" in caplog.text
        assert "secret" not in caplog.text
        assert "secret" not in "".join(capfd.readouterr())


class FakeTracker:
    """Counts what it is asked; `errors` are raised one after another."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.attempts: list[bool] = []
        """Whether the study was said to have stopped."""
        self.attempted = threading.Semaphore(0)

    def catch_up(self, study: StudyPaths, *, stopped: bool = False) -> None:
        self.attempts.append(stopped)
        try:
            if self.errors:
                raise self.errors.pop(0)
        finally:
            self.attempted.release()

    def undelivered(self, study: StudyPaths) -> int:
        return len(self.errors)


class TestThread:
    def test_it_delivers_when_woken_and_once_more_at_the_end(self, tmp_path: Path) -> None:
        tracker = FakeTracker()
        thread = TrackingThread(tracker, StudyPaths(tmp_path), pause_s=0)
        for _ in range(3):
            assert tracker.attempted.acquire(timeout=60)
            thread.wake()
        assert tracker.attempted.acquire(timeout=60)
        assert thread.close() == 0
        assert tracker.attempts == [False] * 4 + [True]

    def test_wakes_while_it_rests_are_one_delivery(self, tmp_path: Path) -> None:
        tracker = FakeTracker()
        thread = TrackingThread(tracker, StudyPaths(tmp_path), pause_s=600)
        assert tracker.attempted.acquire(timeout=60)
        for _ in range(10):
            thread.wake()
        thread.close()
        assert tracker.attempts == [False, True]

    def test_an_outage_is_reported_once_and_caught_up_with(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        tracker = FakeTracker(TrackingError("away"), TrackingError("still away"), TrackingError("still away"))
        with caplog.at_level(logging.INFO, "hpsearch"):
            thread = TrackingThread(tracker, StudyPaths(tmp_path), pause_s=0, retry_s=0.001)
            for _ in range(4):
                assert tracker.attempted.acquire(timeout=60)
            assert thread.close() == 0
        assert thread.error == ""
        assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
        assert "away" in caplog.text
        assert "Traceback" not in caplog.text

    def test_closing_tries_once_more_and_says_what_is_missing(self, tmp_path: Path) -> None:
        tracker = FakeTracker(*[TrackingError("away")] * 5)
        thread = TrackingThread(tracker, StudyPaths(tmp_path), retry_s=600)
        assert tracker.attempted.acquire(timeout=60)
        assert thread.close() == 3
        assert thread.error == "away"
        assert tracker.attempts == [False, True]

    def test_a_last_delivery_that_fails_is_missing_something_also_where_no_trial_is(self, tmp_path: Path) -> None:
        """The run of the study itself is no trial."""
        tracker = FakeTracker(TrackingError("away"), TrackingError("away"))
        thread = TrackingThread(tracker, StudyPaths(tmp_path), retry_s=600)
        assert tracker.attempted.acquire(timeout=60)
        assert thread.close() == 1

    def test_a_fault_in_the_tracker_ends_nothing_and_shows_where_it_is(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        tracker = FakeTracker(ZeroDivisionError("a fault"))
        thread = TrackingThread(tracker, StudyPaths(tmp_path), pause_s=0, retry_s=0.001)
        for _ in range(2):
            assert tracker.attempted.acquire(timeout=60)
        assert thread.close() == 0
        assert "ZeroDivisionError" in caplog.text

    def test_closing_gives_up_on_a_server_that_does_not_answer(self, tmp_path: Path) -> None:
        answer = threading.Event()
        tracker = FakeTracker(TrackingError("never read"))
        tracker.catch_up = lambda study, stopped=False: answer.wait(60) and None  # type: ignore[method-assign]
        thread = TrackingThread(tracker, StudyPaths(tmp_path))
        assert thread.close(0.1) == 1
        assert "does not answer" in thread.error
        answer.set()

    def test_closing_waits_as_long_as_it_gets_on(self, tmp_path: Path) -> None:
        class Slow(FakeTracker):
            left = 8

            def catch_up(self, study: StudyPaths, *, stopped: bool = False) -> None:
                while self.left:
                    threading.Event().wait(0.15)
                    self.left -= 1

            def undelivered(self, study: StudyPaths) -> int:
                return self.left

        # In all it takes longer than the patience with standing still.
        assert TrackingThread(Slow(), StudyPaths(tmp_path)).close(1.0) == 0

    def test_a_whole_study_arrives_through_the_thread(self, study: FakeStudy) -> None:
        thread = TrackingThread(MlflowTracker(study.project), study.record.paths, pause_s=0)
        for outcome in ("full", "dropped", "full"):
            study.trial(outcome)  # type: ignore[arg-type]
            thread.wake()
        assert thread.close(120) == 0
        through_thread = read(study.project)
        assert {run.status for name, run in through_thread.items() if name != "fake"} == {"FINISHED"}
        assert through_thread == deliver(study, stopped=True)
