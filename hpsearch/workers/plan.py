"""Execution plan of a study (devices, workers, threads, speed), and its predictions of time and memory.

The plan is derived once from measurements and stored with the study. A resumed study uses the stored plan, because
thread counts and precision affect the bytes of the results. Does not import torch.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from hpsearch.config import StudyConfig
from hpsearch.config.data import DataConfig
from hpsearch.config.model import UNetConfig
from hpsearch.config.search import Choice, Range
from hpsearch.errors import ConfigError
from hpsearch.models.memory import Step
from hpsearch.models.network import n_parameters, training_flops, training_memory, why_impossible
from hpsearch.workers.jobs import Capacity, ClusterWorker, MeasuredStep, WorkerSettings

MEMORY_SHARE = 0.9
"""Largest fraction of a device's memory that a fit may be predicted to need. Predictions are accurate to 10 %."""


@dataclass(frozen=True, kw_only=True)
class ExecutionPlan:
    """Devices, workers and measured speed with which a study is run on this machine."""

    device: str
    precision: str
    """Precision of autocast if `train.amp` is auto: float32, bf16 or fp16."""
    workers: tuple[WorkerSettings, ...]
    memory_bytes: int
    """Memory of the device that one worker may use, in bytes."""
    steps: tuple[MeasuredStep, ...] = ()
    machine: Mapping[str, Any] = field(default_factory=dict)
    """Processor, versions and number of cores, for documentation only."""
    alone_threads: int = 0
    """Number of threads with which a single fit was fastest; 0 if not measured."""
    cluster: tuple[ClusterWorker, ...] = ()
    """Dask workers, including those that were lost a short time ago; empty if the workers run on this machine."""
    scheduler: str = ""
    """Address of the Dask scheduler of the latest run; empty if the workers run on this machine."""

    @property
    def connected(self) -> tuple[ClusterWorker, ...]:
        """Dask workers that are connected."""
        return tuple(worker for worker in self.cluster if worker.is_connected)

    def with_cluster(self, cluster: tuple[ClusterWorker, ...]) -> Self:
        """Return the plan with other Dask workers, and one worker for each of them that is connected."""
        plan = dataclasses.replace(self, cluster=cluster)
        return dataclasses.replace(plan, workers=plan.workers[:1] * max(1, len(plan.connected)))

    @property
    def alone(self) -> WorkerSettings:
        """Device and number of threads for a fit that runs alone.

        If there is only one worker, its settings are used. Otherwise the fit uses the fastest measured number of
        threads. If that was not measured, the fit uses as many threads as each worker, because more threads can be
        many times slower on a busy machine.
        """
        first = self.workers[0]
        return first if len(self.workers) == 1 else WorkerSettings(first.device, self.alone_threads or first.threads)

    def epoch_s(self, config: StudyConfig, n_train: int, n_held_out: int) -> float:
        """Return the expected duration of one epoch of `config` in seconds; NaN if nothing was measured."""
        if not self.steps:
            return math.nan
        flops = image_flops(config)
        train_s = _interpolate([(step.flops, step.train_s) for step in self.steps], flops)
        eval_s = _interpolate([(step.flops, step.eval_s) for step in self.steps], flops)
        return n_train * train_s + n_held_out * eval_s


@dataclass(frozen=True)
class Infeasible:
    """Reason why a configuration cannot be trained."""

    reason: str
    excess: float
    """Relative excess of the needed memory over the limit, always above 0; 1 if the network cannot be trained
    at all. The sampler uses it as a constraint."""


def why_infeasible(config: StudyConfig, plan: ExecutionPlan) -> Infeasible | None:
    """Return why `config` cannot be trained under `plan`, or None if it can.

    On a cluster, the memory of one worker must be sufficient.
    """
    if reason := why_impossible(*_shape(config), batch_size=config.train.batch_size):
        return Infeasible(reason, 1.0)
    capacities: Iterable[Any] = dict.fromkeys(worker.capacity for worker in plan.cluster) or (plan,)
    memory = [(predicted_bytes(config, each), each.memory_bytes * MEMORY_SHARE) for each in capacities]
    needed, available = min(memory, key=lambda pair: pair[0] / pair[1])
    if needed <= available:
        return None
    device = "the largest worker" if plan.cluster else "this device"
    return Infeasible(
        f"needs about {needed / 2**30:.1f} GiB for a training step, but {device} has {available / 2**30:.1f} GiB",
        needed / available - 1.0,
    )


def fits_memory(config: StudyConfig, capacity: Capacity) -> bool:
    """Return whether a training step of `config` fits in a worker's memory."""
    return predicted_bytes(config, capacity) <= capacity.memory_bytes * MEMORY_SHARE


def predicted_bytes(config: StudyConfig, plan: ExecutionPlan | Capacity) -> int:
    """Return the predicted peak memory of a training step of `config` on the plan's device, in bytes."""
    train = config.train
    step = Step(
        batch_size=train.batch_size,
        precision={"off": "float32", "auto": plan.precision}.get(train.amp, train.amp),
        optimizer=train.optimizer,
        momentum=train.momentum,
        device="cuda" if plan.device == "cuda" else "cpu",
    )
    return training_memory(*_shape(config), step).total


def disk_bytes(config: StudyConfig, n_folds: int, n_workers: int) -> int:
    """Return an upper bound for the disk space of a study's weights and checkpoints, in bytes.

    The bound uses the largest network in a sample of the search space. It counts the last and the best weights of
    each fold for three trials: the two best ones and the one that is running. Each worker keeps two checkpoints while
    it writes a third.
    """
    slots = 2 if config.train.optimizer == "adamw" else 1
    candidates = [config.with_params({}), *sample_space(config)]
    largest = max(4 * n_parameters(candidate.unet, candidate.data.n_channels) for candidate in candidates)
    return largest * (3 * 2 * n_folds + 3 * n_workers * (1 + slots))


def image_flops(config: StudyConfig) -> int:
    """Return the FLOPs of a training step per image; 0 if the network is impossible."""
    return 0 if why_impossible(*_shape(config)) else training_flops(*_shape(config))


@dataclass(frozen=True)
class Forecast:
    """Expected size and duration of the rest of a search."""

    n_trials: int
    n_replicates: int
    """Largest number of trials that are replicated after the search."""
    n_images: int
    """Number of training and validation images."""
    fit_s: float
    """Expected duration of a fit in seconds, averaged over the search space."""
    total_s: float
    """Wall-clock seconds of all these trials on all workers, including replicates but without pruning."""
    expected_s: float
    """The same with the pruner of the study. It is shorter than `total_s` only for the race."""


def sample_space(config: StudyConfig, n: int = 64) -> list[StudyConfig]:
    """Draw `n` random configurations from the search space and return those that are valid."""
    generator = np.random.default_rng(0)
    found = []
    for _ in range(n if config.search else 1):
        with suppress(ConfigError):
            found.append(config.with_params({name: _draw(dim, generator) for name, dim in config.search.items()}))
    return found


def measured_configs(config: StudyConfig) -> list[StudyConfig]:
    """Return the configurations to measure before a study: default, cheapest and most expensive."""
    candidates = [each for each in (config.with_params({}), *sample_space(config)) if image_flops(each)]
    by_cost = sorted(candidates, key=image_flops)
    chosen = [*candidates[:1], *by_cost[:1], *by_cost[-1:]]
    return list({image_flops(each): each for each in chosen}.values())


def describe_data(data: DataConfig) -> str:
    """Return a short description of the data: `ISIC-2017, 572x572 rgb`."""
    return f"{data.images or data.root}, {data.height}x{data.width} {data.color}"


def _draw(dimension: Choice | Range, generator: np.random.Generator) -> Any:
    if isinstance(dimension, Choice):
        return dimension.values[int(generator.integers(len(dimension.values)))]
    if dimension.log:
        return dimension.nearest(math.exp(generator.uniform(math.log(dimension.low), math.log(dimension.high))))
    return dimension.nearest(generator.uniform(dimension.low, dimension.high))


def _interpolate(points: Sequence[tuple[int, float]], flops: int) -> float:
    """Return the seconds at `flops`, interpolated between measured points (FLOPs, seconds) on a log-log scale.

    Above the largest point, the seconds are proportional to the FLOPs. Below the smallest point they are constant,
    because the fixed costs of a step dominate.
    """
    if flops <= 0:
        return 0.0
    x, y = np.log(sorted(points)).T
    at = math.log(flops)
    return float(np.exp(np.interp(at, x, y) + max(0.0, at - x[-1])))


def _shape(config: StudyConfig) -> tuple[UNetConfig, int, int, int]:
    return config.unet, config.data.n_channels, config.data.height, config.data.width
