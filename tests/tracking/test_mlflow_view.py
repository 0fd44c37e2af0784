"""MLflow equals the record, whatever happens on the way."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hpsearch.config import digest
from hpsearch.errors import RecordError, TrackingError
from hpsearch.paths import ProjectPaths
from hpsearch.views import ViewThread
from tests.recorded import FakeStudy
from tests.tracking.tracked import Run, all_runs, client, deliver, make_study, read, rows_in, view_of


class TestNothingTwice:
    def test_catching_up_again_adds_no_row_to_any_table(self, study: FakeStudy) -> None:
        for outcome in ("complete", "pruned", "infeasible"):
            study.trial(outcome)  # type: ignore[arg-type]
        study.epoch(study.begin(), 0)
        runs = deliver(study)
        before = rows_in(study.project)
        assert deliver(study) == runs
        assert rows_in(study.project) == before

    def test_what_was_delivered_is_not_even_sent_again(
        self, study: FakeStudy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        study.trial("complete")
        deliver(study)
        from mlflow import MlflowClient

        for name in ("log_batch", "create_run", "log_artifacts", "set_terminated"):
            monkeypatch.setattr(MlflowClient, name, lambda self, run_id, *_, **__: pytest.fail("sent again"))
        # Only the parent goes on: its three files are written anew at each start.
        monkeypatch.setattr(MlflowClient, "log_artifacts", lambda self, run_id, folder: None)
        view_of(study).update()

    @pytest.mark.parametrize("is_done", [False, True], ids=["lost request", "lost answer"])
    def test_a_request_that_fails_at_any_place_changes_nothing_in_the_end(
        self, tmp_path: Path, empty_mlflow_db: Path, quick_figures: None, is_done: bool
    ) -> None:
        """Fails the first request, then, in a new project, the second, and so on: each time all arrives, once."""
        expected: dict[str, Run] | None = None
        for n_before in range(100):
            study = make_study(tmp_path / f"{n_before}", empty_mlflow_db, epochs=1, size=8)
            study.trial("complete")
            view = view_of(study)
            with failing_client(n_before, is_done) as has_failed:
                if not has_failed:
                    with contextlib.suppress(TrackingError):
                        view.update()
                failed = bool(has_failed)
            view.update()
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
        study.trial("complete")
        deliver(study)
        old = {run.info.run_id for run in all_runs(study.project)}
        shutil.rmtree(study.record.paths.root)
        again = FakeStudy(study.project.root)
        again.clock += 1000
        again.trial("complete")
        view_of(again).update()
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
        for outcome in ("complete", "pruned"):
            study.trial(outcome)  # type: ignore[arg-type]
        runs = deliver(study)
        study.project.mlflow_db.unlink()
        shutil.rmtree(study.project.mlruns)
        assert deliver(study) == runs

    def test_a_deleted_experiment_and_a_deleted_run_come_back(self, study: FakeStudy) -> None:
        study.trial("complete")
        runs = deliver(study)
        writer = client(study.project)
        (run,) = [run for run in all_runs(study.project) if run.info.run_name == "trial 0000"]
        writer.delete_run(run.info.run_id)
        assert deliver(study) == runs
        writer.delete_experiment(run.info.experiment_id)
        assert deliver(study).keys() == runs.keys()

    def test_a_copied_project_keeps_its_files_to_itself(self, study: FakeStudy, tmp_path: Path) -> None:
        study.trial("complete")
        runs = deliver(study)
        there = ProjectPaths(tmp_path / "an ö'ther place")
        shutil.copytree(study.project.root, there.root)
        before = sorted(study.project.mlruns.rglob("*"))
        copy = FakeStudy.__new__(FakeStudy)
        copy.__dict__ |= study.__dict__
        copy.project, copy.record = there, type(study.record).open(there.study("fake"))
        copy.trial("pruned")
        after = deliver(copy)
        assert sorted(study.project.mlruns.rglob("*")) == before
        assert after["trial 0000"] == runs["trial 0000"]
        assert {run.info.artifact_uri.startswith((there.mlruns / "fake").as_uri()) for run in all_runs(there)} == {
            True
        }
        assert "trial.toml" in after["trial 0001"].files

    def test_rebuilding_deletes_all_runs_and_logs_them_again(self, study: FakeStudy) -> None:
        for _ in range(3):
            study.trial("complete")
        study.final(0)
        runs = deliver(study, is_last=True)
        by_name = {run.info.run_name: run for run in all_runs(study.project)}
        writer = client(study.project)
        writer.log_metric(by_name["trial 0000"].info.run_id, "fold0/dice", 0.99, step=3)
        writer.set_tag(by_name["trial 0000"].info.run_id, "verdict", "look at this one")
        writer.log_metric(by_name["trial 0001"].info.run_id, "my/own", 1.0)
        shutil.rmtree(study.project.mlruns)
        assert view_of(study).rebuild() == (5, 5)
        assert read(study.project) == runs
        ids = {run.info.run_id for run in all_runs(study.project)}
        assert ids.isdisjoint(run.info.run_id for run in by_name.values())

    def test_rebuilding_forgets_trials_that_no_longer_exist(self, study: FakeStudy) -> None:
        for _ in range(3):
            study.trial("complete")
        deliver(study, is_last=True)
        shutil.rmtree(study.record.paths.trial(2).root)
        assert view_of(study).rebuild() == (4, 3)
        after = read(study.project)
        assert after["fake"].latest["study/n_complete"] == 2
        assert after["trial 0001"].parent == "fake"
        assert "trial 0002" not in after

    def test_one_damaged_trial_does_not_keep_back_the_others(self, study: FakeStudy) -> None:
        for _ in range(3):
            study.trial("complete")
        counts = study.record.fit(1, 0).paths.counts
        counts.write_bytes(counts.read_bytes()[:50])
        view = view_of(study)
        with pytest.raises(RecordError, match=r"0001/fold0/counts\.npy is damaged"):
            view.update()
        runs = read(study.project)
        assert runs["trial 0002"].status == "FINISHED"
        assert view.n_behind() == 1

    def test_a_run_that_mlflow_refuses_does_not_keep_back_the_others(
        self, study: FakeStudy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

        for _ in range(3):
            study.trial("complete")
        original = MlflowClient.create_run

        def create_run(*args: Any, **options: Any) -> Any:
            if args[-1] == "trial 0001":
                raise MlflowException("its name is too long", INVALID_PARAMETER_VALUE)
            return original(*args, **options)

        monkeypatch.setattr(MlflowClient, "create_run", create_run)
        view = view_of(study)
        with pytest.raises(TrackingError, match="its name is too long"):
            view.update()
        assert set(read(study.project)) == {"fake", "trial 0000", "trial 0002"}
        assert view.n_behind() == 1

    def test_nothing_is_left_in_the_study_folder(self, study: FakeStudy) -> None:
        study.trial("complete")
        study.record.paths.tracking.mkdir()
        (study.record.paths.tracking / "left by a process that was killed").touch()
        assert "left by a process that was killed" not in deliver(study)["trial 0000"].files
        assert not study.record.paths.tracking.exists()

    def test_an_experiment_of_version_0_1_is_continued(
        self, tmp_path: Path, empty_mlflow_db: Path, quick_figures: None
    ) -> None:
        """Its runs have other names, texts and digests. They keep their ids, metrics and names."""
        study = make_study(tmp_path / "project", empty_mlflow_db, overrides=("study.confirm=2", "study.trials=2"))
        study.trial("complete")
        study.trial("complete")
        study.confirm(1, 0)
        runs = deliver(study)
        before = {run.info.run_id: run for run in all_runs(study.project)}
        writer = client(study.project)
        text = "Dice **0.8000** out of fold, mean of two fits"
        for run_id, run in before.items():
            tags = {"hpsearch.delivered": "0" * 16, "mlflow.note.content": text, "hpsearch.note": digest(text)}
            if "hpsearch.second" in run.data.tags:
                name = run.info.run_name.replace("refit", "second fits")
                tags |= {"outcome": "second fits: full", "mlflow.runName": name}
            for key, value in tags.items():
                writer.set_tag(run_id, key, value)
        rows = rows_in(study.project)
        after = deliver(study)
        assert {run.info.run_id for run in all_runs(study.project)} == before.keys()
        assert rows_in(study.project) == rows
        assert set(after) == {name.replace("refit", "second fits") for name in runs}
        for name, run in runs.items():
            continued = after[name.replace("refit", "second fits")]
            assert (continued.metrics, continued.params) == (run.metrics, run.params)
            assert continued.tags["mlflow.note.content"] == run.tags["mlflow.note.content"]
            assert continued.tags["outcome"] == run.tags["outcome"] if "outcome" in run.tags else True


def test_a_whole_study_arrives_through_the_thread(study: FakeStudy) -> None:
    thread = ViewThread(view_of(study), pause_s=0)
    for outcome in ("complete", "pruned", "complete"):
        study.trial(outcome)  # type: ignore[arg-type]
        thread.wake()
    assert thread.close(120) == 0
    through_thread = read(study.project)
    assert {run.status for name, run in through_thread.items() if name != "fake"} == {"FINISHED"}
    assert through_thread == deliver(study, is_last=True)
