"""The jobs of `final` after training: score networks on images, and select and apply post-processing."""

from __future__ import annotations

import numpy as np

from hpsearch.data.decode import read_pair
from hpsearch.inference import select_postprocessing
from hpsearch.paths import atomic_write, write_json
from hpsearch.training.checkpoint import load_weights, save_array
from hpsearch.training.evaluation import evaluate
from hpsearch.training.finish import save_examples
from hpsearch.training.metrics import SCORES, PixelCounts
from hpsearch.workers.context import WorkerContext
from hpsearch.workers.jobs import CountJob, KeepJob, OfficialScoreJob, ScoreJob, SelectPostprocessingJob


def score(job: ScoreJob, context: WorkerContext) -> None:
    """Write the per-image counts of a network on all images of a cache, and a few examples."""
    runtime = context.runtime(job.config)
    model, info = load_weights(job.weights, runtime.device)
    data = context.images(job.caches, job.config)
    images = np.arange(len(data), dtype=np.int64)
    found = evaluate(model, data, images, normalization=info.normalization, size=info.size, runtime=runtime)
    save_array(job.counts, found.counts)
    scores = SCORES[job.config.study.metric](PixelCounts.from_columns(found.counts))
    save_examples(
        job.examples,
        model,
        data,
        images,
        np.asarray(scores, np.float32),
        normalization=info.normalization,
        size=info.size,
        runtime=runtime,
    )


def score_officially(job: OfficialScoreJob, context: WorkerContext) -> None:
    """Write the masks of images at their own resolution, and their counts against the true masks."""
    # Imported here because they import pandas, which no other job needs.
    from hpsearch.inference.predictor import Ensemble
    from hpsearch.inference.scoring import count_mask, encode_mask, mask_name

    settings = context.settings
    predictor = Ensemble.load(list(job.weights), device=settings.device, threads=settings.threads)
    counts = []
    for files in job.images:
        image, mask = read_pair(files.image, files.mask, job.reading)
        pred = predictor.mask(predictor.logits(image))
        counts.append(count_mask(pred, mask.numpy() > 0, name=files.name))
        if job.masks is not None:
            with atomic_write(job.masks / mask_name(files.name)) as temporary:
                temporary.write_bytes(encode_mask(pred))
        # Before the next is decoded: one image alone may take hundreds of megabytes.
        del image, mask, pred
    save_array(job.counts, np.array(counts, np.int64))


def select(job: SelectPostprocessingJob, context: WorkerContext) -> None:
    """Select threshold, flips, cleaning and ensemble by out-of-fold predictions."""
    with (runtime := context.runtime(job.config)).active():
        chosen = select_postprocessing.select(
            job.networks,
            context.images(job.caches, job.config),
            runtime,
            metric=job.metric,
            source=job.source,
            ensemble=job.ensemble,
        )
    write_json(job.out, chosen.to_table())


def keep(job: KeepJob) -> None:
    """Copy weights, with the post-processing selected for them entered."""
    for copy in job.copies:
        select_postprocessing.keep_model(copy.source, copy.target, job.postprocessing)


def count(job: CountJob, context: WorkerContext) -> None:
    """Write the per-image counts of one network, or several together, after post-processing."""
    with (runtime := context.runtime(job.config)).active():
        data = context.images(job.caches, job.config)
        images = np.arange(len(data), dtype=np.int64)
        counts = select_postprocessing.count_pixels_of(job.weights, images, job.postprocessing, data, runtime)
    save_array(job.counts, counts)
