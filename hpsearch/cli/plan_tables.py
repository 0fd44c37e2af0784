"""The tables of `hpsearch plan`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from hpsearch.config import StudyConfig
from hpsearch.config.search import Choice, Range
from hpsearch.errors import ConfigError
from hpsearch.models.costs import (
    describe,
    layer_costs,
    n_parameters,
    training_flops,
    training_memory,
    why_impossible,
)
from hpsearch.models.memory import LayerCost, MemoryEstimate, saved_activations
from hpsearch.workers.plan import MEMORY_SHARE

MIB, GIB = 2**20, 2**30
REPORT_BYTES_PER_VALUE = 1
"""The report's own estimate counts one byte per value of every feature map."""


@dataclass(frozen=True)
class Machine:
    """What the tables suppose of the machine."""

    precision: str = "float32"
    memory_gib: float | None = None
    device: str = "cpu"


def describe_config(config: StudyConfig, machine: Machine) -> list[str]:
    """Everything about one configuration in a few lines."""
    unet, data, batch = config.unet, config.data, config.train.batch_size
    head = f"{describe(unet)}; {data.height}x{data.width} {data.color}, batch {batch}, {machine.precision}"
    if reason := impossible(config):
        return [head, f"cannot be: {reason}"]
    found = _layer_costs(config, machine)
    count = n_parameters(unet, data.n_channels)
    memory = _memory(config, machine)
    lines = [head]
    if found:
        interpolates = found[-1].layer.kind == "interpolation"
        lines.append(
            f"{2 * unet.depth + 2} objects: a stacked convolution, {unet.depth} down, {unet.depth} up, a 1x1 "
            f"convolution; {len(found)} layers" + (" with the interpolation" if interpolates else "")
        )
    lines += [
        f"parameters {_rounded(count / 1e6)} M, {_size(count * 4)} in float32",
        f"training step {_rounded(training_flops(*_shape(config)) / 1e9)} GFLOP an image",
    ]
    if found:
        lines.append(_saved_line(config, machine, found, memory.weights))
    lines.append(
        f"peak of a training step {_size(memory.total)}: activations {_size(memory.activations)}, "
        f"workspace {_size(memory.workspace)}, weights {_size(memory.weights)}, gradients "
        f"{_size(memory.gradients)}, optimizer {_size(memory.optimizer)}"
    )
    if machine.memory_gib is not None:
        verdict = f"{_verdict(memory.total, machine.memory_gib)} {machine.memory_gib:g} GiB"
        lines.append(f"{verdict}, of which a study leaves {1 - MEMORY_SHARE:.0%} free")
    return lines


def _saved_line(config: StudyConfig, machine: Machine, found: list[LayerCost], weights: int) -> str:
    saved = saved_activations(
        *_shape(config),
        batch_size=config.train.batch_size,
        precision=machine.precision,  # type: ignore[arg-type]
        device=machine.device,  # type: ignore[arg-type]
    )
    one_byte = sum(cost.layer.n_outputs for cost in found) * config.train.batch_size * REPORT_BYTES_PER_VALUE
    return (
        f"saved for back-propagation {_size(saved)}, with the weights {_size(saved + weights)}"
        f"; at one byte a value, as the report estimates: {_size(one_byte)}"
    )


def layer_table(config: StudyConfig, machine: Machine) -> Table:
    """Layer by layer: shape, parameters, FLOPs, activations."""
    columns = ("layer", "kind", "channels", "size", "parameters", "GFLOP", "activations, MiB")
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    table.columns[0].no_wrap = True
    for column in table.columns[2:]:
        column.justify = "right"
    if impossible(config):
        return table
    for cost in _layer_costs(config, machine):
        layer = cost.layer
        table.add_row(
            layer.name,
            layer.kind,
            str(layer.channels),
            f"{layer.height}x{layer.width}",
            f"{layer.n_parameters:,}" if layer.n_parameters else "",
            f"{layer.flops / 1e9:.3f}" if layer.flops else "",
            f"{cost.activations / MIB:.1f}" if cost.activations else "",
        )
    return table


def corner_table(config: StudyConfig, machine: Machine) -> Table:
    """The corners of the search space, as far as they matter for size and memory."""
    names = [name for name, _ in config.search if not name.startswith("train.") or name == "train.batch_size"]
    sizes = [name.partition(".")[2] for name in names]
    memory_gib = machine.memory_gib
    columns = [
        *sizes,
        "parameters, M",
        "GFLOP an image",
        "peak, GiB",
        *([f"{memory_gib:g} GiB"] if memory_gib else []),
    ]
    table = Table(*columns, box=None, pad_edge=False, title="corners of the search space", title_justify="left")
    for column in table.columns[len(sizes) :]:
        column.justify = "right"
    dimensions = dict(config.search)
    for values in itertools.product(*(_ends(dimensions[name]) for name in names)):
        shown = [str(value) for value in values]
        try:
            corner = config.with_params(dict(zip(names, values, strict=True)))
            reason = impossible(corner)
        except ConfigError as error:
            reason = str(error)
        if reason:
            table.add_row(*shown, "", "", "cannot be", *([""] if memory_gib else []))
            continue
        total = _memory(corner, machine).total
        table.add_row(
            *shown,
            _rounded(n_parameters(corner.unet, corner.data.n_channels) / 1e6),
            _rounded(training_flops(*_shape(corner)) / 1e9),
            _rounded(total / GIB),
            *([_verdict(total, memory_gib)] if memory_gib else []),
        )
    return table


def impossible(config: StudyConfig) -> str | None:
    """Why a configuration cannot exist at its size; None if it can."""
    return why_impossible(*_shape(config), batch_size=config.train.batch_size)


def _size(n_bytes: float) -> str:
    """`5.50 GiB`, or `7.3 MiB` of what is small."""
    return f"{n_bytes / GIB:.2f} GiB" if n_bytes >= GIB / 10 else f"{_rounded(n_bytes / MIB)} MiB"


def _rounded(value: float) -> str:
    """Two decimals, or two digits of what these would make nothing of."""
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _verdict(needed: int, memory_gib: float) -> str:
    # The same rule by which a study decides what costs no training.
    return "fits" if needed <= MEMORY_SHARE * memory_gib * GIB else "does not fit"


def _memory(config: StudyConfig, machine: Machine) -> MemoryEstimate:
    return training_memory(
        *_shape(config),
        batch_size=config.train.batch_size,
        precision=machine.precision,  # type: ignore[arg-type]
        optimizer=config.train.optimizer,
        momentum=config.train.momentum,
        device=machine.device,  # type: ignore[arg-type]
    )


def _layer_costs(config: StudyConfig, machine: Machine) -> list[LayerCost]:
    """Of the layers that are run: a network that is trained on windows stretches nothing, as in the paper."""
    costs = layer_costs(
        *_shape(config),
        batch_size=config.train.batch_size,
        precision=machine.precision,  # type: ignore[arg-type]
        device=machine.device,  # type: ignore[arg-type]
    )
    return [cost for cost in costs if not (config.sees_windows and cost.layer.kind == "interpolation")]


def _shape(config: StudyConfig) -> tuple[Any, int, int, int]:
    return config.unet, config.data.n_channels, config.data.height, config.data.width


def _ends(dimension: Choice | Range) -> tuple[Any, ...]:
    if isinstance(dimension, Range):
        return (dimension.low,) if dimension.low == dimension.high else (dimension.low, dimension.high)
    values = dimension.values
    if all(isinstance(value, int | float) for value in values):
        return (min(values), max(values)) if len(values) > 1 else values
    return values
