from __future__ import annotations

from hpsearch.stats.best import rank


def test_the_highest_value_is_best_and_of_equal_ones_the_earlier_trial() -> None:
    assert rank({3: 0.5, 0: 0.5, 2: 0.9, 1: 0.1}) == [2, 0, 3, 1]
    assert rank({5: 0.5, 4: 0.5}) == [4, 5]
    assert rank({}) == []
