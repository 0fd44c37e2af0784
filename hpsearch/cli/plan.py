"""`hpsearch plan`: show the size and the cost of a configuration before training."""

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial

import click

from hpsearch.cli.describe import describe_folds, describe_forecast, describe_machine
from hpsearch.cli.options import Settings, config_options, device_option, out_option
from hpsearch.cli.terminal import echo_table
from hpsearch.config import StudyConfig
from hpsearch.errors import ConfigError, DatasetError
from hpsearch.models import network
from hpsearch.models.memory import LayerCost, Step, saved_activations
from hpsearch.paths import ProjectPaths
from hpsearch.report.formats import count

PRESETS = {"rtx4060": (8.0, "bf16"), "t4": (15.0, "fp16"), "h200": (140.0, "bf16")}
"""For each GPU, its memory in GiB and the precision that `train.amp = auto` selects on it."""
OFFICIAL_POOL = 2150
"""Number of pool images to assume if there is no dataset: the size of the ISIC-2017 pool."""
MIB, GIB = 2**20, 2**30
LAYER_HEAD = ("layer", "kind", "channels", "size", "parameters", "GFLOP", "activations, MiB")


@click.command("plan")
@out_option
@config_options
@click.option("--memory", metavar="8GB", help="Show whether training fits on a device with this much memory.")
@click.option("--preset", type=click.Choice(list(PRESETS)), help="Assume the memory and precision of this GPU.")
@click.option("--precision", type=click.Choice(["float32", "bf16", "fp16"]), help="Assume this precision.")
@click.option("--layers/--no-layers", default=True, help="Show the table of layers (default), or leave it out.")
@click.option("--measure", is_flag=True, help="Time a few steps to estimate how long the study will take here.")
@device_option
def plan(
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

    Without --measure, nothing is trained, and PyTorch is not needed for the built-in UNet. If settings are searched,
    the costs are shown for the default configuration and for all combinations of smallest and largest values (and all
    values of settings that are not numeric). With --measure, the command trains for a few seconds on synthetic images
    to estimate how long the study will take on this machine.

    \b
        hpsearch plan --config report-fig14 --preset rtx4060
        hpsearch plan --set unet.base_channels=32 --set unet.norm=none --set unet.padding=valid --memory 8GB
        hpsearch plan --config isic2017-64 --no-layers --measure
    """
    from hpsearch.workers.plan import MEMORY_SHARE

    size, native = PRESETS[preset] if preset else (None, "float32")
    if memory is not None:
        size = gibibytes(memory)
    config = settings.load(is_searched=True)
    if settings.images is not None or settings.data not in (None, "sample"):
        click.echo(f"{_count_pool(config, project)} pool images in {config.data.images or config.data.root}")
    amp = {"off": "float32", "auto": native}.get(config.train.amp, config.train.amp)
    usable_bytes = None if size is None else MEMORY_SHARE * size * GIB
    # All presets are CUDA devices, where group normalisation stores more activations than on the CPU.
    costs_of = partial(_Costs, precision or amp, "cuda" if preset else "cpu", usable_bytes)
    default = costs_of(config.with_params({}))
    click.echo("\n".join(default.describe()))
    if size is not None and not default.impossible:
        click.echo(f"{default.verdict} {size:g} GiB, of which a study leaves {1 - MEMORY_SHARE:.0%} free")
    if layers and not default.impossible:
        echo_table(LAYER_HEAD, map(_layer_row, default.layers), n_left=2)
    if config.search:
        names = [name for name in config.search if not name.startswith("train.") or name == "train.batch_size"]
        fits = [f"{size:g} GiB"] if size else []
        head = [*(name.partition(".")[2] for name in names), "parameters, M", "GFLOP per image", "peak, GiB", *fits]
        rows = (row[: len(head)] for row in _corners(config, names, costs_of))
        echo_table(head, rows, n_left=len(names), title="corners of the search space")
    if measure:
        click.echo("\n".join(time_of_study(config, project, device)))


class _Costs:
    """Costs of a configuration on a device: memory, parameters and FLOPs.

    `usable_bytes` is the memory that a training step may use; None if it is unknown. Only `impossible` and `describe`
    are available if the network is impossible.
    """

    def __init__(self, precision: str, device: str, usable_bytes: float | None, config: StudyConfig) -> None:
        self._config, self._usable_bytes, data, train = config, usable_bytes, config.data, config.train
        self._shape = (config.unet, data.n_channels, data.height, data.width)
        settings = {name: getattr(train, name) for name in ("batch_size", "optimizer", "momentum")}
        self._step = Step(precision=precision, device=device, **settings)
        self.impossible = network.why_impossible(*self._shape, batch_size=train.batch_size)
        """Reason why the network is impossible at this input size; None if it is possible."""
        if self.impossible is None:
            self.memory = network.training_memory(*self._shape, self._step)
            self.parameters = network.n_parameters(*self._shape[:2])
            self.flops = network.training_flops(*self._shape)

    @property
    def layers(self) -> list[LayerCost]:
        """Costs of each layer. The final interpolation is left out if the network is trained on crops."""
        costs = network.layer_costs(*self._shape, self._step)
        return [cost for cost in costs if not (self._config.sees_windows and cost.layer.kind == "interpolation")]

    @property
    def verdict(self) -> str:
        """`fits` or `does not fit`: whether a training step fits in memory. Empty if the memory is unknown.

        Trials above this limit are infeasible.
        """
        if self._usable_bytes is None:
            return ""
        return "fits" if self.memory.total <= self._usable_bytes else "does not fit"

    def describe(self) -> list[str]:
        """Return lines that describe the network, its parameters, FLOPs and memory, or why it is impossible."""
        unet, data, batch = self._config.unet, self._config.data, self._config.train.batch_size
        size, precision = f"{data.height}x{data.width} {data.color}", self._step.precision
        head = f"{network.describe(unet)}; {size}, batch {batch}, {precision}"
        if self.impossible:
            return [head, f"impossible: {self.impossible}"]
        lines, layers, memory = [head], self.layers, self.memory
        if layers:
            parts = f"a stacked convolution, {unet.depth} down, {unet.depth} up, a 1x1 convolution"
            last = " with the interpolation" if layers[-1].layer.kind == "interpolation" else ""
            lines.append(f"{2 * unet.depth + 2} objects: {parts}; {len(layers)} layers{last}")
        lines.append(f"parameters {_rounded(self.parameters / 1e6)} M, {_size(self.parameters * 4)} in float32")
        lines.append(f"training step {_rounded(self.flops / 1e9)} GFLOP per image")
        if layers:
            saved = saved_activations(*self._shape, self._step)
            # The source report (see README.md) estimates memory at one byte per value of every feature map.
            one_byte = sum(cost.layer.n_outputs for cost in layers) * batch
            text = f"saved for back-propagation {_size(saved)}, with the weights {_size(saved + memory.weights)}"
            lines.append(f"{text}; at one byte per value, as the source report estimates: {_size(one_byte)}")
        names = ("activations", "workspace", "weights", "gradients", "optimizer")
        parts = ", ".join(f"{name} {_size(getattr(memory, name))}" for name in names)
        return [*lines, f"peak of a training step {_size(memory.total)}: {parts}"]


def _layer_row(cost: LayerCost) -> Sequence[str]:
    """Return the cells of a layer for the columns in `LAYER_HEAD`."""
    layer = cost.layer
    parameters = f"{layer.n_parameters:,}" if layer.n_parameters else ""
    gflop = f"{layer.flops / 1e9:.3f}" if layer.flops else ""
    saved = f"{sum(cost.saved) / MIB:.1f}" if cost.saved else ""
    return layer.name, layer.kind, str(layer.channels), f"{layer.height}x{layer.width}", parameters, gflop, saved


def _corners(
    config: StudyConfig, names: Sequence[str], costs_of: Callable[[StudyConfig], _Costs]
) -> Iterator[Sequence[str]]:
    """Yield a table row for each combination of smallest and largest values: the values, then the costs.

    The settings `names` are combined. A setting whose values are not numbers contributes all its values.
    """
    ends = []
    for name in names:
        every = config.search[name].extremes
        is_ordered = all(isinstance(value, int | float) for value in every)
        ends.append(sorted({min(every), max(every)}) if is_ordered else every)
    for values in itertools.product(*ends):
        columns = ["", "", "impossible", ""]
        with suppress(ConfigError):
            costs = costs_of(config.with_params(dict(zip(names, values, strict=True))))
            if not costs.impossible:
                numbers = (costs.parameters / 1e6, costs.flops / 1e9, costs.memory.total / GIB)
                columns = [*map(_rounded, numbers), costs.verdict]
        yield [*map(str, values), *columns]


def _size(n_bytes: float) -> str:
    """Format a size in bytes: `5.50 GiB`, or `7.30 MiB` for a small size."""
    return f"{n_bytes / GIB:.2f} GiB" if n_bytes >= GIB / 10 else f"{_rounded(n_bytes / MIB)} MiB"


def _rounded(value: float) -> str:
    """Format a number with two decimals, or with two significant digits if it is below 0.1."""
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _count_pool(config: StudyConfig, project: ProjectPaths) -> int:
    from hpsearch.data.prepare import cache_root, count_pool

    return count_pool(config.data, cache_root(project, config))


def time_of_study(config: StudyConfig, project: ProjectPaths, device: str) -> list[str]:
    """Measure the training speed on this machine, and return two lines with the estimated duration of the study."""
    from hpsearch.search.autotune import MachineChoice, measure_drawn

    folder = config.data.images or config.data.root
    try:
        n_images, where = _count_pool(config, project), f"in {folder}"
    except DatasetError:
        n_images, where = OFFICIAL_POOL, f"as in ISIC-2017, because there is no dataset in {folder}"
    measured, forecast = measure_drawn(config, MachineChoice(device), n_images)
    size = f"{describe_folds(config)} x {count(config.train.epochs, 'epoch')}, {n_images} images {where}"
    return [f"{describe_machine(measured)}; {size}", describe_forecast(forecast)]


def gibibytes(text: str) -> float:
    """Convert a memory size like `8GB`, `8 GiB`, `7500MB` or `8` to GiB.

    GB is read as GiB, because a device sold with 8 GB has 8 GiB. Raises ConfigError for any other text.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:(G|M)i?B?)?\s*", text, re.IGNORECASE)
    if match is None:
        raise ConfigError(f"--memory {text!r}: write it as 8GB or 7500MB")
    return float(match[1]) / (1024 if (match[2] or "G").upper() == "M" else 1)
