"""`hpsearch track`: bring MLflow up to date with the record."""

from __future__ import annotations

import click

from hpsearch.cli.options import out_option, study_option, tracking_option
from hpsearch.paths import ProjectPaths


@click.command("track")
@out_option
@study_option
@tracking_option
@click.option("--rebuild", is_flag=True, help="Also mend what contradicts the record, and paths of a moved project.")
def command(project: ProjectPaths, study_name: str | None, tracking: str | None, rebuild: bool) -> int:
    """Deliver to MLflow what is on record and not there yet, of one study or of all."""
    from hpsearch.errors import TrackingError
    from hpsearch.store import lock
    from hpsearch.store.record import no_study, study_record
    from hpsearch.tracking import MlflowTracker, make_tracker

    names = [study_name] if study_name else project.study_names()
    if not names:
        raise no_study(project)
    tracker = make_tracker(project, tracking)
    if not isinstance(tracker, MlflowTracker):
        raise TrackingError("--tracking none tracks nothing: leave it out, or give a URI")
    undelivered = 0
    for name in names:
        study = study_record(project, name).paths
        # A running coordinator is the only writer.
        with lock.hold(study):
            if rebuild:
                done = tracker.rebuild(study)
                click.echo(f"{name}: {done.n_kept} runs agree, {done.n_replaced} made anew, {done.n_removed} removed")
            else:
                tracker.catch_up(study, stopped=True)
            left = tracker.undelivered(study)
        click.echo(f"{name}: {'up to date' if not left else f'{left} runs are not delivered'} at {tracker.uri}")
        undelivered += left
    return 1 if undelivered else 0
