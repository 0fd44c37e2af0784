"""`hpsearch plan`: what a configuration is and costs, before anything runs."""

from __future__ import annotations

import re
import sys

import click

from hpsearch.cli.options import Settings, config_options, out_option
from hpsearch.errors import ConfigError
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
def command(
    project: ProjectPaths,
    settings: Settings,
    memory: str | None,
    preset: str | None,
    precision: str | None,
    layers: bool,
) -> None:
    """Layer shapes, parameters, FLOPs, memory, and what fits: by arithmetic, in an instant, without torch.

    For a search space its default and its corners are shown.

    \b
        hpsearch plan --config report-fig14 --preset rtx4060
        hpsearch plan --set unet.base_channels=32 --set unet.norm=none --set unet.padding=valid --memory 8GB
    """
    from rich.console import Console

    from hpsearch.cli.plan_tables import Machine, corner_table, describe_config, impossible, layer_table

    size, native = PRESETS[preset] if preset else (None, "float32")
    if memory is not None:
        size = gibibytes(memory)
    config = settings.load()
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


def gibibytes(text: str) -> float:
    """`8GB`, `8 GiB`, `7500MB` or `8` in GiB: a card of 8 GB has 8 GiB."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:(G|M)i?B?)?\s*", text, re.IGNORECASE)
    if match is None:
        raise ConfigError(f"--memory {text!r}: write it as 8GB or 7500MB")
    return float(match[1]) / (1024 if (match[2] or "G").upper() == "M" else 1)
