"""`hpsearch study`: search, or go on searching."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hpsearch.cli.options import Settings, config_options, device_option, out_option, study_option, tracking_option
from hpsearch.cli.streams import write_to_stderr
from hpsearch.config.modules import module_names
from hpsearch.paths import ProjectPaths

if TYPE_CHECKING:
    from hpsearch.search.stopping import Stop


class _Folds(click.ParamType[int | str]):
    name = "k|fixed"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        text = str(value)
        if text != "fixed" and not text.isdecimal():
            self.fail(f"{text!r} is neither a number of folds nor 'fixed'", param, ctx)
        return text if text == "fixed" else int(text)


def _refuse_removed_option(_ctx: click.Context, _param: click.Parameter, value: str | None) -> None:
    if value is not None:
        raise click.UsageError(
            "--storage, --heartbeat and --grace were removed: one process runs a study, and Optuna's database is "
            "hpsearch.db in the project folder. Leave them out to run or continue the study on one machine; a later "
            "version uses many machines with --cluster."
        )


FOLDS = _Folds()
LOOKAHEAD = 4
"""With --deterministic: as many trials as may run at a time."""


@click.command("study")
@out_option
@config_options
@study_option
@click.option("--trials", type=int, help="Trials to have evaluated, over all starts (study.trials).")
@click.option(
    "--folds", type=FOLDS, metavar="k|fixed", help="k of the cross-validation, or `fixed` for the 2000/150 split."
)
@click.option("--metric", type=click.Choice(["dice", "jaccard", "iou"]), help="Score whose mean is a trial's value.")
@click.option(
    "--sampler", type=click.Choice(module_names("search/samplers")), help="How configurations are suggested."
)
@click.option(
    "--pruner",
    type=click.Choice(module_names("search/pruners")),
    help="Rule that ends trials early.",
)
@click.option(
    "--confirm",
    type=click.IntRange(min=0),
    help="Top configurations to refit with new seeds after the search and rank by both fits; 0: none (default: 5).",
)
@click.option("--groups", metavar="FILE.csv", help="Patient or lesion of each image; a group stays in one fold.")
@click.option("--group-duplicates", is_flag=True, help="Keep near-duplicate images in one fold.")
@click.option(
    "--allow-microbatch",
    is_flag=True,
    help="Train by parts of batches what does not fit the memory, also with batch normalisation: never the best.",
)
@device_option
@click.option("--workers", type=click.IntRange(min=1), help="Worker processes (default: measured, 1 to 4 a device).")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of each worker (default: measured).")
@click.option("--hours", type=click.FloatRange(min=0, min_open=True), help="Stop, with checkpoints, after so long.")
@click.option(
    "--enqueue",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE.toml",
    help="Try this configuration next; what the file does not say is as in the default one.",
)
@click.option(
    "--deterministic",
    "lookahead",
    is_flag=True,
    flag_value=LOOKAHEAD,
    type=int,
    default=None,
    help=f"Suggest and decide in trial order, {LOOKAHEAD} trials behind (study.lookahead): the same study for any "
    "number of workers.",
)
@click.option("--storage", "--heartbeat", "--grace", hidden=True, expose_value=False, callback=_refuse_removed_option)
@tracking_option
def command(
    project: ProjectPaths,
    settings: Settings,
    study_name: str | None,
    device: str,
    workers: int | None,
    threads: int | None,
    hours: float | None,
    enqueue: tuple[Path, ...],
    tracking: str | None,
) -> int:
    """Search for the best configuration by cross-validation. The same command again continues.

    \b
        hpsearch study --trials 50 --folds 5
        hpsearch study --data sample
        hpsearch study --config isic2017-64 --data ../ISIC-2017 --trials 50
        hpsearch study --images photos --masks masks --set data.size=128
    """
    from hpsearch.cli.progress import StudyProgress
    from hpsearch.search.autotune import MachineChoice
    from hpsearch.search.enqueue import read_params
    from hpsearch.search.stopping import Stop
    from hpsearch.study import run_study
    from hpsearch.tracking import make_tracker

    name = study_name or settings.name
    config = settings.load(project.study(name).toml, is_searched=True)
    stop = Stop()
    with (
        StudyProgress(name, project, tracking) as progress,
        stop_on_signals(stop, progress.interrupted),
    ):
        summary = run_study(
            project,
            name,
            config,
            machine=MachineChoice(device, workers or 0, threads or 0),
            tracker=make_tracker(project, tracking),
            callback=progress,
            stop=stop,
            hours=hours,
            enqueued=[read_params(path, config) for path in enqueue],
        )
    progress.summarise(summary)
    return 128 + stop.signal if stop.signal else 0


class stop_on_signals:  # noqa: N801 - reads as the statement it is used in
    """Turn SIGINT, SIGTERM and SIGHUP into requests to stop, for the block."""

    def __init__(self, stop: Stop, say: Callable[[str], None] | None = None) -> None:
        """`say` shows what follows from a signal, wherever that interrupted the program; by default on stderr."""
        self._stop = stop
        self._say = say or write_to_stderr
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # Under `nohup` the end of the terminal is ignored, and shall stay so.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._hear)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, _frame: object) -> None:
        # A scheduler that sends SIGTERM kills soon after: what is on disk is at most an epoch behind.
        at_once = number != signal.SIGINT
        left_s = self._stop.epoch_left_s()
        self._stop.request(number, at_once=at_once)
        if self._stop.is_urgent:
            text = "Stopping now"
        elif left_s is None:
            text = "Stopping"
        else:
            # NaN: no epoch of this configuration has ended yet.
            about = f" (about {max(1, round(left_s))} s)" if left_s == left_s else ""
            text = f"Finishing the current epoch{about}; press Ctrl-C again to stop now"
        self._say(text)
