"""The benchmark job: time training steps, and describe the machine."""

import logging
import time
from typing import Any, Literal

import numpy as np
import psutil
import torch

from hpsearch.data.cache import Normalization
from hpsearch.errors import OutOfMemoryError
from hpsearch.training import runtime as runtimes
from hpsearch.training.loop import fit
from hpsearch.training.rows import EpochRow
from hpsearch.training.task import FitTask
from hpsearch.workers.fit_task import WorkerContext
from hpsearch.workers.jobs import Finished, MeasuredStep, MeasureJob, Measurement, StepToMeasure
from hpsearch.workers.plan import image_flops

logger = logging.getLogger(__name__)

MEASURE_BUDGET_S = 0.5
"""A step of one image that takes longer is not repeated with a whole batch."""


def measure(job: MeasureJob, context: WorkerContext) -> Finished:
    """Return the seconds per image of each configuration, and a description of the machine.

    A configuration that does not fit into memory is left out; in the study it ends as infeasible.
    """
    runtime = context.runtime(job.config, job.threads)
    steps = []
    for step in job.steps:
        try:
            train_s, eval_s = _measure_step(step, job, context)
        except OutOfMemoryError as error:
            logger.info("not measured: %s", error)
            continue
        steps.append(MeasuredStep(image_flops(step.config), train_s, eval_s))
    is_cuda = runtime.device.type == "cuda"
    found = Measurement(
        device=runtime.device.type,
        n_devices=torch.cuda.device_count() if is_cuda else 1,
        precision=runtime.precision,
        memory_bytes=torch.cuda.mem_get_info(runtime.device)[0] if is_cuda else psutil.virtual_memory().available,
        steps=tuple(steps),
        machine=runtimes.describe(runtime),
    )
    return Finished(measurement=found)


def _measure_step(step: StepToMeasure, job: MeasureJob, context: WorkerContext) -> tuple[float, float]:
    """Return the seconds of one image in training and in evaluation."""
    batch_size = step.config.train.batch_size
    # One image first: at full size on a CPU even that takes seconds, and then it has to do.
    alone = _time_batch(step, 1, job.threads, context, 0.0)
    if alone[0] > MEASURE_BUDGET_S or len(context.images(step.caches, step.config)) < batch_size:
        return alone
    try:
        return _time_batch(step, batch_size, job.threads, context, job.seconds)
    except OutOfMemoryError:
        return alone


def _time_batch(
    step: StepToMeasure, n_images: int, threads: int, context: WorkerContext, at_least_s: float
) -> tuple[float, float]:
    """Return the seconds of one image: the medians of repeated steps with the first `n_images` as their batch."""
    seconds: list[tuple[float, float]] = []
    began = time.perf_counter()

    def stop_in_time(row: EpochRow, _: object) -> Literal["go", "stop"]:
        seconds.append((row.train_s / n_images, row.eval_s / n_images))
        return "stop" if len(seconds) > 2 and time.perf_counter() - began >= at_least_s else "go"

    # Nothing diverges at this learning rate, and only the time matters.
    changes: dict[str, Any] = {"train.batch_size": n_images, "train.epochs": 100_000, "train.lr": 1e-9}
    if n_images == 1 and step.config.unet.norm in ("batch", "instance"):
        # The statistics of these need more than one value per channel.
        changes["unet.norm"] = "group"
    config = step.config.with_params({**changes, "train.compile": "off"})
    images, n_channels = np.arange(n_images, dtype=np.int64), config.data.n_channels
    task = FitTask(
        config=config,
        train_indices=images,
        held_out_indices=images,
        normalization=Normalization((0.5,) * n_channels, (0.25,) * n_channels),
        seed=0,
    )
    data, runtime = context.images(step.caches, config), context.runtime(config, threads)
    fit(task, data, runtime, on_epoch=stop_in_time)
    # The first step is slower.
    train_s, eval_s = np.median(seconds[1:], axis=0).tolist()
    return train_s, eval_s
