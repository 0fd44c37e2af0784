"""`hpsearch report`: write the report of a study as one HTML file."""

from __future__ import annotations

import click

from hpsearch.cli.options import out_option, study_option, tracking_option
from hpsearch.paths import ProjectPaths


@click.command("report")
@out_option
@study_option
@tracking_option
def command(project: ProjectPaths, study_name: str | None, tracking: str | None) -> None:
    """Write the report of a study as one HTML file.

    Its figures are also written as PNG and PDF. The study may be running. All files are added to the study's run in
    MLflow.

    \b
        hpsearch report
        hpsearch report --study isic2017-64
    """
    from hpsearch.cli.describe import describe_behind, tracker_of_existing
    from hpsearch.errors import TrackingError
    from hpsearch.report.page import write_report
    from hpsearch.store.record import study_record

    record = study_record(project, study_name)
    click.echo(f"report: {write_report(record)}")
    click.echo(f"figures: {record.paths.figures}")
    try:
        if (tracker := tracker_of_existing(project, tracking)) is not None:
            click.echo("adding both to MLflow")
            tracker.view(record.paths).log_report()
    except TrackingError as error:
        # The report is written, so a failure of MLflow is no failure of the command.
        click.echo(f"{describe_behind(record.name, project, tracking, str(error))}, then run this command again")
