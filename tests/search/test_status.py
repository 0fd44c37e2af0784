from __future__ import annotations

from pathlib import Path

import pytest

from hpsearch.paths import ProjectPaths
from hpsearch.search.status import forecast
from hpsearch.store.record import StudyRecord
from hpsearch.workers.jobs import WorkerSettings
from tests.workers.test_plan import config, make_plan


def test_the_forecast_counts_folds_refits_and_workers(tmp_path: Path) -> None:
    settings = config("study.trials=10", "study.confirm=2", "search.train.lr={low=0.001, high=0.1}")
    record = StudyRecord.create(ProjectPaths(tmp_path).study("new"), settings)
    one = forecast(record, make_plan(), 1000)
    two = forecast(record, make_plan(workers=(WorkerSettings(), WorkerSettings())), 1000)
    assert (one.n_trials, one.n_replicates, one.n_images) == (10, 2, 1000)
    assert one.total_s == pytest.approx(60 * one.fit_s)
    assert two.total_s == pytest.approx(one.total_s / 2)
