"""Write the report of a study: one HTML file that loads nothing, and its figures as PNG and PDF."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hpsearch import paths
from hpsearch.errors import CacheError
from hpsearch.report import final_text, tables, templating, text
from hpsearch.report.rows import StudyRows, study_rows
from hpsearch.report.trial_rows import Case, CurvePoint, trial_cases, trial_curves
from hpsearch.store.record import StudyRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150


@dataclass(frozen=True)
class Picture:
    """A figure as the page shows it."""

    png: bytes
    width: int
    """Width and height in CSS pixels."""
    height: int

    @property
    def url(self) -> str:
        return f"data:image/png;base64,{base64.b64encode(self.png).decode('ascii')}"


def write_report(record: StudyRecord) -> Path:
    """Write report.html and figures/ of a study in its present state, and return the path of the page.

    Raises RecordError if the study's folder is damaged or holds no folds yet, StorageError if the disk refuses.
    """
    # Matplotlib takes half a second to import.
    from hpsearch.report.figures import to_pdf, to_png

    rows = study_rows(record)
    winner = rows.winner.number if rows.winner is not None else None
    points = trial_curves(record, winner) if winner is not None else []
    pictures = {}
    for name, figure in _draw(rows, points, _read_cases(record, winner)):
        png = to_png(figure, dpi=DPI)
        for ending, content in ((".png", png), (".pdf", to_pdf(figure))):
            with paths.atomic_write(record.paths.figures / f"{name}{ending}", sync=False) as temporary:
                temporary.write_bytes(content)
        width, height = figure.get_size_inches()
        pictures[name] = Picture(png, round(96 * width), round(96 * height))
    paths.write_text(record.paths.report, render(rows, pictures, gap=text.gap(points, rows.metric)))
    return record.paths.report


def render(rows: StudyRows, pictures: Mapping[str, Picture], *, gap: str = "") -> str:
    """Return the whole page. Figures that are not among the pictures are left out.

    pictures: by name, as `write_report` draws them. gap: the sentence on overfitting.
    """
    modules = {"text": text, "final_text": final_text, "tables": tables}
    return templating.render("report.html.jinja", rows=rows, pictures=pictures, gap=gap, **modules)


def _read_cases(record: StudyRecord, number: int | None) -> list[Case]:
    """Return the held-out images to show; none if the decoded images were removed to save space."""
    try:
        return trial_cases(record, number) if number is not None else []
    except CacheError:
        return []


def _draw(rows: StudyRows, points: Sequence[CurvePoint], cases: Sequence[Case]) -> Iterator[tuple[str, Figure]]:
    """Yield (name, figure) of every figure that the rows have data for."""
    from hpsearch.report import figures, study_figures

    metric, winner, dimensions = rows.metric, rows.winner, dict(rows.config.search)
    if rows.trials:
        yield "race", study_figures.draw_race(rows.trials, rows.standing.ranking, rows.n_folds, metric=metric)
    if winner is None:
        return
    best = winner.number
    yield "answer", study_figures.draw_answer(tables.estimates(rows), metric=metric)
    yield "ranking", study_figures.draw_ranking(rows.complete, winner.tied, winner.cheapest, metric=metric)
    if rows.importances:
        yield "importances", study_figures.draw_importances(rows.importances)
    if dimensions:
        yield "slices", study_figures.draw_slices(rows.trials, dimensions, best, metric=metric)
        yield "parallel", study_figures.draw_parallel(rows.trials, dimensions, best, metric=metric)
    yield "costs", study_figures.draw_costs(rows.complete, best, metric=metric)
    title = f"{rows.name}, trial {best}"
    yield "curves", figures.draw_curves(points, title=title)
    if cases:
        yield "cases", figures.draw_panels(cases, metric=metric, title=f"{title}: held-out images")
    groups = [(f"{rows.n_images} held-out images, trial {best}", winner.scores)]
    if (final := rows.winner_final) is not None:
        groups.append((f"{final.n_test} test images, retrained", final.scores))
    yield "distribution", study_figures.draw_distribution(groups, metric=metric)
