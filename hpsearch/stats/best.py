"""Define which trial is best and how ties break. Every ranking of trials goes through this module."""

from __future__ import annotations

from collections.abc import Mapping


def rank(values: Mapping[int, float]) -> list[int]:
    """Return the trial numbers by their values, best first: the highest value, and of equal values the earlier trial.

    `values` maps a trial number, or a row of an array of trials, to the value that it is ranked by.
    """
    return sorted(values, key=lambda number: (-values[number], number))


def best(values: Mapping[int, float]) -> int | None:
    """Return the number that `rank` puts first; None without any trial."""
    return next(iter(rank(values)), None)
