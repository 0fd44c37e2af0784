"""The files of a finished fit: weights, scores, counts, examples, and fit.json last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hpsearch import paths as files
from hpsearch.data.batches import DeviceData
from hpsearch.data.cache import Normalization
from hpsearch.paths import FitPaths
from hpsearch.training import runtime as devices
from hpsearch.training.checkpoint import WeightsInfo, save_array, save_weights
from hpsearch.training.evaluation import Forward, Indices, predict_logits
from hpsearch.training.loop import FitResult
from hpsearch.training.rows import FitSummary
from hpsearch.training.runtime import Runtime
from hpsearch.training.task import microbatches_are_exact
from hpsearch.typed_json import to_json


def finish_fit(
    result: FitResult,
    paths: FitPaths,
    *,
    data: DeviceData,
    held_out_indices: Indices,
    normalization: Normalization,
    size: tuple[int, int],
    runtime: Runtime,
    extra: dict[str, Any] | None = None,
    micro_batch: int | None = None,
) -> FitSummary:
    """Write the files of a finished fit, fit.json last, remove its checkpoints, and return the content of fit.json.

    weights.safetensors, scores.npy, counts.npy and examples.npz do not depend on time or process. If the process
    dies at any point, a repetition from last.pt writes the same bytes. `extra` is stored in the weights file.
    fit.json holds `micro_batch` if it changed the result.
    """
    model = result.model
    info = WeightsInfo(
        model=result.model_config,
        in_channels=data.n_channels,
        normalization=normalization,
        size=size,
        extra=extra or {},
    )
    save_weights(paths.weights, model, info)
    save_array(paths.scores, result.scores)
    save_array(paths.counts, result.counts)
    if len(held_out_indices) > 0:
        save_examples(
            paths.examples,
            model,
            data,
            held_out_indices,
            result.scores[-1],
            normalization=normalization,
            size=size,
            runtime=runtime,
        )
    summary = _summary(result, paths, runtime, len(held_out_indices), micro_batch)
    files.write_json(paths.fit, {"format": 1, **to_json(summary)})
    for path in (paths.last, paths.previous):
        path.unlink(missing_ok=True)
    return summary


def _summary(
    result: FitResult, paths: FitPaths, runtime: Runtime, n_held_out: int, micro_batch: int | None
) -> FitSummary:
    """Return the content of fit.json."""
    rows = result.rows
    train_s, eval_s = sum(row.train_s for row in rows), sum(row.eval_s for row in rows)
    return FitSummary(
        epochs=len(rows),
        value=float(np.mean(result.scores[-1], dtype=np.float64)) if n_held_out else None,
        n_held_out=n_held_out,
        micro_batch=None if microbatches_are_exact(result.model_config) else micro_batch,
        seconds=train_s + eval_s,
        train_s=train_s,
        eval_s=eval_s,
        images_per_s=sum(row.images_per_s * row.train_s for row in rows) / train_s,
        peak_bytes=max(row.peak_bytes for row in rows),
        scores_sha256=files.sha256_file(paths.scores),
        weights_sha256=files.sha256_file(paths.weights),
        runtime=devices.describe(runtime),
    )


def save_examples(
    path: Path,
    model: Forward,
    data: DeviceData,
    indices: Indices,
    scores: npt.NDArray[np.floating[Any]],
    *,
    normalization: Normalization,
    size: tuple[int, int],
    runtime: Runtime,
    n_each: int = 2,
) -> None:
    """Save the predictions for the `n_each` worst, median and best images by `scores` (n,), in this order.

    The .npz file has `indices` (m,) int64 into `data`, `scores` (m,) and `probabilities` (m, H, W) uint8, where 255
    is probability 1.
    """
    order = np.argsort(scores, kind="stable")
    middle = max(0, (len(order) - n_each + 1) // 2)
    # With fewer images each is saved once.
    ranks = np.unique([*range(n_each), *range(middle, middle + n_each), *range(len(order) - n_each, len(order))])
    chosen = order[ranks[(ranks >= 0) & (ranks < len(order))]]
    with runtime.active():
        probabilities = [
            logits.sigmoid().mul(255).round().to(torch.uint8).squeeze(1).cpu().numpy()
            for logits, _ in predict_logits(
                model,
                data,
                indices[chosen],
                batch_size=len(chosen),
                normalization=normalization,
                size=size,
                runtime=runtime,
            )
        ]
    with files.atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file, indices=indices[chosen], scores=scores[chosen], probabilities=np.concatenate(probabilities)
        )
