"""Write the card of a final model: what it is, what it was trained on, what it scores, and its limits."""

from __future__ import annotations

import html
from pathlib import Path

from hpsearch.config import StudyConfig
from hpsearch.models.costs import n_parameters
from hpsearch.report import final_text, tables, templating, text
from hpsearch.report.finals import FinalRow
from hpsearch.report.rows import StudyRows, study_rows
from hpsearch.store.record import StudyRecord


def model_card(record: StudyRecord, name: str) -> str:
    """Return the card, in Markdown, of the final of that name (`trial-0007`), whose result must be on record.

    Raises RecordError if the study's folder is damaged.
    """
    rows = study_rows(record)
    final = next(final for final in rows.finals if final.name == name)
    return render(rows, final, record.trial(final.trial).study_config)


def render(rows: StudyRows, final: FinalRow, config: StudyConfig) -> str:
    """Return the card of a final with its configuration."""
    return templating.render(
        "card.md.jinja",
        rows=rows,
        final=final,
        config=config,
        name=_literal(rows.name),
        # Only the folder's own name: where it lies is private.
        dataset=_literal(Path(config.data.images or config.data.root).name),
        n_parameters=n_parameters(config.unet, config.data.n_channels),
        methods=text.methods(rows),
        table=tables.final_scores(rows, final),
        sentences=final_text.describe_final(final, rows.metric, rows.winner.number if rows.winner else None),
    )


def _literal(name: str) -> str:
    """Escape everything that Markdown would interpret."""
    return html.escape(name).replace("`", "'").replace("|", "/").replace("\n", " ")
