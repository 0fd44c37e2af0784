"""`hpsearch train`: one configuration, no search."""

from __future__ import annotations

import dataclasses

import click

from hpsearch.cli.options import Settings, config_options, device_option, out_option, study_option, tracking_option
from hpsearch.cli.study import FOLDS, stop_on_signals
from hpsearch.paths import ProjectPaths


@click.command("train")
@out_option
@config_options
@study_option
@click.option(
    "--folds",
    type=FOLDS,
    default="fixed",
    metavar="k|fixed",
    help="k, or `fixed` (default) for training and validation split.",
)
@device_option
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads (default: measured).")
@tracking_option
def command(
    project: ProjectPaths,
    settings: Settings,
    study_name: str | None,
    device: str,
    threads: int | None,
    tracking: str | None,
) -> int:
    """Train one configuration: on the training split, scored on the validation split, or on k folds.

    It is a study of one trial: on record, in MLflow, and continued by the same command. The TOML may be a trial's
    (MLflow's artifact trial.toml) or a study's, whose search space is then left aside.

    \b
        hpsearch train --config trial.toml
        hpsearch train --config isic2017-64 --set train.epochs=30 --folds 5
    """
    from hpsearch.cli.progress import StudyProgress
    from hpsearch.config.search import SearchSpace
    from hpsearch.search.autotune import MachineChoice
    from hpsearch.search.stopping import Stop
    from hpsearch.study import run_study
    from hpsearch.tracking import make_tracker

    name = study_name or f"train-{settings.name}"
    config = settings.load(project.study(name).toml)
    one = dataclasses.replace(config.study, trials=1, pruner="none", confirm=0)
    config = dataclasses.replace(config, study=one, search=SearchSpace())
    stop = Stop()
    with (
        StudyProgress(name, project, tracking) as progress,
        stop_on_signals(stop, progress.interrupted),
    ):
        summary = run_study(
            project,
            name,
            config,
            machine=MachineChoice(device, 1, threads or 0),
            tracker=make_tracker(project, tracking),
            callback=progress,
            stop=stop,
        )
    progress.summarise(summary)
    return 128 + stop.signal if stop.signal else 0
