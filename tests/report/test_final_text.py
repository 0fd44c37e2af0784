"""hpsearch/report/final_text.py: what a final result means, in sentences."""

from __future__ import annotations

import re

import pytest

from hpsearch.data.duplicates import DuplicatePair
from hpsearch.inference.postprocessing import Decision, Postprocessing, SelectedPostprocessing
from hpsearch.report.final_text import compare, describe_leaks, describe_postprocessing
from hpsearch.stats.intervals import Interval, Paired


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (0.84, "within .* as the search predicted"),
        (0.90, "above .* chance in 2.5 % .* easier"),
        (0.80, "below .* harder"),
    ],
)
def test_a_test_mean_is_compared_with_its_prediction(result: float, text: str) -> None:
    assert re.search(text, compare(Interval(0.84, 0.82, 0.86), result, 0))


def test_only_the_winner_has_a_prediction() -> None:
    assert "not the winner of the search (trial 7 is)" in compare(None, 0.84, 7)


@pytest.mark.parametrize(
    ("gain", "taken", "text"),
    [
        (Paired(0.02, 0.01, 0.03, 0.001), True, "threshold 0.4: +0.0200 [+0.0100, +0.0300], used."),
        (Paired(0.02, -0.01, 0.05, 0.2), False, "not used (within noise)."),
        (Paired(-0.02, -0.03, -0.01, 0.001), False, "not used (worse)."),
    ],
)
def test_a_decision_on_post_processing_is_shown_with_its_gain(gain: Paired, taken: bool, text: str) -> None:
    chosen = SelectedPostprocessing(
        Postprocessing(), (Decision("threshold", 0.4, gain, taken),), 20, "first fits of trial 0"
    )
    assert describe_postprocessing(chosen).endswith(text)


def test_the_first_five_shared_images_are_named_and_the_rest_counted() -> None:
    pairs = [DuplicatePair(f"a{i}", f"b{i}", "train", "test", 0.9) for i in range(7)]
    text = describe_leaks(pairs, 0.85, None)
    assert "7 pairs" in text
    assert "a4 and b4 and 2 more." in text
    assert "a5" not in text
    assert describe_leaks(pairs, 0.85, 0.84).endswith("the mean is 0.8400, not 0.8500.")
