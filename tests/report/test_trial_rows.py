"""hpsearch/report/trial_rows.py: what figures show is what the record holds."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from hpsearch.errors import RecordError
from hpsearch.report.trial_rows import final_cases, trial_cases
from tests.recorded import TEST_KEY, FakeStudy


@pytest.fixture
def study(tmp_path: Path) -> FakeStudy:
    study = FakeStudy(tmp_path, n_images=40)
    study.trial("complete")
    return study


def test_curves_have_every_epoch_of_every_fold(study: FakeStudy) -> None:
    fits = [fit.epochs() for fit in study.record.fits(0)]
    assert [len(rows) for rows in fits] == [study.n_epochs] * 2
    assert fits[1][2] == study.record.fit(0, 1).epochs()[2]


def test_a_trial_without_epochs_has_no_curves_and_no_cases(study: FakeStudy) -> None:
    study.trial("infeasible")
    assert [fit.epochs() for fit in study.record.fits(1)] == [[], []]
    assert trial_cases(study.record, 1) == []


def test_cases_are_the_best_the_median_and_the_worst_of_all_folds(study: FakeStudy) -> None:
    examples = [np.load(study.record.fit(0, fold).paths.examples) for fold in range(2)]
    scores = np.sort(np.concatenate([table["scores"] for table in examples]).astype(float))
    cases = trial_cases(study.record, 0, n_each=1)
    assert [case.rank for case in cases] == ["best", "median", "worst"]
    assert cases[0].score == scores[-1]
    assert cases[2].score == scores[0]
    median = np.median(study.record.out_of_fold(0))
    assert abs(cases[1].score - median) == np.abs(scores - median).min()


def test_no_image_is_shown_twice_even_where_there_are_few(study: FakeStudy) -> None:
    cases = trial_cases(study.record, 0, n_each=20)
    assert len(cases) == len({case.image_id for case in cases}) == 12


def test_a_case_shows_the_image_that_was_scored(study: FakeStudy) -> None:
    for case in trial_cases(study.record, 0):
        index = study.record.folds.ids.index(case.image_id)
        assert case.score == study.record.out_of_fold(0)[index]
        assert (case.mask == (np.load(next(study.project.cache.glob("0*/masks.npy")))[index] > 0)).all()
        assert case.image.shape == (16, 16, 3)


def test_a_final_shows_test_images(study: FakeStudy) -> None:
    study.final(0)
    folder = study.record.paths.final("trial-0000")
    cases = final_cases(study.record, folder, TEST_KEY)
    assert {case.image_id[:6] for case in cases} == {"ISIC_9"}


def test_images_that_are_gone_are_said_to_be_gone(study: FakeStudy, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(study.project.cache)
    with caplog.at_level("INFO"):
        assert trial_cases(study.record, 0) == []
    assert "no longer contains" in caplog.text


def test_damaged_examples_are_named(study: FakeStudy) -> None:
    path = study.record.fit(0, 0).paths.examples
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RecordError, match=r"examples\.npz is damaged"):
        trial_cases(study.record, 0)
