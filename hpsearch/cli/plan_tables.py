"""Compute the lines and tables of `hpsearch plan`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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
from hpsearch.models.memory import LayerCost, MemoryEstimate, Step, saved_activations
from hpsearch.workers.plan import MEMORY_SHARE

MIB, GIB = 2**20, 2**30
REPORT_BYTES_PER_VALUE = 1
"""The report's own estimate counts one byte per value of every feature map."""
LAYER_HEAD = ("layer", "kind", "channels", "size", "parameters", "GFLOP", "activations, MiB")


@dataclass(frozen=True)
class Machine:
    """What the tables assume about the machine."""

    precision: str = "float32"
    memory_gib: float | None = None
    device: str = "cpu"


def describe_config(config: StudyConfig, machine: Machine) -> list[str]:
    """Return everything about one configuration in a few lines."""
    unet, data, batch = config.unet, config.data, config.train.batch_size
    head = f"{describe(unet)}; {data.height}x{data.width} {data.color}, batch {batch}, {machine.precision}"
    if reason := impossible(config):
        return [head, f"impossible: {reason}"]
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
        f"training step {_rounded(training_flops(*_shape(config)) / 1e9)} GFLOP per image",
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
    saved = saved_activations(*_shape(config), _step(config, machine))
    one_byte = sum(cost.layer.n_outputs for cost in found) * config.train.batch_size * REPORT_BYTES_PER_VALUE
    return (
        f"saved for back-propagation {_size(saved)}, with the weights {_size(saved + weights)}"
        f"; at one byte per value, as the report estimates: {_size(one_byte)}"
    )


def layer_rows(config: StudyConfig, machine: Machine) -> Iterator[Sequence[str]]:
    """Yield the shape, parameters, FLOPs and activations of each layer, in the columns of `LAYER_HEAD`."""
    for cost in _layer_costs(config, machine) if not impossible(config) else ():
        layer = cost.layer
        yield (
            layer.name,
            layer.kind,
            str(layer.channels),
            f"{layer.height}x{layer.width}",
            f"{layer.n_parameters:,}" if layer.n_parameters else "",
            f"{layer.flops / 1e9:.3f}" if layer.flops else "",
            f"{sum(cost.saved) / MIB:.1f}" if cost.saved else "",
        )


def corners(config: StudyConfig, machine: Machine) -> tuple[Sequence[str], list[Sequence[str]], int]:
    """Return a table of the corners of the search space that differ in size or memory.

    Returns the head, the rows, and how many columns from the left are settings.
    """
    names = [name for name, _ in config.search if not name.startswith("train.") or name == "train.batch_size"]
    fits = [f"{machine.memory_gib:g} GiB"] if machine.memory_gib else []
    head = [*(name.partition(".")[2] for name in names), "parameters, M", "GFLOP per image", "peak, GiB", *fits]
    dimensions = dict(config.search)
    rows: list[Sequence[str]] = []
    for values in itertools.product(*(_ends(dimensions[name]) for name in names)):
        costs = _corner_costs(config, dict(zip(names, values, strict=True)), machine)
        rows.append([*map(str, values), *costs])
    return head, rows, len(names)


def _corner_costs(config: StudyConfig, params: dict[str, Any], machine: Machine) -> list[str]:
    """Return parameters, FLOPs, peak memory and, if the memory is known, whether it fits."""
    try:
        corner = config.with_params(params)
        reason = impossible(corner)
    except ConfigError as error:
        reason = str(error)
    if reason:
        return ["", "", "impossible", *([""] if machine.memory_gib else [])]
    total = _memory(corner, machine).total
    return [
        _rounded(n_parameters(corner.unet, corner.data.n_channels) / 1e6),
        _rounded(training_flops(*_shape(corner)) / 1e9),
        _rounded(total / GIB),
        *([_verdict(total, machine.memory_gib)] if machine.memory_gib else []),
    ]


def impossible(config: StudyConfig) -> str | None:
    """Return why a configuration is impossible at its size; None if it is possible."""
    return why_impossible(*_shape(config), batch_size=config.train.batch_size)


def _size(n_bytes: float) -> str:
    """Return `5.50 GiB`, or `7.3 MiB` for a small size."""
    return f"{n_bytes / GIB:.2f} GiB" if n_bytes >= GIB / 10 else f"{_rounded(n_bytes / MIB)} MiB"


def _rounded(value: float) -> str:
    """Return a number with two decimals, or with two digits if it is small."""
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _verdict(needed: int, memory_gib: float) -> str:
    # A study decides by the same rule whether a trial is infeasible.
    return "fits" if needed <= MEMORY_SHARE * memory_gib * GIB else "does not fit"


def _memory(config: StudyConfig, machine: Machine) -> MemoryEstimate:
    return training_memory(*_shape(config), _step(config, machine))


def _step(config: StudyConfig, machine: Machine) -> Step:
    train = config.train
    return Step(
        batch_size=train.batch_size,
        precision=machine.precision,
        optimizer=train.optimizer,
        momentum=train.momentum,
        device=machine.device,
    )


def _layer_costs(config: StudyConfig, machine: Machine) -> list[LayerCost]:
    """Return the costs of the layers; a network that is trained on windows has no interpolation, as in the paper."""
    costs = layer_costs(*_shape(config), _step(config, machine))
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
