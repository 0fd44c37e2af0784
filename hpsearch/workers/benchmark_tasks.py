"""Benchmark jobs: time training steps, and count images per second while workers share a device."""

import logging
import time
from typing import Literal

import numpy as np
import psutil
import torch

from hpsearch.data.cache import Normalization
from hpsearch.errors import OutOfMemoryError
from hpsearch.training import runtime as runtimes
from hpsearch.training.loop import OnEpoch, fit
from hpsearch.training.rows import EpochRow
from hpsearch.training.task import FitTask
from hpsearch.workers.fit_task import WorkerContext
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
    n_images = min(config.train.batch_size, len(context.images(job.step.caches, config)))
    ends: list[float] = []
    seconds: list[float] = []

    def watch(row: EpochRow, _: object) -> Literal["go", "stop"]:
        seconds.append(row.train_s)
        if row.time >= job.begin and (row.time <= job.end or len(ends) < 2):
            ends.append(row.time)
        return "stop" if len(ends) > 1 and row.time > job.end else "go"

    _step_repeatedly(job.step, n_images, job.threads, context, watch, max_steps=100_000)
    return Rate(n_images * (len(ends) - 1) / max(ends[-1] - ends[0], 1e-3), min(seconds))


def _measure_step(step: StepToMeasure, context: WorkerContext, threads: int) -> tuple[float, float]:
    """Return the seconds of one image in training and in evaluation."""
    batch_size = step.config.train.batch_size
    # One image first: at full size on a CPU even that takes seconds, and then it has to do.
    alone = _time_batch(step, 1, threads, context)
    if alone[0] > MEASURE_BUDGET_S or len(context.images(step.caches, step.config)) < batch_size:
        return alone
    try:
        return _time_batch(step, batch_size, threads, context)
    except OutOfMemoryError:
        return alone


def _time_batch(step: StepToMeasure, n_images: int, threads: int, context: WorkerContext) -> tuple[float, float]:
    """Return the seconds of one image in batches of `n_images`: the best of at least two steps after the first."""
    seconds: list[tuple[float, float]] = []
    began = time.perf_counter()

    def stop_in_time(row: EpochRow, _: object) -> Literal["go", "stop"]:
        seconds.append((row.train_s / n_images, row.eval_s / n_images))
        return "stop" if len(seconds) > 2 and time.perf_counter() - began > MEASURE_BUDGET_S else "go"

    _step_repeatedly(step, n_images, threads, context, stop_in_time, max_steps=8)
    train_s, eval_s = map(min, zip(*seconds[1:], strict=True))
    return train_s, eval_s


def _step_repeatedly(
    step: StepToMeasure, n_images: int, threads: int, context: WorkerContext, on_epoch: OnEpoch, *, max_steps: int
) -> None:
    """Fit a configuration to the first `n_images` in one batch, again and again, until `on_epoch` stops it."""
    # Nothing diverges at this learning rate, and only the time matters.
    changes = {"batch_size": n_images, "epochs": max_steps, "compile": "off", "lr": 1e-9}
    changes = {f"train.{name}": value for name, value in changes.items()}
    if n_images == 1 and step.config.unet.norm in ("batch", "instance"):
        # The statistics of these need more than one value per channel.
        changes["unet.norm"] = "group"
    config, images = step.config.with_params(changes), np.arange(n_images, dtype=np.int64)
    n_channels = config.data.n_channels
    task = FitTask(
        config=config,
        train_indices=images,
        held_out_indices=images,
        normalization=Normalization((0.5,) * n_channels, (0.25,) * n_channels),
        seed=0,
    )
    fit(task, context.images(step.caches, config), context.runtime(config, threads), on_epoch=on_epoch)
