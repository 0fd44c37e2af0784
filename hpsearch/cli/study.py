"""`hpsearch study`: search for the best configuration, or continue a search."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hpsearch.cli import options
from hpsearch.cli.options import AT_LEAST_0, AT_LEAST_1, Settings
from hpsearch.config import StudyConfig
from hpsearch.config.modules import module_names
from hpsearch.paths import ProjectPaths

if TYPE_CHECKING:
    from hpsearch.search.autotune import MachineChoice

METRICS = ("dice", "jaccard", "iou")
LOOKAHEAD = 4
"""Value of study.lookahead with --deterministic: how many trials may run at a time."""


def _refuse_removed_option(_ctx: click.Context, _param: click.Parameter, value: str | None) -> None:
    if value is not None:
        raise click.UsageError(
            "--storage, --heartbeat and --grace were removed: one process runs a study, and Optuna's database is "
            "hpsearch.db in the project folder. Leave them out to run or continue the study on one machine; a later "
            "version uses many machines with --cluster."
        )


@click.command("study")
@options.out_option
@options.config_options
@options.study_option
@click.option("--trials", type=int, help="Evaluate this many trials, earlier ones included (study.trials).")
@options.folds_option(None, "Use k folds, or `fixed` for the dataset's training/validation split.")
@click.option("--metric", type=click.Choice(METRICS), help="Rank trials by this mean score (iou is jaccard).")
@click.option(
    "--sampler", type=click.Choice(module_names("search/samplers")), help="Suggest configurations with this sampler."
)
@click.option("--pruner", type=click.Choice(module_names("search/pruners")), help="Prune trials by this rule.")
@click.option(
    "--confirm", type=AT_LEAST_0, help="Refit this many top trials and rank them by both fits (default: 5)."
)
@click.option(
    "--groups", metavar="FILE.csv", help="Keep images of the same group in one fold; FILE names each image's group."
)
@click.option("--group-duplicates", is_flag=True, help="Keep near-duplicate images in one fold.")
@click.option(
    "--allow-microbatch",
    is_flag=True,
    help="Train large batches in parts, even with batch normalization; such trials cannot be the best.",
)
@click.option("--workers", type=AT_LEAST_1, help="Use this many processes (default: measured, 1 to 4 per device).")
@options.machine_options
@click.option("--hours", type=click.FloatRange(min=0, min_open=True), help="Stop after this many hours (resumable).")
@click.option(
    "--enqueue",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE.toml",
    help="Try the configuration in this file next; settings not in the file have their defaults.",
)
@click.option(
    "--deterministic",
    "lookahead",
    is_flag=True,
    flag_value=LOOKAHEAD,
    type=int,
    default=None,
    help=f"Make results independent of the number of workers (sets study.lookahead to {LOOKAHEAD}).",
)
@click.option("--storage", "--heartbeat", "--grace", hidden=True, expose_value=False, callback=_refuse_removed_option)
@options.tracking_option
def command(
    project: ProjectPaths,
    settings: Settings,
    study_name: str | None,
    machine: MachineChoice,
    hours: float | None,
    enqueue: tuple[Path, ...],
    tracking: str | None,
) -> int:
    """Search for the best configuration by cross-validation. The same command continues a stopped search.

    \b
        hpsearch study --trials 50 --folds 5
        hpsearch study --data sample
        hpsearch study --config isic2017-64 --data ../ISIC-2017 --trials 50
        hpsearch study --images photos --masks masks --set data.size=128
    """
    from hpsearch.search.new_trials import read_params

    name = study_name or settings.name
    config = settings.load(project.study(name).toml, is_searched=True)
    enqueued = [read_params(path, config) for path in enqueue]
    return run(project, name, config, machine, tracking, hours=hours, enqueued=enqueued)


def run(
    project: ProjectPaths,
    name: str,
    config: StudyConfig,
    machine: MachineChoice,
    tracking: str | None,
    **more: Any,
) -> int:
    """Run a study, show its progress and its result, and return the exit code. `more` goes to `run_study`."""
    from hpsearch.cli.progress import StudyProgress
    from hpsearch.cli.signals import stop_on_signals
    from hpsearch.search.stopping import Stop
    from hpsearch.study import run_study
    from hpsearch.tracking import make_tracker

    stop = Stop()
    with StudyProgress(name, project, tracking) as progress, stop_on_signals(stop, progress.interrupted):
        tracker = make_tracker(project, tracking)
        summary = run_study(
            project, name, config, machine=machine, tracker=tracker, callback=progress, stop=stop, **more
        )
    progress.summarise(summary)
    return 128 + stop.signal if stop.signal else 0
