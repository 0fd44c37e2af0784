"""`hpsearch train`: train one configuration without a search."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import click

from hpsearch.cli import options
from hpsearch.cli.study import run
from hpsearch.paths import ProjectPaths

if TYPE_CHECKING:
    from hpsearch.search.autotune import MachineChoice


@click.command("train")
@options.out_option
@options.config_options
@options.study_option
@options.folds_option("fixed", "Train on k folds, or `fixed` (default) for the training and validation split.")
@options.machine_options
@options.tracking_option
def command(
    project: ProjectPaths,
    settings: options.Settings,
    study_name: str | None,
    machine: MachineChoice,
    tracking: str | None,
) -> int:
    """Train one configuration without a search.

    It is trained on the training split and scored on the validation split, or on k folds. This is a study of one
    trial: it is recorded, logged to MLflow, and continued by the same command. The TOML may be that of a trial
    (MLflow's artifact trial.toml) or of a study, whose search space is ignored.

    \b
        hpsearch train --config trial.toml
        hpsearch train --config isic2017-64 --set train.epochs=30 --folds 5
    """
    from hpsearch.config.search import SearchSpace

    name = study_name or f"train-{settings.name}"
    config = settings.load(project.study(name).toml)
    one = dataclasses.replace(config.study, trials=1, pruner="none", confirm=0)
    config = dataclasses.replace(config, study=one, search=SearchSpace())
    return run(project, name, config, dataclasses.replace(machine, n_workers=1), tracking)
