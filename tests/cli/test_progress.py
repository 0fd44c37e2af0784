from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
from rich.console import Console

from hpsearch.cli.progress import StudyProgress
from hpsearch.report.formats import duration
from hpsearch.search import status as statuses
from hpsearch.search.status import study_status
from hpsearch.store.fits import FitRecord
from hpsearch.study import StudySummary
from hpsearch.typed_json import from_json
from hpsearch.workers.jobs import Capacity, ClusterWorker
from hpsearch.workers.plan import ExecutionPlan, Forecast
from tests.recorded import FakeStudy


def test_the_display_reckons_the_time_to_go_as_status_does_with_the_second_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statuses.lock, "is_held", lambda _: True)
    fake = FakeStudy(tmp_path, overrides=("study.confirm=2",))
    progress = StudyProgress("fake", fake.project)
    plan = from_json(ExecutionPlan, fake.record.plan() or {})
    forecast = Forecast(n_trials=6, n_replicates=2, n_images=20, fit_s=600.0, total_s=7200.0, expected_s=7200.0)
    progress.planned(fake.record, plan, forecast)
    assert "ETA 2 h" in shown_by(progress)

    ended = [fake.trial(), fake.trial("pruned"), fake.trial()]
    for trial in ended:
        progress.trial_ended(trial)
    status = study_status(fake.project, "fake")
    of_full = [status.seconds[trial.number] for trial in ended if trial.outcome == "complete"]
    # One worker; three of six trials to go, then two once more.
    expected_s = sum(status.seconds.values()) / 3 * 3 + sum(of_full) / 2 * 2
    assert status.eta_s == pytest.approx(expected_s)
    assert f"ETA {duration(expected_s)}" in shown_by(progress)


def test_the_display_reckons_with_the_workers_that_are_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeStudy(tmp_path)
    progress, plan = StudyProgress("fake", fake.project), from_json(ExecutionPlan, fake.record.plan() or {})
    two = dataclasses.replace(plan, workers=plan.workers * 2)
    progress.planned(
        fake.record, two, Forecast(n_trials=6, n_replicates=0, n_images=20, fit_s=1.0, total_s=60.0, expected_s=60.0)
    )
    ended = fake.trial()
    progress.trial_ended(ended)
    left_s = 5 * study_status(fake.project, "fake").seconds[0]
    assert f"ETA {duration(left_s / 2)}" in shown_by(progress)
    progress.replanned(plan)
    assert f"ETA {duration(left_s)}" in shown_by(progress)


def test_the_study_is_not_read_again_when_a_trial_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeStudy(tmp_path)
    before = [fake.trial(), fake.trial("pruned")]
    progress = StudyProgress("fake", fake.project)
    plan = from_json(ExecutionPlan, fake.record.plan() or {})
    progress.planned(
        fake.record, plan, Forecast(n_trials=4, n_replicates=0, n_images=20, fit_s=1.0, total_s=1.0, expected_s=1.0)
    )
    monkeypatch.setattr("hpsearch.cli.progress.study_status", lambda *_: pytest.fail("the study is read again"))
    read = FitRecord.epochs
    paths: list[Path] = []
    monkeypatch.setattr(FitRecord, "epochs", lambda self: paths.append(self.paths.root) or read(self))
    progress.trial_ended(ended := fake.trial())
    best = max((before[0], ended), key=lambda trial: (trial.value or 0.0, -trial.number))
    assert f"3/6 trials  best {best.value:.4f} (trial {best.number})" in shown_by(progress)
    assert {path.parent.name for path in paths} == {"0002"}


@pytest.mark.parametrize(
    ("trials", "shown"), [((4,), "top candidate (trial 4) with"), ((4, 2), "top candidates (trials 4, 2) with")]
)
def test_the_trials_that_are_refitted_are_named(
    trials: tuple[int, ...], shown: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    StudyProgress("fake", FakeStudy(tmp_path).project).replicating(trials, 0, 2)
    assert shown in capsys.readouterr().out


def test_a_finished_fit_is_marked_as_a_refit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    progress = StudyProgress("fake", FakeStudy(tmp_path).project)
    progress.fold_ended(2, 1, 0.9)
    progress.replicating((2,), 0, 1)
    progress.fold_ended(2, 1, 0.8)
    first, _, second = capsys.readouterr().out.splitlines()
    assert (first, second) == ("trial 2, fold 2: 0.9000", "refit of trial 2, fold 2: 0.8000")


def test_the_forecast_names_the_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake = FakeStudy(tmp_path)
    capacity = Capacity(device="cpu", precision="bf16", memory_bytes=2**30)
    worker = ClusterWorker(address="tcp://a:1", host="a", device_name="CPU", unit="a", threads=1, capacity=capacity)
    plan = dataclasses.replace(from_json(ExecutionPlan, fake.record.plan() or {}), cluster=(worker,))
    forecast = Forecast(n_trials=6, n_replicates=0, n_images=20, fit_s=1.0, total_s=60.0, expected_s=60.0)
    StudyProgress("fake", fake.project).planned(fake.record, plan, forecast)
    assert "of training on this cluster, 1.0 s per fit" in capsys.readouterr().out


def test_a_study_whose_tracking_failed_ends_with_why_and_the_command_that_retries(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeStudy(tmp_path / "a project")
    fake.trial()
    fake.record.write_plan({**(fake.record.plan() or {}), "scheduler": "tcp://lab:8786"})
    summary = StudySummary(fake.record, 1, False, 3, "the server is away")
    StudyProgress("fake", fake.project, "http://user:secret@lab:5000").summarise(summary)
    *_, final, _, report, last = capsys.readouterr().out.splitlines()
    assert final.endswith(f"hpsearch final --best --study fake --out '{tmp_path}/a project' --cluster tcp://lab:8786")
    assert report.endswith(f"hpsearch report --study fake --out '{tmp_path}/a project'")
    assert last.startswith("MLflow is not up to date (the server is away)")
    retry = f"hpsearch track --study fake --out '{tmp_path}/a project' --tracking 'http://***@lab:5000'"
    assert last.endswith(retry)


def test_a_stopped_study_says_how_many_trials_are_done_and_how_many_are_open(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeStudy(tmp_path, overrides=["study.trials=9"])
    fake.trial()
    fake.record.write_evaluation(dataclasses.replace(fake.record.trial(0), number=1, outcome=None, value=None))
    StudyProgress("fake", fake.project, "none").summarise(StudySummary(fake.record, 1, True, 0))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "stopped: 1 of 9 trials done, 1 open. Run the same command again to continue"


def test_what_follows_from_ctrl_c_is_part_of_the_live_display_which_would_overwrite_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    progress = StudyProgress("fake", FakeStudy(tmp_path).project)
    progress.interrupted("Finishing the current epoch")
    assert capfd.readouterr().err == "\nFinishing the current epoch\n"
    progress._live.start()
    assert "Finishing" not in shown_by(progress)
    progress.interrupted("Finishing the current epoch")
    assert "Finishing the current epoch" in shown_by(progress)
    progress._live.stop()
    assert capfd.readouterr().err == ""


def shown_by(progress: StudyProgress) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(progress._render())
    return out.getvalue()
