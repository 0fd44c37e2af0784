"""`hpsearch report`: one HTML file for a study."""

from __future__ import annotations

import click

from hpsearch.cli.options import out_option, study_option
from hpsearch.paths import ProjectPaths


@click.command("report")
@out_option
@study_option
def command(project: ProjectPaths, study_name: str | None) -> None:
    """Write a study's report as one HTML file, and its figures as PNG and PDF. It may still be running.

    \b
        hpsearch report
        hpsearch report --study isic2017-64
    """
    from hpsearch.report.html import write_report
    from hpsearch.tuning.record import study_record

    record = study_record(project, study_name)
    click.echo(f"report: {write_report(record)}")
    click.echo(f"figures: {record.paths.figures}")
