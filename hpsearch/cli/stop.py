"""`hpsearch stop`: stop a running study from outside."""

from __future__ import annotations

import time

import click

from hpsearch.cli.options import out_option, study_option
from hpsearch.paths import ProjectPaths

WAIT_S = 600.0
"""How long to wait for the study to end."""


@click.command("stop")
@out_option
@study_option
@click.option("--trial", type=click.IntRange(min=0), metavar="N", help="Prune this trial only; the study goes on.")
@click.option("--now", is_flag=True, help="Do not wait for the end of the current epochs.")
def command(project: ProjectPaths, study_name: str | None, trial: int | None, now: bool) -> int:
    """Stop a running study from another terminal or machine.

    The study (or its `final`) stops after a checkpoint. The command waits until it has stopped. If there are several
    studies, the running one is stopped.

    \b
        hpsearch stop --study isic2017-64
        hpsearch stop --trial 7
    """
    from hpsearch.errors import StudyError
    from hpsearch.paths import write_text
    from hpsearch.store import lock
    from hpsearch.store.record import study_record

    record = study_record(project, study_name)
    study = record.paths
    if not lock.is_held(study):
        raise StudyError(f"study {study.name!r} is not running")
    holder = lock.describe_holder(study)
    if trial is not None:
        if (outcome := record.known_trial(trial).outcome) is not None:
            raise StudyError(f"trial {trial} of study {study.name!r} has ended already: {outcome}")
        write_text(study.trial_stop_request(trial), "stop")
        click.echo(f"asked {holder} to end trial {trial} after its epoch; the study goes on")
        return 0
    write_text(study.stop_request, "now" if now else "after this epoch")
    click.echo(f"asked {holder} to stop")
    began = time.monotonic()
    while lock.is_held(study):
        if time.monotonic() - began > WAIT_S:
            click.echo("it has not stopped yet, because its epochs are long; --now does not wait for them")
            return 1
        time.sleep(0.2)
    click.echo(f"study {study.name} has stopped; the command that started it continues it")
    return 0
