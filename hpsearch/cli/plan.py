"""`hpsearch plan`: what a configuration is and costs, before anything runs."""

from __future__ import annotations

import re
import sys

import click

from hpsearch.cli.options import Settings, config_options, device_option, out_option
from hpsearch.config import StudyConfig
from hpsearch.errors import ConfigError, DatasetError
from hpsearch.paths import ProjectPaths

PRESETS = {"rtx4060": (8.0, "bf16"), "t4": (15.0, "fp16"), "h200": (140.0, "bf16")}
"""Memory in GiB, and precision where `train.amp` is auto, of the cards that the report names, and of one more."""


@click.command("plan")
@out_option
@config_options
@click.option("--memory", metavar="8GB", help="Say what fits a device with so much memory.")
@click.option("--preset", type=click.Choice(list(PRESETS)), help="A card's memory and precision.")
@click.option(
    "--precision", type=click.Choice(["float32", "bf16", "fp16"]), help="Default: train.amp, where auto the card's."
)
@click.option("--layers/--no-layers", default=True, help="Show every layer.")
@click.option(
    "--measure", is_flag=True, help="Measure steps here, on drawn images, and say how long the study will take."
)
@device_option
def command(
    project: ProjectPaths,
    settings: Settings,
    memory: str | None,
    preset: str | None,
    precision: str | None,
    layers: bool,
    measure: bool,
    device: str,
) -> None:
    """Layer shapes, parameters, FLOPs, memory, and what fits: by arithmetic, in an instant, without torch.

    For a search space its default and its corners are shown. With --measure also how long the study will take on this
    machine, from a few measured steps: that loads torch, and takes some seconds.

    \b
        hpsearch plan --config report-fig14 --preset rtx4060
        hpsearch plan --set unet.base_channels=32 --set unet.norm=none --set unet.padding=valid --memory 8GB
        hpsearch plan --config isic2017-64 --no-layers --measure
    """
    from rich.console import Console

    from hpsearch.cli.plan_tables import Machine, corner_table, describe_config, impossible, layer_table

    size, native = PRESETS[preset] if preset else (None, "float32")
    if memory is not None:
        size = gibibytes(memory)
    config = settings.load(is_searched=True)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    amp = {"off": "float32", "auto": native}.get(config.train.amp, config.train.amp)
    # Every preset is a CUDA card, where group normalisation keeps more.
    machine = Machine(precision or amp, size, "cuda" if preset else "cpu")
    default = config.with_params({})
    for line in describe_config(default, machine):
        console.print(line, markup=False, soft_wrap=True)
    if layers and not impossible(default):
        console.print(layer_table(default, machine))
    if len(config.search):
        console.print(corner_table(config, machine))
    if measure:
        for line in time_of_study(config, project, device):
            console.print(line, markup=False, soft_wrap=True)


OFFICIAL_POOL = 2150
"""Images of the pool where there is no dataset yet to count."""


def time_of_study(config: StudyConfig, project: ProjectPaths, device: str) -> list[str]:
    """How long a study of `config` would take here, in a few lines."""
    from hpsearch.cli.progress import describe_forecast
    from hpsearch.data.pool_caches import cache_root
    from hpsearch.data.prepare import count_pool
    from hpsearch.report.formats import count
    from hpsearch.search.autotune import MachineChoice, measure_drawn
    from hpsearch.workers import plan as plans

    data, study = config.data, config.study
    try:
        n_images, where = count_pool(data, cache_root(project, config)), f"in {data.images or data.root}"
    except DatasetError:
        n_images, where = OFFICIAL_POOL, f"as ISIC-2017 has, since there is no dataset in {data.images or data.root}"
    plan = measure_drawn(config, MachineChoice(device))
    forecast = plans.forecast(
        config,
        plan,
        n_images=n_images,
        n_trials=study.trials,
        n_folds=1 if study.folds == "fixed" else study.folds,
        n_replicates=0 if study.folds == "fixed" else min(study.confirm, study.trials),
    )
    folds = "the fixed split" if study.folds == "fixed" else f"{study.folds} folds"
    on = plan.machine.get("device_name", plan.device)
    return [
        f"on {on}, {plan.precision}, {len(plan.workers)} worker(s) x {plan.workers[0].threads} thread(s); {folds} x "
        f"{count(config.train.epochs, 'epoch')}, {n_images} images {where}",
        describe_forecast(study.pruner, forecast),
    ]


def gibibytes(text: str) -> float:
    """`8GB`, `8 GiB`, `7500MB` or `8` in GiB: a card of 8 GB has 8 GiB."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:(G|M)i?B?)?\s*", text, re.IGNORECASE)
    if match is None:
        raise ConfigError(f"--memory {text!r}: write it as 8GB or 7500MB")
    return float(match[1]) / (1024 if (match[2] or "G").upper() == "M" else 1)
