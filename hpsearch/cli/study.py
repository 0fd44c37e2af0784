"""`hpsearch study` and `hpsearch train`: search for the best configuration, or train a single one."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from pathlib import Path
from typing import Any

import click

import hpsearch
from hpsearch.cli import options
from hpsearch.cli.options import AT_LEAST_0, AT_LEAST_1, Settings
from hpsearch.cli.terminal import stop_on_signals
from hpsearch.config import StudyConfig, module_names
from hpsearch.config.search import SearchSpace
from hpsearch.paths import ProjectPaths
from hpsearch.search.stopping import Stop

LOOKAHEAD = 4
"""Value of `study.lookahead` that --deterministic sets. At most this many trials run at the same time."""


@click.command("study")
@options.study_options_with("the name of the configuration or image folder")
@options.config_options
@click.option(
    "--trials", type=int, help="Evaluate this many trials over all runs (study.trials; infeasible ones do not count)."
)
@click.option(
    "--until-gain",
    type=click.FloatRange(min=0),
    metavar="GAIN",
    help="End the search early if the remaining trials are unlikely to improve the score by GAIN (such as 0.003).",
)
@options.folds_option()
@click.option(
    "--metric", type=click.Choice(["dice", "jaccard", "iou"]), help="Rank trials by this score (iou means jaccard)."
)
@click.option("--sampler", type=click.Choice(module_names("search/samplers")), help="Use this sampler.")
@click.option("--pruner", type=click.Choice(module_names("search/pruners")), help="Use this pruner.")
@click.option(
    "--confirm",
    type=AT_LEAST_0,
    help="Refit this many top trials with new seeds, and rank them by the mean of both fits (default: 5).",
)
@click.option("--groups", metavar="FILE.csv", help="Keep all images of a group in one fold; FILE lists the groups.")
@click.option("--group-duplicates", is_flag=True, help="Keep near-duplicate images in one fold.")
@click.option("--allow-microbatch", is_flag=True, hidden=True, expose_value=False)
@click.option("--workers", type=AT_LEAST_1, help="Use this many workers (default: 1 to 4 per device, as measured).")
@options.machine_options
@click.option("--hours", type=click.FloatRange(min=0, min_open=True), help="Stop after this many hours (resumable).")
@click.option(
    "--enqueue",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE.toml",
    help="Evaluate the configuration in this file next; other settings keep the study's values. Repeatable.",
)
@click.option(
    "--deterministic",
    "lookahead",
    flag_value=LOOKAHEAD,
    help=f"Make results independent of the number of workers (sets study.lookahead to {LOOKAHEAD}).",
)
@options.tracking_option
@options.storage_option
def study(
    project: ProjectPaths, settings: Settings, study_name: str | None, enqueue: tuple[Path, ...], **more: Any
) -> int:
    """Search for the best configuration by cross-validation. The same command continues a stopped search.

    Without --study, the study is named after the TOML file of its configuration, or after the folder of its images.

    \b
        hpsearch study --trials 50 --folds 5
        hpsearch study --data sample
        hpsearch study --config isic2017-64 --data ../ISIC-2017 --trials 50
        hpsearch study --images photos --masks masks --set data.size=128
    """
    from hpsearch.search.new_trials import read_params

    name = study_name or settings.name
    config = settings.load(project.study(name).toml, is_searched=True)
    return _run(project, name, config, enqueued=[read_params(path, config) for path in enqueue], **more)


@click.command("train")
@options.study_options_with("train- and the name of the configuration or image folder")
@options.config_options
@options.folds_option("fixed")
@options.machine_options
@options.tracking_option
@options.storage_option
def train(
    project: ProjectPaths, settings: Settings, study_name: str | None, machine: hpsearch.MachineChoice, **more: Any
) -> int:
    """Train one configuration without a search.

    By default, the network is trained on the training split and scored on the validation split. With --folds 5, the
    configuration is evaluated by 5-fold cross-validation. The result is a study with one trial. It is stored and
    logged to MLflow like any other study, and the same command continues it. The TOML file may be that of a trial
    (such as the artifact trial.toml in MLflow) or of a study, whose search space is then ignored.

    \b
        hpsearch train --config trial.toml
        hpsearch train --config isic2017-64 --set train.epochs=30 --folds 5
    """
    name = study_name or f"train-{settings.name}"
    config = settings.load(project.study(name).toml)
    one = dataclasses.replace(config.study, trials=1, pruner="none", confirm=0)
    config = dataclasses.replace(config, study=one, search=SearchSpace())
    return _run(project, name, config, machine=dataclasses.replace(machine, n_workers=1), **more)


def _run(project: ProjectPaths, name: str, config: StudyConfig, tracking: str | None, **more: Any) -> int:
    """Run a study, show its progress and result, and return the exit code. `more` is passed to `run_study`."""
    from hpsearch.cli.progress import StudyProgress

    stop = Stop()
    with closing(StudyProgress(name, project, tracking)) as progress, stop_on_signals(stop, progress.interrupted):
        tracker = hpsearch.make_tracker(project, tracking)
        summary = hpsearch.run_study(project, name, config, tracker=tracker, callback=progress, stop=stop, **more)
    progress.summarise(summary)
    return 128 + stop.signal if stop.signal else 0
