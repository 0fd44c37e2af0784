"""Benchmark jobs: time training steps, and count images per second while workers share a device."""

from __future__ import annotations

import logging
import time
from typing import Any, Literal

import numpy as np
import psutil
import torch

from hpsearch.config import StudyConfig
from hpsearch.data.batches import DeviceData
from hpsearch.data.cache import Normalization
from hpsearch.errors import OutOfMemoryError
from hpsearch.training import runtime as runtimes
from hpsearch.training.loop import OnEpoch, fit
from hpsearch.training.rows import EpochRow
from hpsearch.workers.context import WorkerContext
from hpsearch.workers.jobs import MeasuredStep, MeasureJob, Measurement, Rate, RateJob, StepToMeasure
from hpsearch.workers.plan import image_flops

logger = logging.getLogger(__name__)

MEASURE_BUDGET_S = 0.5
"""Seconds after which a measured configuration needs no further step."""


def measure(job: MeasureJob, context: WorkerContext) -> Measurement:
    """Return the seconds per image of each configuration, and a description of the machine.

    A configuration that does not fit into memory is left out; in the study it ends as infeasible.
    """
    runtime = context.runtime(job.config, job.threads)
    steps = []
    for step in job.steps:
        try:
            train_s, eval_s = _measure_step(step, context, job.threads)
        except OutOfMemoryError as error:
            logger.info("not measured: %s", error)
            continue
        steps.append(MeasuredStep(image_flops(step.config), train_s, eval_s))
    is_cuda = runtime.device.type == "cuda"
    return Measurement(
        device=runtime.device.type,
        n_devices=torch.cuda.device_count() if is_cuda else 1,
        precision=runtime.precision,
        memory_bytes=torch.cuda.mem_get_info(runtime.device)[0] if is_cuda else psutil.virtual_memory().available,
        steps=tuple(steps),
        machine=runtimes.describe(runtime),
    )


def measure_rate(job: RateJob, context: WorkerContext) -> Rate:
    """Return the images per second of training in a window of time.

    Steps that ended in the window count, and later ones until there are two.
    """
    config = job.step.config
    data = context.images(job.step.caches, config)
    n_images = min(config.train.batch_size, len(data))
    ends: list[float] = []
    seconds: list[float] = []

    def watch(row: EpochRow, _: object) -> Literal["go", "stop"]:
        seconds.append(row.train_s)
        if row.time >= job.begin and (row.time <= job.end or len(ends) < 2):
            ends.append(row.time)
        return "stop" if len(ends) > 1 and row.time > job.end else "go"

    _step_repeatedly(config, data, n_images, job.threads, context, watch, max_steps=100_000)
    return Rate(n_images * (len(ends) - 1) / max(ends[-1] - ends[0], 1e-3), min(seconds))


def _measure_step(step: StepToMeasure, context: WorkerContext, threads: int) -> tuple[float, float]:
    """Return the seconds of one image in training and in evaluation."""
    data, batch_size = context.images(step.caches, step.config), step.config.train.batch_size
    # One image first: at full size on a CPU even that takes seconds, and then it has to do.
    alone = _time_batch(step.config, data, 1, threads, context)
    if alone[0] > MEASURE_BUDGET_S or len(data) < batch_size:
        return alone
    try:
        return _time_batch(step.config, data, batch_size, threads, context)
    except OutOfMemoryError:
        return alone


def _time_batch(
    config: StudyConfig, data: DeviceData, n_images: int, threads: int, context: WorkerContext
) -> tuple[float, float]:
    """Return the seconds of one image in batches of `n_images`: the best of at least two steps after the first."""
    seconds: list[tuple[float, float]] = []
    began = time.perf_counter()

    def stop_in_time(row: EpochRow, _: object) -> Literal["go", "stop"]:
        seconds.append((row.train_s, row.eval_s))
        return "stop" if len(seconds) > 2 and time.perf_counter() - began > MEASURE_BUDGET_S else "go"

    _step_repeatedly(config, data, n_images, threads, context, stop_in_time, max_steps=8)
    return min(each[0] for each in seconds[1:]) / n_images, min(each[1] for each in seconds[1:]) / n_images


def _step_repeatedly(
    config: StudyConfig,
    data: DeviceData,
    n_images: int,
    threads: int,
    context: WorkerContext,
    on_epoch: OnEpoch,
    *,
    max_steps: int,
) -> None:
    """Fit `config` to the first `n_images` in one batch, again and again, until `on_epoch` stops it."""
    changes: dict[str, Any] = {
        "train.batch_size": n_images,
        "train.epochs": max_steps,
        "train.compile": "off",
        # Nothing diverges at this learning rate, and only the time matters.
        "train.lr": 1e-9,
    }
    if n_images == 1 and config.unet.norm in ("batch", "instance"):
        # The statistics of these need more than one value per channel.
        changes["unet.norm"] = "group"
    config = config.with_params(changes)
    images = np.arange(n_images, dtype=np.int64)
    fit(
        model_config=config.unet,
        in_channels=config.data.n_channels,
        data=data,
        train_indices=images,
        held_out_indices=images,
        train=config.train,
        augment=config.augment,
        normalization=Normalization((0.5,) * config.data.n_channels, (0.25,) * config.data.n_channels),
        size=(config.data.height, config.data.width),
        eval_size=config.eval_size,
        stretch=not config.sees_windows,
        metric=config.study.metric,
        seed=0,
        runtime=context.runtime(config, threads),
        on_epoch=on_epoch,
    )
