from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hpsearch.report.estimates import Estimates
from hpsearch.stats.selection import corrected_gain
from tests.recorded import FakeStudy


@pytest.fixture
def study(tmp_path: Path) -> FakeStudy:
    study = FakeStudy(tmp_path, n_images=40)
    study.trial(**{"train.lr": 0.002})
    study.trial("pruned")
    study.trial(**{"train.lr": 0.05, "unet.depth": 4})
    study.trial(**{"train.lr": 0.048, "unet.depth": 4})
    return study


def estimates_of(study: FakeStudy) -> Estimates:
    estimates = Estimates.of(study.record)
    assert estimates is not None
    return estimates


def seconds_of(study: FakeStudy, number: int) -> float:
    return sum(row.seconds for fold in range(2) for row in study.record.fit(number, fold).epochs())


def test_estimates_use_the_numbers_of_the_complete_trials(study: FakeStudy) -> None:
    estimates = estimates_of(study)
    assert estimates.complete == (0, 2, 3)
    assert estimates.winner == 2
    assert estimates.corrected.method == "first"
    gain = estimates.gain(2)
    assert gain is not None
    assert gain == corrected_gain(estimates.scores, estimates.complete.index(2), 0)
    assert estimates.gain(0) is None


def test_replicates_enter_once_all_have_ended(study: FakeStudy) -> None:
    study.replicate(2)
    assert estimates_of(study).scores.replicated == ()
    study.confirm(2, 3)
    estimates = estimates_of(study)
    assert estimates.scores.replicated == (1, 2)
    assert estimates.corrected.method == "confirmed"
    both = (study.record.out_of_fold(2) + study.record.out_of_fold(2, replicate=1)) / 2
    assert np.allclose(estimates.scores.joint[1], both)
    # A full trial that came later opens the choice again.
    study.trial()
    assert estimates_of(study).scores.replicated == ()


def test_pruned_trials_count_with_the_folds_that_they_finished(study: FakeStudy) -> None:
    assert estimates_of(study).scores.pruned is None
    for outcome in ("pruned", "failed"):
        trial = study.begin()
        study.fold(trial, 1)
        study.end(trial, outcome)
    (pruned,) = estimates_of(study).scores.pruned
    held_out = study.record.folds.held_out(1)
    assert np.isfinite(pruned).sum() == len(held_out)
    assert np.array_equal(pruned[held_out], study.record.final_scores(study.record.fit(4, 1), 1))


def test_a_prediction_is_made_for_the_winner_only_and_is_wider_for_fewer_test_images(study: FakeStudy) -> None:
    estimates = estimates_of(study)
    few, many = (estimates.predicted(n_test=n) for n in (10, 600))
    assert few.low < many.low < many.mean < many.high < few.high
    assert estimates.of_final(2, n_test=600, n_runs=1)["predicted"] == many
    assert estimates.of_final(3, n_test=600, n_runs=1)["predicted"] is None


def test_the_cheapest_of_the_tied_is_the_one_that_took_the_least_time(study: FakeStudy) -> None:
    estimates = estimates_of(study)
    assert set(estimates.tied) == {2, 3}
    seconds = {number: seconds_of(study, number) for number in estimates.tied}
    assert estimates.cheapest_tied == min(estimates.tied, key=lambda number: seconds[number])
    path = study.record.fit(3, 0).paths.epochs
    path.write_text(path.read_text().replace('"train_s": 1.5', '"train_s": 0.5'))
    assert estimates_of(study).cheapest_tied == 3


def test_a_study_without_a_complete_trial_has_no_estimates(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path)
    study.trial("pruned")
    assert Estimates.of(study.record) is None
