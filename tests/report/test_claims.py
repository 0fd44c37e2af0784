from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hpsearch.report.claims import Claims, cross_validation_s
from hpsearch.report.statistics import corrected_gain
from tests.recorded import FakeStudy


@pytest.fixture
def study(tmp_path: Path) -> FakeStudy:
    study = FakeStudy(tmp_path, n_images=40)
    study.trial(**{"train.lr": 0.002})
    study.trial("dropped")
    study.trial(**{"train.lr": 0.05, "unet.depth": 4})
    study.trial(**{"train.lr": 0.048, "unet.depth": 4})
    return study


def claims_of(study: FakeStudy) -> Claims:
    claims = Claims.of(study.record)
    assert claims is not None
    return claims


def test_claims_go_by_the_numbers_of_the_full_trials(study: FakeStudy) -> None:
    claims = claims_of(study)
    assert claims.full == (0, 2, 3)
    assert claims.winner == 2
    assert claims.corrected.method == "first"
    gain = claims.gain(2)
    assert gain is not None
    assert gain == corrected_gain(claims.scores, claims.full.index(2), 0)
    assert claims.gain(0) is None


def test_second_fits_enter_once_the_study_is_confirmed(study: FakeStudy) -> None:
    study.second(2)
    assert claims_of(study).scores.confirmed == ()
    study.confirm(2, 3)
    claims = claims_of(study)
    assert claims.scores.confirmed == (1, 2)
    assert claims.corrected.method == "confirmed"
    both = (study.record.out_of_fold(2) + study.record.second_out_of_fold(2)) / 2
    assert np.allclose(claims.scores.joint[1], both)
    # A full trial that came later opens the choice again.
    study.trial()
    assert claims_of(study).scores.confirmed == ()


def test_dropped_trials_count_with_the_folds_that_they_finished(study: FakeStudy) -> None:
    assert claims_of(study).scores.dropped is None
    for outcome in ("dropped", "failed"):
        trial = study.begin()
        study.fold(trial, 1)
        study.end(trial, outcome)
    (dropped,) = claims_of(study).scores.dropped
    held_out = study.record.folds.held_out(1)
    assert np.isfinite(dropped).sum() == len(held_out)
    assert np.array_equal(dropped[held_out], study.record.final_scores(4, 1))


def test_a_promise_is_made_for_the_winner_alone_and_is_wider_for_fewer_test_images(study: FakeStudy) -> None:
    claims = claims_of(study)
    few, many = (claims.predicted(2, n_test=n) for n in (10, 600))
    assert few is not None
    assert many is not None
    assert few.low < many.low < many.mean < many.high < few.high
    assert claims.predicted(3, n_test=600) is None


def test_the_cheapest_of_the_tied_is_the_one_that_took_the_least_time(study: FakeStudy) -> None:
    claims = claims_of(study)
    assert set(claims.tied) == {2, 3}
    seconds = {number: cross_validation_s(study.record, number) for number in claims.tied}
    assert claims.cheapest_tied(study.record) == min(claims.tied, key=lambda number: seconds[number])
    path = study.record.fit(3, 0).paths.epochs
    path.write_text(path.read_text().replace('"train_s": 1.5', '"train_s": 0.5'))
    assert claims_of(study).cheapest_tied(study.record) == 3


def test_a_study_without_a_full_trial_claims_nothing(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path)
    study.trial("dropped")
    assert Claims.of(study.record) is None
