"""The columns of the report's ranking: one entry in `COLUMNS` each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hpsearch.report.formats import bounds, duration, number, setting
from hpsearch.report.rows import StudyRows, TrialRow


@dataclass(frozen=True)
class Column:
    """A column of the ranking."""

    heading: str
    cell: Callable[[TrialRow, StudyRows], str]
    """Returns the text of a trial's cell."""


def _place(row: TrialRow, rows: StudyRows) -> str:
    """Return `best`, `tied, cheapest`, `tied, two fits`."""
    winner = rows.winner
    assert winner is not None
    labels = {
        "best": row.number == winner.number,
        "tied": row.number in winner.tied and row.number != winner.number,
        "cheapest": row.number == winner.cheapest and len(winner.tied) > 1,
        "two fits": row.is_replicated,
    }
    return ", ".join(name for name, applies in labels.items() if applies)


def _settings(rows: StudyRows) -> list[Column]:
    """Return one column per searched setting."""

    def column(name: str) -> Column:
        return Column(name.partition(".")[2].replace("_", " "), lambda row, _: setting(row.params[name]))

    return [column(name) for name, _ in rows.config.search]


def _mean(row: TrialRow, rows: StudyRows) -> str:
    assert row.statistics is not None
    return number(row.statistics.mean)


def _interval(row: TrialRow, rows: StudyRows) -> str:
    assert row.statistics is not None
    return bounds(row.statistics.total)


def _sd_of_folds(row: TrialRow, rows: StudyRows) -> str:
    assert row.statistics is not None
    return number(row.statistics.sd_folds) if row.statistics.folds is not None else ""


def _interval_over_folds(row: TrialRow, rows: StudyRows) -> str:
    assert row.statistics is not None
    return bounds(row.statistics.folds) if row.statistics.folds is not None else ""


COLUMNS: tuple[Column | Callable[[StudyRows], list[Column]], ...] = (
    Column("trial", lambda row, _: str(row.number)),
    Column("", _place),
    _settings,
    Column("mean", _mean),
    Column("95 % interval", _interval),
    Column("sd of folds", _sd_of_folds),
    Column("over folds (t)", _interval_over_folds),
    Column("time", lambda row, _: duration(row.seconds)),
)
"""From left to right; a function returns the columns that depend on the study."""
