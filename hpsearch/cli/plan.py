"""`hpsearch plan`: show the size and the cost of a configuration before anything runs."""

from __future__ import annotations

import re

import click

from hpsearch.cli.console import echo_table
from hpsearch.cli.options import Settings, config_options, device_option, out_option
from hpsearch.config import StudyConfig
from hpsearch.errors import ConfigError, DatasetError
from hpsearch.paths import ProjectPaths

PRESETS = {"rtx4060": (8.0, "bf16"), "t4": (15.0, "fp16"), "h200": (140.0, "bf16")}
"""Memory in GiB, and the precision of `train.amp = auto`, of some GPUs."""
OFFICIAL_POOL = 2150
"""Number of pool images to assume without a dataset."""


@click.command("plan")
@out_option
@config_options
@click.option("--memory", metavar="8GB", help="Show what fits on a device with this much memory.")
@click.option("--preset", type=click.Choice(list(PRESETS)), help="Use the memory and precision of this GPU.")
@click.option("--precision", type=click.Choice(["float32", "bf16", "fp16"]), help="Assume this precision.")
@click.option("--layers/--no-layers", default=True, help="Show every layer.")
@click.option(
    "--measure", is_flag=True, help="Time some steps on this machine to estimate how long the study will take."
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
    """Show shapes, parameters, FLOPs and memory of a configuration.

    This needs no training and no PyTorch. For a search space, the default and the corners are shown. --measure also
    shows how long the study will take on this machine. It trains a few steps on synthetic images, which takes some
    seconds.

    \b
        hpsearch plan --config report-fig14 --preset rtx4060
        hpsearch plan --set unet.base_channels=32 --set unet.norm=none --set unet.padding=valid --memory 8GB
        hpsearch plan --config isic2017-64 --no-layers --measure
    """
    from hpsearch.cli import plan_tables as tables

    size, native = PRESETS[preset] if preset else (None, "float32")
    if memory is not None:
        size = gibibytes(memory)
    config = settings.load(is_searched=True)
    if settings.has_own_data:
        click.echo(f"{_count_pool(config, project)} pool images in {_folder(config)}")
    amp = {"off": "float32", "auto": native}.get(config.train.amp, config.train.amp)
    # All presets are CUDA devices, on which group normalization stores more.
    machine = tables.Machine(precision or amp, size, "cuda" if preset else "cpu")
    default = config.with_params({})
    click.echo("\n".join(tables.describe_config(default, machine)))
    if layers and not tables.impossible(default):
        echo_table(tables.LAYER_HEAD, tables.layer_rows(default, machine), n_left=2)
    if len(config.search):
        head, rows, n_left = tables.corners(config, machine)
        echo_table(head, rows, n_left=n_left, title="corners of the search space")
    if measure:
        click.echo("\n".join(time_of_study(config, project, device)))


def _count_pool(config: StudyConfig, project: ProjectPaths) -> int:
    from hpsearch.data.pool_caches import cache_root
    from hpsearch.data.prepare import count_pool

    return count_pool(config.data, cache_root(project, config))


def _folder(config: StudyConfig) -> str:
    return config.data.images or config.data.root


def time_of_study(config: StudyConfig, project: ProjectPaths, device: str) -> list[str]:
    """Return how long a study will take on this machine, in two lines."""
    from hpsearch.cli.describe import describe_folds, describe_forecast, describe_machine
    from hpsearch.report.formats import count
    from hpsearch.search.autotune import MachineChoice, measure_drawn
    from hpsearch.workers import plan as plans

    study, folds = config.study, config.study.folds
    try:
        n_images, where = _count_pool(config, project), f"in {_folder(config)}"
    except DatasetError:
        n_images, where = OFFICIAL_POOL, f"as in ISIC-2017, because there is no dataset in {_folder(config)}"
    plan = measure_drawn(config, MachineChoice(device))
    forecast = plans.forecast(
        config,
        plan,
        n_images=n_images,
        n_trials=study.trials,
        n_folds=1 if folds == "fixed" else folds,
        n_replicates=0 if folds == "fixed" else min(study.confirm, study.trials),
    )
    size = f"{describe_folds(config)} x {count(config.train.epochs, 'epoch')}, {n_images} images {where}"
    return [f"{describe_machine(plan)}; {size}", describe_forecast(study.pruner, forecast)]


def gibibytes(text: str) -> float:
    """Return `8GB`, `8 GiB`, `7500MB` or `8` in GiB. A device sold with 8 GB has 8 GiB."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:(G|M)i?B?)?\s*", text, re.IGNORECASE)
    if match is None:
        raise ConfigError(f"--memory {text!r}: write it as 8GB or 7500MB")
    return float(match[1]) / (1024 if (match[2] or "G").upper() == "M" else 1)
