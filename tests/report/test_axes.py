"""hpsearch/report/axes.py: values lie where their dimension says."""

from __future__ import annotations

import pytest

from hpsearch.config.search import Choice, Range
from hpsearch.report.axes import floor_of, position


@pytest.mark.parametrize(
    ("dimension", "value", "place"),
    [
        (Range(low=2, high=4), 3, 0.5),
        (Range(low=0.001, high=0.1, log=True), 0.01, 0.5),
        (Range(low=3, high=3), 3, 0.5),
        (Choice(("rgb", "grayscale")), "grayscale", 1.0),
        (Choice((8,)), 8, 0.5),
        (Choice(((64, 48), (96, 72), (128, 96))), [96, 72], 0.5),
    ],
)
def test_a_value_has_its_place_in_its_dimension(dimension: Choice | Range, value: object, place: float) -> None:
    assert position(dimension, value) == pytest.approx(place)


def test_collapsed_trials_lie_below_the_floor_and_good_ones_above_it() -> None:
    good = [0.80, 0.81, 0.82, 0.83]
    assert 0.1 < floor_of([0.1, *good]) <= 0.80
    assert floor_of(good) == 0.80
    assert floor_of([0.8, 0.8]) < 0.8
    assert floor_of([]) == 0.0
