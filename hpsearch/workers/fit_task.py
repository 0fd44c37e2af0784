"""The fit job, which trains one network within the memory of the device, and what a worker keeps between jobs."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from hpsearch.config import StudyConfig
from hpsearch.data.batches import DeviceData
from hpsearch.data.cache import open_cache
from hpsearch.errors import OutOfMemoryError
from hpsearch.models.costs import uses_batch_statistics
from hpsearch.paths import FitPaths
from hpsearch.training import runtime as runtimes
from hpsearch.training.loop import OnEpoch, fit
from hpsearch.training.progress import Progress, finish_fit
from hpsearch.training.rows import FitSummary
from hpsearch.training.runtime import Runtime
from hpsearch.training.task import FitTask
from hpsearch.workers.jobs import CachePaths, FitJob
from hpsearch.workers.pool import WorkerSettings

logger = logging.getLogger(__name__)


class WorkerContext:
    """Device, threads and loaded images of one worker."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self._data: dict[tuple[CachePaths, str], DeviceData] = {}

    def runtime(self, config: StudyConfig, threads: int = 0) -> Runtime:
        """Return how this worker computes; `threads` other than its own are for measuring only."""
        train, threads = config.train, threads or self.settings.threads
        return runtimes.make_runtime(self.settings.device, amp=train.amp, compile=train.compile, threads=threads)

    def images(self, caches: CachePaths, config: StudyConfig) -> DeviceData:
        """Return the images on the device. Only one size and colour is kept, because each is another copy."""
        key = (caches, config.data.color)
        if key not in self._data:
            self._data.clear()
            truth = open_cache(caches.truth) if caches.truth else None
            device = runtimes.choose_device(self.settings.device)
            self._data[key] = DeviceData(open_cache(caches.images), device, color=config.data.color, truth=truth)
        return self._data[key]

    def forget_images(self) -> None:
        """Give the memory of the images back."""
        self._data.clear()


def run_fit(job: FitJob, context: WorkerContext, on_epoch: OnEpoch) -> FitSummary | None:
    """Train, continuing from a checkpoint if there is one; return what fit.json holds, or None if it was stopped."""
    config, folder = job.config, FitPaths(job.folder)
    folder.root.mkdir(parents=True, exist_ok=True)
    train = np.asarray(job.train, np.int64)
    data, runtime = context.images(job.caches, config), context.runtime(config)
    task = FitTask(
        config=config,
        train_indices=train,
        held_out_indices=np.asarray(job.held_out, np.int64),
        normalization=data.cache.normalization(train, config.data.color),
        seed=job.seed,
    )
    options: dict[str, Any] = {"paths": folder, "keep_best": job.keep_best, "on_epoch": on_epoch}
    result = fit_within_memory(task, folder, lambda parts: fit(parts, data, runtime, **options))
    if result.stopped:
        return None
    extra: dict[str, Any] = {
        "threshold": 0.5,
        "color": config.data.color,
        "match": config.data.match,
        "reading": data.cache.index.preparation.reading.for_images(),
    }
    if config.augment.crop and config.data.match == "resize":
        # The size of the frames that fresh crops were taken from, which is not their own size.
        extra["frame"] = list(config.data.cached_size)
    return finish_fit(result, folder, data, runtime, extra=extra)


def fit_within_memory(task: FitTask, folder: FitPaths, run: Callable[[FitTask], Progress]) -> Progress:
    """Return the fit that `run` makes of the task, by whole batches or by the largest halves that fit.

    Batches are halved where the result stays the same, or where `study.allow_microbatch` allows another result and
    the parts are not too small for batch normalisation. Otherwise raises OutOfMemoryError.
    """
    config, is_exact = task.config, not uses_batch_statistics(task.config.unet)
    while True:
        try:
            return run(task)
        except OutOfMemoryError as error:
            n_images = task.micro_batch or config.train.batch_size
            task = dataclasses.replace(task, micro_batch=n_images // 2)
            if n_images == 1 or not (is_exact or config.study.allow_microbatch) or task.why_impossible():
                raise
            logger.warning("%s; continuing with parts of %d images", error, n_images // 2)
        if not is_exact:
            # Other parts give another result, so the fit starts anew.
            for path in (folder.last, folder.previous, folder.best, folder.epochs, folder.scores):
                path.unlink(missing_ok=True)
