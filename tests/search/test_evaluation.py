from __future__ import annotations

from pathlib import Path

import pytest

from hpsearch.search.evaluation import Evaluation
from hpsearch.store.fits import FitRecord
from tests.recorded import FakeStudy


def test_finished_fits_are_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeStudy(tmp_path)
    trial = fake.trial("pruned")
    evaluation = Evaluation(fake.record, trial, trial.study_config)
    assert evaluation.open_fits().finished == set(fake.record.finished_folds(trial.number))
    monkeypatch.setattr(FitRecord, "is_finished", property(lambda _: pytest.fail("the folder is read again")))
    evaluation.finished.add(1)
    assert 1 in evaluation.open_fits().finished
