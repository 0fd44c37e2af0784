"""Functions that run a worker's jobs (fit, measure, score, select), and the worker's state between jobs."""

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import psutil
import torch

from hpsearch.config import StudyConfig
from hpsearch.data.batches import DeviceData
from hpsearch.data.cache import Normalization, open_cache
from hpsearch.data.decode import read_pair
from hpsearch.errors import OutOfMemoryError
from hpsearch.inference import select_postprocessing
from hpsearch.models.network import uses_batch_statistics
from hpsearch.paths import FitPaths, write_json
from hpsearch.training import runtime as runtimes
from hpsearch.training.checkpoint import load_weights, save_array
from hpsearch.training.loop import OnEpoch, fit
from hpsearch.training.metrics import SCORES, PixelCounts
from hpsearch.training.progress import Progress, finish_fit, save_examples
from hpsearch.training.rows import EpochRow
from hpsearch.training.runtime import Runtime
from hpsearch.training.task import FitTask
from hpsearch.workers import attempts, jobs
from hpsearch.workers.jobs import CachePaths, Finished, FitJob, MeasureJob, StepToMeasure, Stopped, WorkerSettings
from hpsearch.workers.plan import image_flops

logger = logging.getLogger(__name__)

MEASURE_BUDGET_S = 0.5
"""If a training step with one image takes more seconds than this, no step with a whole batch is measured."""


class WorkerContext:
    """Device, threads and loaded images of one worker, kept between jobs."""

    def __init__(self, settings: WorkerSettings, on_epoch: OnEpoch) -> None:
        self.settings = settings
        self.on_epoch = on_epoch
        """Callback that reports an epoch of a FitJob and returns whether to continue."""
        self._data: dict[CachePaths, DeviceData] = {}

    def runtime(self, config: StudyConfig, threads: int = 0) -> Runtime:
        """Return the runtime for a fit of `config`. `threads` above 0 replaces the worker's number of threads."""
        train, threads = config.train, threads or self.settings.threads
        return runtimes.make_runtime(self.settings.device, amp=train.amp, compile=train.compile, threads=threads)

    def images(self, caches: CachePaths) -> DeviceData:
        """Return the images of these caches, loaded for the worker's device.

        Only the images requested last stay loaded, because each image size needs additional memory.
        """
        if caches not in self._data:
            self._data.clear()
            truth = open_cache(caches.truth) if caches.truth else None
            device = runtimes.choose_device(self.settings.device)
            self._data[caches] = DeviceData(open_cache(caches.images), device, truth=truth)
        return self._data[caches]

    def forget_images(self) -> None:
        """Release the memory of the images."""
        self._data.clear()


def run_fit(job: FitJob, context: WorkerContext) -> Finished | Stopped:
    """Run a fit, from its checkpoint if there is one."""
    config, folder = job.config, FitPaths(job.folder)
    folder.root.mkdir(parents=True, exist_ok=True)
    train, held_out = (np.asarray(indices, np.int64) for indices in (job.train, job.held_out))
    data, runtime = context.images(job.caches), context.runtime(config)
    normalization = data.cache.normalization(train, config.data.color)
    task = FitTask(
        config=config, train_indices=train, held_out_indices=held_out, normalization=normalization, seed=job.seed
    )
    # Only the first fit of each fold keeps the weights of its best epoch.
    options: dict[str, Any] = {"paths": folder, "keep_best": job.replicate == 0, "on_epoch": context.on_epoch}
    extra: dict[str, Any] = {
        "threshold": 0.5,
        "color": config.data.color,
        "match": config.data.match,
        "reading": data.cache.index.preparation.reading.for_images(),
    }
    if config.augment.crop and config.data.match == "resize":
        # Size of the images from which the random crops were taken.
        extra["frame"] = list(config.data.cached_size)
    with attempts.writing(folder, job.attempt):
        result = fit_within_memory(task, lambda parts: fit(parts, data, runtime, **options))
        if result.stopped:
            return Stopped()
        return Finished(finish_fit(result, folder, data, runtime, extra=extra).value)


def fit_within_memory(task: FitTask, run: Callable[[FitTask], Progress]) -> Progress:
    """Run a fit. Each time memory runs out, continue it with batches that are split into parts of half the size.

    Batches of networks with batch normalisation are not split, because that would change the result. Raises
    OutOfMemoryError if whole batches of such a network, or single images of any other, do not fit in memory.
    """
    while True:
        try:
            return run(task)
        except OutOfMemoryError as error:
            n_images = task.micro_batch or task.config.train.batch_size
            if n_images == 1 or uses_batch_statistics(task.config.unet):
                raise
            logger.warning("%s; continuing with parts of %d images", error, n_images // 2)
            task = dataclasses.replace(task, micro_batch=n_images // 2)


def measure(job: MeasureJob, context: WorkerContext) -> Finished:
    """Return the seconds per image of each configuration, and a description of the machine.

    Configurations that do not fit in memory are left out. Trials with such configurations end as infeasible.
    """
    runtime = context.runtime(job.config, job.threads)
    steps = []
    for step in job.steps:
        try:
            steps.append(jobs.MeasuredStep(image_flops(step.config), *_measure_step(step, job, context)))
        except OutOfMemoryError as error:
            logger.info("not measured: %s", error)
    is_cuda = runtime.device.type == "cuda"
    found = jobs.Measurement(
        device=runtime.device.type,
        n_devices=torch.cuda.device_count() if is_cuda else 1,
        precision=runtime.precision,
        memory_bytes=torch.cuda.mem_get_info(runtime.device)[0] if is_cuda else psutil.virtual_memory().available,
        steps=tuple(steps),
        machine=runtimes.describe(runtime),
    )
    return Finished(measurement=found)


def _measure_step(step: StepToMeasure, job: MeasureJob, context: WorkerContext) -> tuple[float, float]:
    """Return the seconds per image in training and in evaluation, for a whole batch if time and memory allow."""
    batch_size = step.config.train.batch_size
    # Start with one image. If even this takes seconds, as at full size on a CPU, it remains the only measurement.
    alone = _time_batch(step, 1, job.threads, context, 0.0)
    if alone[0] > MEASURE_BUDGET_S or len(context.images(step.caches)) < batch_size:
        return alone
    try:
        return _time_batch(step, batch_size, job.threads, context, job.seconds)
    except OutOfMemoryError:
        return alone


def _time_batch(
    step: StepToMeasure, n_images: int, threads: int, context: WorkerContext, at_least_s: float
) -> tuple[float, float]:
    """Return the median seconds per image in training and evaluation, over steps on the first `n_images` images.

    The steps are repeated for `at_least_s` seconds, but at least twice after the first one, which is not counted.
    """
    seconds: list[tuple[float, float]] = []
    began = time.perf_counter()

    def stop_in_time(row: EpochRow, _: object) -> Literal["go", "stop"]:
        seconds.append((row.train_s / n_images, row.eval_s / n_images))
        return "stop" if len(seconds) > 2 and time.perf_counter() - began >= at_least_s else "go"

    # Only the time matters. At this learning rate, training does not diverge.
    changes: dict[str, Any] = {"train.batch_size": n_images, "train.epochs": 100_000, "train.lr": 1e-9}
    if n_images == 1 and step.config.unet.norm in ("batch", "instance"):
        # These normalisations need more than one value per channel. A single image may have only one in some layers.
        changes["unet.norm"] = "group"
    config = step.config.with_params({**changes, "train.compile": "off"})
    images, n_channels = np.arange(n_images, dtype=np.int64), config.data.n_channels
    normalization = Normalization((0.5,) * n_channels, (0.25,) * n_channels)
    task = FitTask(config=config, train_indices=images, held_out_indices=images, normalization=normalization, seed=0)
    data, runtime = context.images(step.caches), context.runtime(config, threads)
    fit(task, data, runtime, on_epoch=stop_in_time)
    # The first step is slower than the others, so leave it out.
    train_s, eval_s = np.median(seconds[1:], axis=0).tolist()
    return train_s, eval_s


def score_officially(job: jobs.OfficialScoreJob, context: WorkerContext) -> None:
    """Predict a mask at the original resolution of each image, and write the masks and their pixel counts."""
    # Imported here because these modules import pandas, which no other job needs.
    from hpsearch.inference.predictor import Ensemble, Predictor
    from hpsearch.inference.scoring import count_mask, mask_name, write_mask

    how = dataclasses.asdict(context.settings)
    predictor = Ensemble([Predictor.load(path, **how) for path in job.weights])
    counts = []
    for sample in job.images:
        image, mask = read_pair(sample.image, sample.mask, job.reading)
        pred = predictor.mask(predictor.logits(image))
        counts.append(count_mask(pred, mask.numpy() > 0, name=sample.id))
        if job.masks is not None:
            write_mask(job.masks / mask_name(sample.id), pred)
        # Free the memory before decoding the next image: one image may take hundreds of megabytes.
        del image, mask, pred
    save_array(job.counts, np.array(counts, np.int64))


def select(job: jobs.SelectPostprocessingJob, context: WorkerContext) -> None:
    """Select the post-processing on out-of-fold predictions, and write the selection as JSON."""
    with (runtime := context.runtime(job.config)).active():
        data = context.images(job.caches)
        chosen = select_postprocessing.select(
            job.networks, data, runtime, metric=job.config.study.metric, source=job.source, ensemble=job.ensemble
        )
    write_json(job.out, dataclasses.asdict(chosen))


def keep(job: jobs.KeepJob, context: WorkerContext) -> None:
    """Copy weights files and store the selected post-processing in the copies."""
    for source, target in job.copies:
        select_postprocessing.keep_model(source, target, job.postprocessing)


def count(job: jobs.CountJob, context: WorkerContext) -> None:
    """Predict all images of a cache, and write the pixel counts after post-processing and, if requested, examples."""
    with (runtime := context.runtime(job.config)).active():
        data = context.images(job.caches)
        images = np.arange(len(data), dtype=np.int64)
        networks = [load_weights(path, runtime.device) for path in job.weights]
        (counts,) = select_postprocessing.count_pixels_of(networks, images, [job.postprocessing], data, runtime)
        save_array(job.counts, counts)
        if job.examples is not None:
            scores = SCORES[job.config.study.metric](PixelCounts.from_columns(counts)).astype(np.float32)
            save_examples(job.examples, *networks[0], data, images, scores, runtime)
