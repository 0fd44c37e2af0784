"""The jobs of `final` after training: score networks on images, and select and apply post-processing."""

import dataclasses

import numpy as np

from hpsearch.data.decode import read_pair
from hpsearch.inference import select_postprocessing
from hpsearch.paths import atomic_write, write_json
from hpsearch.training.checkpoint import load_weights, save_array
from hpsearch.training.metrics import SCORES, PixelCounts
from hpsearch.training.progress import save_examples
from hpsearch.workers.fit_task import WorkerContext
from hpsearch.workers.jobs import CountJob, KeepJob, OfficialScoreJob, SelectPostprocessingJob


def score_officially(job: OfficialScoreJob, context: WorkerContext) -> None:
    """Write the masks of images at their own resolution, and their counts against the true masks."""
    # Imported here because they import pandas, which no other job needs.
    from hpsearch.inference.predictor import Ensemble, Predictor
    from hpsearch.inference.scoring import count_mask, encode_mask, mask_name

    how = dataclasses.asdict(context.settings)
    predictor = Ensemble([Predictor.load(path, **how) for path in job.weights])
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
        data = context.images(job.caches, job.config)
        chosen = select_postprocessing.select(
            job.networks, data, runtime, metric=job.metric, source=job.source, ensemble=job.ensemble
        )
    write_json(job.out, dataclasses.asdict(chosen))


def keep(job: KeepJob, context: WorkerContext) -> None:
    """Copy weights, with the post-processing selected for them entered."""
    for copy in job.copies:
        select_postprocessing.keep_model(copy.source, copy.target, job.postprocessing)


def count(job: CountJob, context: WorkerContext) -> None:
    """Write the per-image counts of one network, or several together, after post-processing, and a few examples."""
    with (runtime := context.runtime(job.config)).active():
        data = context.images(job.caches, job.config)
        images = np.arange(len(data), dtype=np.int64)
        networks = [load_weights(path, runtime.device) for path in job.weights]
        (counts,) = select_postprocessing.count_pixels_of(networks, images, [job.postprocessing], data, runtime)
        save_array(job.counts, counts)
        if job.examples is not None:
            scores = SCORES[job.config.study.metric](PixelCounts.from_columns(counts)).astype(np.float32)
            save_examples(job.examples, *networks[0], data, images, scores, runtime)
