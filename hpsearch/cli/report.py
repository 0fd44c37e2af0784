"""`hpsearch report`: one HTML file for a study."""

from __future__ import annotations

import click

from hpsearch.cli.options import out_option, study_option, tracking_option
from hpsearch.paths import ProjectPaths


@click.command("report")
@out_option
@study_option
@tracking_option
def command(project: ProjectPaths, study_name: str | None, tracking: str | None) -> None:
    """Write a study's report as one HTML file, and its figures as PNG and PDF. It may still be running.

    MLflow gets both too, as files of the study's run.

    \b
        hpsearch report
        hpsearch report --study isic2017-64
    """
    from hpsearch.cli.progress import undelivered
    from hpsearch.errors import TrackingError
    from hpsearch.report.page import write_report
    from hpsearch.store.record import study_record
    from hpsearch.tracking import make_tracker

    record = study_record(project, study_name)
    click.echo(f"report: {write_report(record)}")
    click.echo(f"figures: {record.paths.figures}")
    if tracking == "none":
        return
    try:
        if (tracker := make_tracker(project, tracking)) is not None:
            click.echo("adding both to MLflow")
            tracker.view(record.paths).log_report()
    except TrackingError as error:
        # The report is written; MLflow may lag behind.
        click.echo(f"{undelivered(record.name, project, tracking, str(error))}, then run this command again")
