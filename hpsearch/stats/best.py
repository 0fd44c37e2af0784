"""Define which trial is best and how ties break. Every ranking of trials goes through this module."""

from collections.abc import Mapping


def rank(values: Mapping[int, float]) -> list[int]:
    """Return the trial numbers by their values, best first: the highest value, and of equal values the earlier trial.

    `values` maps a trial number, or a row of an array of trials, to the value that it is ranked by.
    """
    return sorted(values, key=lambda number: (-values[number], number))
