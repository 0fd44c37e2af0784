from __future__ import annotations

from pathlib import Path

import pytest

from hpsearch.paths import ProjectPaths
from hpsearch.search.status import forecast, study_status
from hpsearch.store.record import StudyRecord
from hpsearch.workers.jobs import WorkerSettings
from tests.recorded import FakeStudy
from tests.workers.test_plan import config, make_plan


def test_the_forecast_counts_folds_refits_and_workers(tmp_path: Path) -> None:
    settings = config("study.trials=10", "study.confirm=2", "search.train.lr={low=0.001, high=0.1}")
    record = StudyRecord.create(ProjectPaths(tmp_path).study("new"), settings)
    one = forecast(record, make_plan(), 1000)
    two = forecast(record, make_plan(workers=(WorkerSettings(), WorkerSettings())), 1000)
    assert (one.n_trials, one.n_replicates, one.n_images) == (10, 2, 1000)
    assert one.total_s == pytest.approx(60 * one.fit_s)
    assert two.total_s == pytest.approx(one.total_s / 2)
    # 10 first folds, a further one, 4 more of two trials, and 5 of each of their refits.
    assert one.expected_s == pytest.approx((10 + 1 + 2 * 4 + 2 * 5) * one.fit_s)
    unpruned = StudyRecord.create(ProjectPaths(tmp_path).study("all"), config("study.trials=10", "study.pruner=none"))
    assert (found := forecast(unpruned, make_plan(), 1000)).expected_s == found.total_s


def test_more_open_trials_than_requested_leave_no_further_ones(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path, overrides=("study.trials=1",))
    study.begin()
    study.begin()
    status = study_status(study.project, study.record.name)
    assert (status.n_new, status.gain_probability) == (0, 1.0)
