"""hpsearch/report/text.py: sentences about a study that say what its rows hold."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest

from hpsearch.report import text
from hpsearch.report.rows import StudyRows, study_rows
from hpsearch.stats.intervals import Paired
from tests.recorded import FakeStudy
from tests.report.test_figures import epoch_row


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> StudyRows:
    study = FakeStudy(tmp_path_factory.mktemp("text"))
    study.trial(**{"train.lr": 0.03})
    study.trial(**{"train.lr": 0.05, "unet.depth": 4})
    study.trial("pruned")
    study.trial("infeasible")
    return study_rows(study.record)


def changed(rows: StudyRows, **fields: Any) -> str:
    """The answer for estimates with other fields."""
    estimates = copy.copy(rows.estimates)
    # The fields are cached properties and methods, which an entry of the instance replaces.
    vars(estimates).update(fields)
    return " ".join(text.paragraphs("answer", rows=dataclasses.replace(rows, estimates=estimates)))


def methods(rows: StudyRows) -> str:
    return " ".join(text.paragraphs("methods", rows=rows))


def test_progress_counts_trials_by_outcome(rows: StudyRows) -> None:
    assert text.progress(rows) == "3 of 6 trials: 2 complete, 1 pruned, 1 infeasible"


@pytest.mark.parametrize(
    ("low", "meaning"), [(0.01, "more than chance explains."), (-0.01, "the default may be equally good.")]
)
def test_a_gain_is_explained_by_its_interval(rows: StudyRows, low: float, meaning: str) -> None:
    assert meaning in changed(rows, gain=lambda trial: Paired(0.02, low, 0.05, 0.03))


def test_an_unknown_gain_and_a_default_that_wins_are_said(rows: StudyRows) -> None:
    assert "was not evaluated on all folds, so the gain over it is unknown." in changed(rows, gain=lambda trial: None)
    assert "the search has found nothing better so far." in changed(rows, is_default=True)


def test_ties_are_named_up_to_ten_and_the_cheapest_with_its_share_of_the_time(rows: StudyRows) -> None:
    assert "no other configuration is tied with it." in changed(rows, tied=(1,))
    assert "trial 1 and trial 0. Trial 1 is also the cheapest of them." in changed(rows, tied=(1, 0), cheapest_tied=1)
    half = dataclasses.replace(rows.trials[0], seconds=rows.trials[1].seconds / 2)
    faster = dataclasses.replace(rows, trials=(half, *rows.trials[1:]))
    assert "is trial 0, which took 50% of the time of the best." in changed(faster, tied=(1, 0), cheapest_tied=0)
    many = changed(rows, tied=(1, *range(10, 22)), cheapest_tied=1)
    assert "trial 1 and trials 10, 11, 12, 13, 14, 15, 16, 17, 18, 19 and 2 more." in many


def test_the_selection_bias_is_the_first_mean_less_the_corrected_one(rows: StudyRows) -> None:
    assert rows.estimates is not None
    corrected = rows.estimates.corrected
    for naive, sentence in (
        (0.01, "by an estimated 0.0100."),
        (0.0, "there is no sign of selection bias in that mean."),
    ):
        assert sentence in changed(rows, corrected=dataclasses.replace(corrected, naive=corrected.mean + naive))
    higher = dataclasses.replace(corrected, naive=corrected.mean - 0.02)
    assert "the corrected estimate is 0.0200 higher than that mean" in changed(rows, corrected=higher)


def test_the_gap_is_the_mean_over_folds_at_half_time_and_at_the_end() -> None:
    fits = [[epoch_row(epoch, 0.5 + 0.1 * epoch, 0.5) for epoch in (1, 2, 3, 4)]] * 2
    assert "After epoch 4, the Dice on training images minus that on held-out images is +0.4000" in text.gap(
        fits, "dice"
    )
    assert "after epoch 2 it was +0.2000" in text.gap(fits, "dice")
    assert text.gap([[epoch_row(1, 0.5, None)]], "dice") == ""


def test_the_methods_name_the_pruner_and_the_replicates(rows: StudyRows) -> None:
    assert "the probability that its value exceeds that of the leading trial by 0.003 was below 0.01" in methods(rows)
    assert "refitted" not in methods(rows)
    study = dataclasses.replace(rows.config.study, pruner="median")
    other = dataclasses.replace(rows, config=dataclasses.replace(rows.config, study=study))
    assert "Trials were pruned by Optuna's median pruner." in methods(other)
    replicated = dataclasses.replace(rows, standing=dataclasses.replace(rows.standing, confirmed=(1,)))
    assert "the configuration that was best on most bootstrap samples of the images was refitted" in methods(
        replicated
    )
