"""`hpsearch report` and `hpsearch track`: write the report of a study, and update MLflow."""

import click

import hpsearch
from hpsearch.cli.describe import describe_behind, tracker_of_existing
from hpsearch.cli.options import storage_option, study_options, study_options_with, tracking_option
from hpsearch.errors import TrackingError
from hpsearch.paths import ProjectPaths
from hpsearch.store import lock


@click.command("report")
@study_options
@tracking_option
def report(project: ProjectPaths, study_name: str | None, tracking: str | None) -> None:
    """Write the report of a study as one HTML file.

    The figures are also written as PNG and PDF files, and all files are added to the study's run in MLflow. The
    command also works while the study is running.

    \b
        hpsearch report
        hpsearch report --study isic2017-64
    """
    record = hpsearch.study_record(project, study_name)
    click.echo(f"report: {hpsearch.write_report(record)}\nfigures: {record.paths.figures}")
    try:
        if (tracker := tracker_of_existing(project, tracking)) is not None:
            click.echo("adding both to MLflow")
            tracker.view(record.paths).log_report()
    except TrackingError as error:
        # The report has been written, so the command succeeds even if MLflow fails.
        click.echo(f"{describe_behind(record.name, project, tracking, str(error))}, then run this command again")


@click.command("track")
@study_options_with("all studies")
@tracking_option
@storage_option
@click.option(
    "--rebuild", is_flag=True, help="Delete the study's runs and log them again; your notes and tags are lost."
)
def track(
    project: ProjectPaths, study_name: str | None, tracking: str | None, storage: str | None, rebuild: bool
) -> int:
    """Update MLflow and Optuna's database from the study folders.

    Everything that is missing from them is added, for one study (--study) or for all studies.
    """
    from hpsearch.search.optuna_view import OptunaView
    from hpsearch.store.record import no_study

    names = [study_name] if study_name else project.study_names()
    if not names:
        raise no_study(project)
    tracker = hpsearch.make_tracker(project, tracking)
    if tracker is None:
        raise TrackingError("--tracking none turns tracking off: leave it out, or give a URI")
    n_behind = 0
    for name in names:
        study = hpsearch.study_record(project, name).paths
        view = tracker.view(study)
        # A running study updates MLflow itself, and two processes must not update it at the same time.
        with lock.hold(study):
            if rebuild:
                n_deleted, n_logged = view.rebuild()
                click.echo(f"{name}: {n_deleted} runs deleted, {n_logged} logged")
            else:
                view.update(is_last=True)
            OptunaView(study, storage).update(is_last=True)
            left = view.n_behind()
        click.echo(f"{name}: {'up to date' if not left else f'{left} runs are not up to date'} at {tracker.uri}")
        n_behind += left
    return 1 if n_behind else 0
