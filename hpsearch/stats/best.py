"""Define which trial is best and how ties are broken. Every ranking of trials uses this module."""

from collections.abc import Mapping


def rank(values: Mapping[int, float]) -> list[int]:
    """Return the trial numbers sorted by value, highest first. Among equal values, the earlier trial comes first.

    `values` maps each trial number, or row of an array of trials, to its ranking value.
    """
    return sorted(values, key=lambda number: (-values[number], number))
