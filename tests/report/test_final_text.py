"""The paragraphs about a final: what its result means."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from hpsearch.data.duplicates import DuplicatePair
from hpsearch.inference.postprocessing import Decision, Postprocessing, SelectedPostprocessing
from hpsearch.report.final_record import FinalResult
from hpsearch.report.rows import study_rows
from hpsearch.report.text import paragraphs
from hpsearch.stats.intervals import Interval, Paired
from hpsearch.store.test_set_log import LoggedEvaluation
from tests.recorded import FakeStudy


@pytest.fixture(scope="module")
def final(tmp_path_factory: pytest.TempPathFactory) -> FinalResult:
    study = FakeStudy(tmp_path_factory.mktemp("final_text"))
    study.trial()
    study.final(0)
    return study_rows(study.record).finals[0]


def described(final: FinalResult, **fields: Any) -> list[str]:
    """The paragraphs about a final with other fields."""
    return paragraphs("final", final=dataclasses.replace(final, **fields))


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (0.84, "within .* as the search predicted"),
        (0.90, "above .* chance in 2.5 % .* easier"),
        (0.80, "below .* harder"),
    ],
)
def test_a_test_mean_is_compared_with_its_prediction(final: FinalResult, result: float, text: str) -> None:
    test = {"dice": Interval(result, result, result)}
    first, *_ = described(final, predicted=Interval(0.84, 0.82, 0.86), test=test)
    assert re.search(text, first)
    assert "the 95 % prediction interval [0.8200, 0.8600]" in first


def test_only_the_winner_has_a_prediction(final: FinalResult) -> None:
    assert "not the winner of the search (trial 7 is)" in described(final, winner=7, predicted=None)[0]
    assert "not the winner of the search, so" in described(final, winner=None, predicted=None)[0]


@pytest.mark.parametrize(
    ("gain", "taken", "text"),
    [
        (Paired(0.02, 0.01, 0.03, 0.001), True, "threshold 0.4: +0.0200 [+0.0100, +0.0300], used."),
        (Paired(0.02, -0.01, 0.05, 0.2), False, "not used (within noise)."),
        (Paired(-0.02, -0.03, -0.01, 0.001), False, "not used (worse)."),
    ],
)
def test_a_decision_on_post_processing_is_shown_with_its_gain(
    final: FinalResult, gain: Paired, taken: bool, text: str
) -> None:
    decisions = (Decision("flips", True, gain, taken), Decision("threshold", 0.4, gain, taken))
    chosen = SelectedPostprocessing(Postprocessing(), decisions, 20, "first fits of trial 0")
    paragraph = described(final, chosen=chosen)[1]
    assert paragraph.startswith("Post-processing, gains on 20 out-of-fold predictions (first fits of trial 0): test-")
    assert paragraph.endswith(text)
    assert "; threshold 0.4: " in paragraph
    assert "No fold networks of this trial were kept" in described(final, chosen=None)[1]


def test_the_first_five_shared_images_are_named_and_the_rest_counted(final: FinalResult) -> None:
    pairs = tuple(DuplicatePair(f"a{i}", f"b{i}", "train", "test", 0.9) for i in range(7))
    test = {"dice": Interval(0.85, 0.84, 0.86)}
    text = described(final, leaks=pairs, test=test)[-1]
    assert "7 pairs" in text
    assert "a3 and b3, a4 and b4 and 2 more." in text
    assert "a5" not in text
    assert described(final, leaks=pairs, test=test, without_leaks=0.84)[-1].endswith("is 0.8400, not 0.8500.")


def test_the_last_five_earlier_evaluations_are_named_and_the_rest_counted(final: FinalResult) -> None:
    def earlier(number: int) -> LoggedEvaluation:
        score = None if number == 6 else 0.85
        return dataclasses.replace(final.evaluation, id=f"{number}", trial=number, at=float(number), score=score)

    assert described(final)[-1] == "This is the first evaluation of these 12 test images."
    evaluations = (*map(earlier, range(7)), final.evaluation)
    text = described(final, evaluations=evaluations, n_evaluations_before=7)
    named = ", ".join(f"1970-01-01 00:00 UTC fake trial {i} (0.8500)" for i in (2, 3, 4, 5))
    assert f": {named}, 1970-01-01 00:00 UTC fake trial 6 (not finished) and 2 more." in text[-2]
    assert text[-1].startswith("Caution: 7 evaluations took place before this study began.")


def test_a_final_of_version_0_1_without_later_fields_is_described(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path)
    study.trial()
    study.final(0)
    (row,) = study_rows(study.record).finals
    assert (row.official, row.chosen, row.chosen_test, row.ensemble, row.leaks) == ({}, None, {}, None, ())
    assert len(described(row)) == 3
