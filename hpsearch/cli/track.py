"""`hpsearch track`: bring MLflow up to date with the record."""

from __future__ import annotations

import click

from hpsearch.cli.options import out_option, study_option, tracking_option
from hpsearch.paths import ProjectPaths


@click.command("track")
@out_option
@study_option
@tracking_option
@click.option("--rebuild", is_flag=True, help="Replace runs that contradict the record; fix paths after a move.")
def command(project: ProjectPaths, study_name: str | None, tracking: str | None, rebuild: bool) -> int:
    """Bring MLflow and Optuna's database up to date with the record.

    Log everything in the record that is missing there, for one study or for all.
    """
    from hpsearch.errors import TrackingError
    from hpsearch.search.optuna_view import OptunaView
    from hpsearch.store import lock
    from hpsearch.store.record import no_study, study_record
    from hpsearch.tracking import make_tracker

    names = [study_name] if study_name else project.study_names()
    if not names:
        raise no_study(project)
    tracker = make_tracker(project, tracking)
    if tracker is None:
        raise TrackingError("--tracking none turns tracking off: leave it out, or give a URI")
    n_behind = 0
    for name in names:
        study = study_record(project, name).paths
        view = tracker.view(study)
        # A running study updates MLflow itself, and two processes must not do it at the same time.
        with lock.hold(study):
            if rebuild:
                done = view.rebuild()
                click.echo(f"{name}: {done.n_kept} runs kept, {done.n_replaced} replaced, {done.n_removed} removed")
            else:
                view.update(is_last=True)
            OptunaView(study).update(is_last=True)
            left = view.n_behind()
        click.echo(f"{name}: {'up to date' if not left else f'{left} runs are not up to date'} at {tracker.uri}")
        n_behind += left
    return 1 if n_behind else 0
