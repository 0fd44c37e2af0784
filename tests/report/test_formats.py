"""hpsearch/report/formats.py: numbers and names as people read them."""

from __future__ import annotations

import pytest

from hpsearch.config.search import Choice, Range
from hpsearch.report.formats import count, dimension, interval, setting, timestamp
from hpsearch.stats.intervals import Interval, Paired


def test_a_dimension_is_described_as_people_write_it() -> None:
    assert dimension(Range(low=0.001, high=0.3, log=True)) == "0.001 to 0.3, logarithmic"
    assert dimension(Range(low=2, high=8, step=2)) == "2 to 8 in steps of 2"
    assert dimension(Choice(((64, 48), (96, 72)))) == "64x48, 96x72"


@pytest.mark.parametrize(("n", "text"), [(0, "0 epochs"), (1, "1 epoch"), (2, "2 epochs")])
def test_one_thing_is_singular(n: int, text: str) -> None:
    assert count(n, "epoch") == text


def test_an_interval_has_four_digits_and_signs_of_equal_width() -> None:
    assert interval(Interval(0.85, 0.84001, 0.86)) == "0.8500 [0.8400, 0.8600]"
    gain = Paired(0.0123, -0.01, 0.0345, 0.4)
    assert interval(gain, signed=True) == "+0.0123 [\N{MINUS SIGN}0.0100, +0.0345]"


def test_settings_have_three_digits_and_times_are_utc() -> None:
    assert [setting(each) for each in (0.012345, (256, 192), "rgb")] == ["0.0123", "256x192", "rgb"]
    assert timestamp(1_760_000_000.0) == "2025-10-09 08:53 UTC"
