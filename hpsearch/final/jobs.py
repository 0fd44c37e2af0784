"""The jobs of a final after training: score networks on the test split, and select and apply post-processing."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

from hpsearch.config.data import DataConfig
from hpsearch.data.pool_caches import PoolCaches
from hpsearch.data.prepare import Prepared, locate
from hpsearch.final.fold_networks import FoldNetworks
from hpsearch.inference.postprocessing import FoldNetwork, Postprocessing
from hpsearch.paths import FinalPaths, FitPaths
from hpsearch.store.record import StudyRecord
from hpsearch.store.trials import TrialRecord
from hpsearch.workers.jobs import (
    CachePaths,
    CountJob,
    ImageFiles,
    OfficialScoreJob,
    SelectPostprocessingJob,
    WeightsCopy,
)


def members(folder: FinalPaths, networks: FoldNetworks | None) -> list[WeightsCopy]:
    """Return the networks of an ensemble and where they go; those of an earlier one are removed."""
    shutil.rmtree(folder.ensemble, ignore_errors=True)
    sources = networks.weights if networks is not None else ()
    return [WeightsCopy(source, folder.ensemble / f"fold{fold}.safetensors") for fold, source in enumerate(sources)]


def score_job(trial: TrialRecord, fit: FitPaths, seen: Prepared, test: Prepared) -> CountJob:
    job = count_job(trial, Postprocessing(), [fit.weights], fit.test_counts, seen, test)
    return dataclasses.replace(job, examples=fit.examples)


def _test_caches(seen: Prepared, test: Prepared) -> CachePaths:
    """Return the test images as the network sees them, and at the size at which they are scored."""
    return CachePaths(seen.cache_path, test.cache_path if seen.key != test.key else None)


def select_job(
    record: StudyRecord,
    trial: TrialRecord,
    folder: FinalPaths,
    networks: FoldNetworks,
    caches: PoolCaches,
    *,
    ensemble: bool,
) -> SelectPostprocessingJob:
    others: tuple[Path | None, ...] = networks.others or (None,) * len(networks.weights)
    return SelectPostprocessingJob(
        config=trial.study_config,
        metric=record.config.study.metric,
        caches=CachePaths(*caches.paths(trial.study_config)),
        networks=tuple(
            FoldNetwork(weights, other, tuple(record.folds.held_out(fold).tolist()))
            for fold, (weights, other) in enumerate(zip(networks.weights, others, strict=True))
        ),
        source=networks.source,
        ensemble=ensemble,
        out=folder.choices,
    )


def count_job(
    trial: TrialRecord, choices: Postprocessing, weights: Sequence[Path], counts: Path, seen: Prepared, test: Prepared
) -> CountJob:
    return CountJob(
        config=trial.study_config,
        caches=_test_caches(seen, test),
        weights=tuple(weights),
        postprocessing=choices,
        counts=counts,
    )


def samples(data: DataConfig, caches: Path, test: Prepared) -> tuple[ImageFiles, ...]:
    """Return the files of every test image, where they lie now: a cache outlives its dataset's folder."""
    samples = {sample.id: sample for sample in locate(data, caches).split("test")}
    return tuple(ImageFiles(image, samples[image].image, samples[image].mask) for image in test.ids)


def official_job(
    weights: Sequence[Path], test: Prepared, images: tuple[ImageFiles, ...], masks: Path | None, counts: Path
) -> OfficialScoreJob:
    return OfficialScoreJob(weights=tuple(weights), reading=test.reading, images=images, masks=masks, counts=counts)
