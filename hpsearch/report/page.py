"""Write the report of a study (a self-contained HTML file and figure files), and the cards of retrained models."""

import base64
import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpsearch import paths
from hpsearch.models.network import n_parameters
from hpsearch.report import tables, text
from hpsearch.report.final_record import FinalResult
from hpsearch.report.rows import StudyRows, study_rows
from hpsearch.report.trial_rows import trial_cases
from hpsearch.store.record import StudyRecord
from hpsearch.training.rows import EpochRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_report(record: StudyRecord) -> Path:
    """Write report.html and figures/ for the current state of a study, and return the path of the page.

    Raises RecordError if the study's folder is damaged or has no folds yet, and StorageError if a file cannot be
    written.
    """
    # Matplotlib takes half a second to import, and the other functions do not need it.
    from hpsearch.report.figures import to_bytes

    rows = study_rows(record)
    winner = rows.standing.winner
    fits = [] if winner is None else [fit.epochs() for fit in record.fits(winner)]
    pictures = {}
    for name, figure in _draw(rows, fits):
        png = to_bytes(figure, dpi=150)
        for ending, content in ((".png", png), (".pdf", to_bytes(figure, "pdf"))):
            with paths.atomic_write(record.paths.figures / f"{name}{ending}", sync=False) as temporary:
                temporary.write_bytes(content)
        url = f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
        width, height = (round(96 * inches) for inches in figure.get_size_inches())
        pictures[name] = {"url": url, "width": width, "height": height}
    paths.write_text(record.paths.report, render(rows, pictures, gap=text.gap(fits, rows.metric)))
    return record.paths.report


def render(rows: StudyRows, pictures: Mapping[str, Mapping[str, Any]], *, gap: str = "") -> str:
    """Return the HTML of the report. Figures that are missing from `pictures` are left out.

    pictures: for each figure name, a mapping with `url`, and `width` and `height` in CSS pixels. gap: the sentence
    about overfitting (see `text.gap`).
    """
    return text.render("report.html.jinja", rows=rows, pictures=pictures, gap=gap, text=text, tables=tables)


def model_card(rows: StudyRows, final: FinalResult) -> str:
    """Return the model card of a retrained model as Markdown."""
    config = final.trial.study_config
    return text.render(
        "card.md.jinja",
        rows=rows,
        final=final,
        config=config,
        name=_literal(rows.record.name),
        # Use only the folder's name, because the full path may be private.
        dataset=_literal(Path(config.data.images or config.data.root).name),
        n_parameters=n_parameters(config.unet, config.data.n_channels),
        table=tables.final_scores(rows, final),
    )


def _literal(name: str) -> str:
    """Escape or replace the characters that have a meaning in HTML, Markdown code or Markdown tables."""
    return html.escape(name).replace("`", "'").replace("|", "/").replace("\n", " ")


def _draw(rows: StudyRows, fits: Sequence[Sequence[EpochRow]]) -> Iterator[tuple[str, "Figure"]]:
    """Yield (name, figure) for every figure whose data exist."""
    from hpsearch.report import figures, study_figures

    metric, estimates, dimensions = rows.metric, rows.estimates, dict(rows.config.search)
    if rows.trials:
        yield "race", study_figures.draw_race(rows.trials, rows.standing.ranking, rows.record.n_folds, metric=metric)
    if estimates is None:
        return
    best = estimates.winner
    yield "answer", study_figures.draw_answer(tables.estimates(rows), metric=metric)
    yield "ranking", study_figures.draw_ranking(rows.complete, estimates.tied, estimates.cheapest_tied, metric=metric)
    if rows.importances:
        yield "importances", study_figures.draw_importances(rows.importances)
    if dimensions:
        yield "slices", study_figures.draw_slices(rows.trials, dimensions, best, metric=metric)
    yield "costs", study_figures.draw_costs(rows.complete, best, metric=metric)
    title = f"{rows.record.name}, trial {best}"
    yield "curves", figures.draw_curves(fits, title=title)
    if cases := trial_cases(rows.record, best):
        yield "cases", figures.draw_panels(cases, metric=metric, title=f"{title}: held-out images")
    groups = [(f"{rows.n_images} held-out images, trial {best}", estimates.scores.joint[estimates.corrected.trial])]
    if (final := rows.winner_final) is not None:
        groups.append((f"{final.n_test} test images, retrained", final.scores))
    yield "distribution", study_figures.draw_distribution(groups, metric=metric)
