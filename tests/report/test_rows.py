from __future__ import annotations

from pathlib import Path

import pytest

from hpsearch.errors import RecordError
from hpsearch.report import tables, text
from hpsearch.report.rows import N_TEST, study_rows
from hpsearch.search.importance import MIN_TRIALS
from tests.recorded import FakeStudy

FIT_S = 1.75
"""Training and evaluation of one epoch of the fake study."""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> FakeStudy:
    """Every outcome, an open trial, and one final."""
    study = FakeStudy(tmp_path_factory.mktemp("rows"))
    study.trial(**{"train.lr": 0.002})
    study.trial(**{"train.lr": 0.05, "unet.depth": 4})
    for outcome in ("pruned", "infeasible", "diverged", "failed"):
        study.trial(outcome)
    study.final(1)
    study.epoch(study.begin(), 0)
    return study


def test_every_trial_becomes_a_row_with_what_it_cost(study: FakeStudy) -> None:
    rows = study_rows(study.record)
    outcomes = [row.outcome for row in rows.trials]
    assert outcomes == ["complete", "complete", "pruned", "infeasible", "diverged", "failed", "open"]
    assert rows.trials[1].seconds == pytest.approx(2 * 3 * FIT_S)
    assert rows.trials[1].whole_s == pytest.approx(2 * 3 * FIT_S)
    assert rows.trials[2].epochs == (1, 0)
    assert rows.trials[2].seconds == pytest.approx(FIT_S)
    assert rows.trials[2].whole_s == pytest.approx(6 * FIT_S)
    assert rows.trials[3].whole_s == 0
    assert rows.n_counted == 5
    assert not rows.is_running


def test_settings_that_a_trial_left_at_their_default_are_in_its_row(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path)
    study.trial()
    (row,) = study_rows(study.record).trials
    assert row.params == {"unet.depth": 3, "unet.base_channels": 8, "train.lr": 0.05}


def test_the_winner_is_the_best_full_trial_and_its_mean_is_the_one_on_record(study: FakeStudy) -> None:
    found = study_rows(study.record).estimates
    best = study.record.best()
    assert found is not None
    assert best is not None
    assert found.winner == best.number == 1
    assert found.statistics[1].mean == pytest.approx(study.record.value(1), abs=1e-9)
    assert found.corrected.naive == pytest.approx(study.record.value(1), abs=1e-9)
    gain = found.gain(1)
    assert gain is not None
    assert gain.difference == pytest.approx(study.record.value(1) - study.record.value(0), abs=1e-9)
    assert found.winner in found.tied
    assert found.cheapest_tied in found.tied


def test_the_race_counts_full_and_dropped_trials_only(study: FakeStudy) -> None:
    (sentence,) = text.paragraphs("race", rows=study_rows(study.record))
    assert sentence.startswith("1 of 3 trials (33%) was pruned before the last fold, 1 of them in the first fold.")
    assert f"took {13 * FIT_S:.0f} s of training, {13 / 18:.0%} of the {18 * FIT_S:.0f} s" in sentence


def test_a_final_of_the_winner_comes_with_what_was_promised_for_so_many_images(study: FakeStudy) -> None:
    rows = study_rows(study.record)
    (final,) = rows.finals
    assert final.trial.number == rows.standing.winner
    assert ("predicted for 12 test images", final.predicted) in tables.estimates(rows)
    assert final.n_test == len(final.scores) == 12
    assert final.cv_scores["dice"].mean == pytest.approx(study.record.value(1), abs=1e-6)
    assert final.n_trials_after == 1


def test_a_final_of_another_trial_was_promised_nothing(study: FakeStudy, tmp_path: Path) -> None:
    study = FakeStudy(tmp_path)
    study.trial(**{"train.lr": 0.002})
    study.trial(**{"train.lr": 0.05, "unet.depth": 4})
    study.final(0)
    rows = study_rows(study.record)
    assert rows.finals[0].predicted is None
    assert f"predicted for {N_TEST} test images" in dict(tables.estimates(rows))


def test_a_study_without_a_trial_and_one_without_a_full_trial_have_no_winner(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path)
    rows = study_rows(study.record)
    assert (rows.trials, rows.estimates, rows.updated_at) == ((), None, 0.0)
    study.trial("diverged")
    rows = study_rows(study.record)
    assert (len(rows.trials), rows.estimates) == (1, None)
    assert text.paragraphs("race", rows=rows) == ["No trial has reached a pruning decision yet."]


def test_one_trial_is_its_own_winner_without_a_correction_or_a_gain(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path)
    study.trial()
    found = study_rows(study.record).estimates
    assert found is not None
    assert found.corrected.method == "single"
    assert found.corrected.mean == found.corrected.naive
    assert found.gain(0) is None
    assert found.tied == (0,)


def test_importances_wait_until_there_are_enough_trials_and_then_name_what_matters(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path, n_images=8, epochs=1)
    for number in range(MIN_TRIALS - 1):
        study.trial(**{"train.lr": 0.001 * 2**number, "unet.depth": 3, "unet.base_channels": 8})
    assert study_rows(study.record).importances == {}
    study.trial(**{"train.lr": 0.15, "unet.depth": 2, "unet.base_channels": 8})
    found = study_rows(study.record).importances
    assert next(iter(found)) == "train.lr"
    assert sum(found.values()) == pytest.approx(1)
    assert found == study_rows(study.record).importances


def test_a_damaged_table_of_test_scores_is_named(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path)
    study.trial()
    study.final(0)
    study.record.paths.final("trial-0000").table.write_text("image,dice\nISIC_1,good\n")
    with pytest.raises(RecordError, match=r"test\.csv"):
        study_rows(study.record)
