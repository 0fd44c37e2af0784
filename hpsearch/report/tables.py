"""Build the tables of a study: the best configuration, the ranking, incomplete trials, test scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hpsearch import __version__
from hpsearch.report import text
from hpsearch.report.columns import COLUMNS
from hpsearch.report.finals import FinalRow
from hpsearch.report.formats import SCORES, dimension, duration, interval, number, setting
from hpsearch.report.rows import StudyRows
from hpsearch.stats.intervals import Interval

PUBLISHED: dict[str, tuple[float | None, ...]] = {
    "dice": (0.849, None, None),
    "jaccard": (0.765, 0.762, 0.760),
    "accuracy": (0.934, None, None),
    "sensitivity": (0.825, None, None),
    "specificity": (0.975, None, None),
}
"""First, second and third place of the ISIC-2017 Part 1 challenge."""


@dataclass(frozen=True)
class Table:
    """A table of texts. The first cell of a line is its heading."""

    head: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    shaded: tuple[bool, ...] = ()
    """Whether a line is highlighted; empty if none is."""

    @property
    def is_numeric(self) -> list[bool]:
        """Whether each column holds numbers only, which are aligned to the right."""
        return [all(_is_number(cell) for cell in column) for column in zip(*self.lines, strict=True)]


def estimates(rows: StudyRows) -> list[tuple[str, Interval]]:
    """Return (name, interval) of everything that is known about the winner's score."""
    winner, final = rows.winner, rows.winner_final
    assert winner is not None
    predicted = final.predicted if final is not None and final.predicted is not None else winner.predicted
    plain = "validation, plain" if rows.is_fixed_split else "cross-validation, plain"
    result = [(plain, winner.statistics.total)]
    if winner.corrected.method != "single":
        result.append(("corrected for selection", winner.corrected.interval))
    result.append((f"predicted for {winner.n_predicted} test images", predicted))
    return result if final is None else [*result, (f"test, {final.n_test} images", final.test[rows.metric])]


def best_configuration(rows: StudyRows) -> Table:
    """Return the searched settings of the best trial beside those of the default."""
    assert rows.winner is not None
    best, default = rows.trial(rows.winner.number), rows.trials[0]
    return Table(
        ("setting", f"best (trial {best.number})", f"default (trial {default.number})", "searched"),
        tuple(
            (name, setting(value), setting(default.params.get(name, "")), dimension(searched))
            for (name, value), (_, searched) in zip(best.params.items(), rows.config.search, strict=True)
        ),
    )


def ranking(rows: StudyRows) -> Table:
    """Return all complete trials, best first, with the columns of `COLUMNS`; those tied with the best are shaded."""
    assert rows.winner is not None
    columns = [column for group in COLUMNS for column in (group(rows) if callable(group) else (group,))]
    lines = tuple(tuple(column.cell(row, rows) for column in columns) for row in rows.complete)
    heads = tuple(column.heading for column in columns)
    return Table(heads, lines, tuple(row.number in rows.winner.tied for row in rows.complete))


def incomplete_trials(rows: StudyRows) -> Table:
    """Return the trials that were not evaluated on all folds, with the place and the reason."""
    return Table(
        ("trial", "outcome", "ended at", "estimate", "time", "reason"),
        tuple(
            (
                str(row.number),
                row.outcome,
                text.stopped_at(row, rows.n_folds),
                number(row.value) if row.value is not None else "",
                duration(row.seconds),
                text.reason(row),
            )
            for row in rows.trials
            if row.outcome != "complete"
        ),
    )


def final_scores(rows: StudyRows, final: FinalRow, *, with_published: bool = False) -> Table:
    """Return every score out of fold and on the test images, optionally beside the published results."""
    columns: dict[str, Mapping[str, Interval]] = {
        f"cross-validation, {rows.n_images} images": final.cv,
        f"test, {final.n_test} images": final.test,
    }
    if final.chosen_test:
        columns["test, post-processed"] = final.chosen_test
    if final.ensemble is not None:
        columns[f"test, ensemble of {final.ensemble.n_networks}"] = final.ensemble.test
    if final.official:
        columns["test, original resolution"] = final.official
    names = [name for name in SCORES if name in final.test or name in final.official]
    places = ("challenge, 1st", "2nd", "3rd") if with_published else ()
    lines = []
    for name in names:
        ours = (interval(scores[name]) if name in scores else "" for scores in columns.values())
        published = ("" if score is None else f"{score:.3f}" for score in PUBLISHED.get(name, (None,) * 3))
        lines.append((SCORES[name], *ours, *(published if with_published else ())))
    return Table(("score", *columns, *places), tuple(lines))


def facts(rows: StudyRows) -> Table:
    """Return what the results depend on besides the settings."""
    names = {"device_name": "processor", "platform": "operating system"}
    machine = ((names.get(name, name), value) for name, value in rows.machine.items())
    study = (("seed", str(rows.config.study.seed)), ("hpsearch", __version__))
    return Table(("", ""), (*study, ("folds", rows.folds), ("data key", rows.data_key), *machine))


def _is_number(cell: str) -> bool:
    return cell.strip("+-[], 0123456789.kMGexinhs\N{MINUS SIGN}") == ""
