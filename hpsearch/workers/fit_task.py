"""The fit job: train one network within the memory of the device, and write what stays of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from hpsearch.config import StudyConfig
from hpsearch.errors import OutOfMemoryError
from hpsearch.models.costs import why_impossible
from hpsearch.paths import FitPaths
from hpsearch.training.finish import finish_fit
from hpsearch.training.loop import FitResult, OnEpoch, fit, microbatches_are_exact, part_sizes
from hpsearch.training.rows import FitSummary
from hpsearch.workers.context import WorkerContext
from hpsearch.workers.jobs import FitJob

logger = logging.getLogger(__name__)


def run_fit(job: FitJob, context: WorkerContext, on_epoch: OnEpoch) -> FitSummary | None:
    """Train, continuing from a checkpoint if there is one; return what fit.json holds, or None if it was stopped."""
    config, folder = job.config, FitPaths(job.folder)
    folder.root.mkdir(parents=True, exist_ok=True)
    train, held_out = (np.asarray(images, np.int64) for images in (job.train, job.held_out))
    data = context.images(job.caches, config)
    runtime = context.runtime(config)
    normalization = data.cache.normalization(train, config.data.color)
    size = config.data.height, config.data.width

    def fit_in_parts(micro_batch: int | None) -> FitResult:
        return fit(
            model_config=config.unet,
            in_channels=config.data.n_channels,
            data=data,
            train_indices=train,
            held_out_indices=held_out,
            train=config.train,
            augment=config.augment,
            normalization=normalization,
            size=size,
            eval_size=config.eval_size,
            stretch=not config.sees_windows,
            metric=config.study.metric,
            seed=job.seed,
            runtime=runtime,
            paths=folder,
            keep_best=job.keep_best,
            micro_batch=micro_batch,
            on_epoch=on_epoch,
        )

    result, micro_batch = fit_within_memory(fit_in_parts, config, folder)
    if result.stopped:
        return None
    return finish_fit(
        result,
        folder,
        data=data,
        held_out_indices=held_out,
        normalization=normalization,
        size=size,
        runtime=runtime,
        extra={
            "threshold": 0.5,
            "color": config.data.color,
            "match": config.data.match,
            "reading": data.cache.index.preparation.reading.for_images(),
            **_frame(config),
        },
        micro_batch=micro_batch,
    )


def fit_within_memory(
    fit_in_parts: Callable[[int | None], FitResult], config: StudyConfig, folder: FitPaths
) -> tuple[FitResult, int | None]:
    """Return a fit by whole batches, or by the largest halves that fit, and the images at once (None: all).

    Batches are halved where the result stays the same, or where `study.allow_microbatch` allows another result and
    the parts are not too small for batch normalisation. Otherwise raises OutOfMemoryError.
    """
    is_exact = microbatches_are_exact(config.unet)
    micro_batch: int | None = None
    while True:
        try:
            return fit_in_parts(micro_batch), micro_batch
        except OutOfMemoryError as error:
            n_images = micro_batch or config.train.batch_size
            if n_images == 1 or not (is_exact or config.study.allow_microbatch):
                raise
            micro_batch = n_images // 2
            smallest = min(part_sizes(config.train.batch_size, micro_batch))
            size = config.data.height, config.data.width
            if why_impossible(config.unet, config.data.n_channels, *size, batch_size=smallest):
                raise
            logger.warning("%s; continuing with parts of %d images", error, micro_batch)
        if not is_exact:
            # Other parts give another result, so the fit starts anew.
            for path in (folder.last, folder.previous, folder.best, folder.epochs, folder.scores):
                path.unlink(missing_ok=True)


def _frame(config: StudyConfig) -> dict[str, Any]:
    """Return the size of the frames that fresh crops were taken from, if it is not their own size."""
    is_frame = config.augment.crop and config.data.match == "resize"
    return {"frame": list(config.data.cached_size)} if is_frame else {}
