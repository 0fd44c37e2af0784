"""The files of a finished fit: weights, scores, counts, examples, and fit.json last."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hpsearch import paths as files
from hpsearch.data.batches import DeviceData, eval_batches
from hpsearch.paths import FitPaths
from hpsearch.training import runtime as devices
from hpsearch.training.checkpoint import WeightsInfo, save_array, save_weights
from hpsearch.training.evaluation import Forward, Indices, predict_logits
from hpsearch.training.progress import Progress
from hpsearch.training.runtime import Runtime
from hpsearch.training.task import microbatches_are_exact


def finish_fit(
    fit: Progress, paths: FitPaths, data: DeviceData, runtime: Runtime, *, extra: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Write the files of a finished fit, fit.json last, remove its checkpoints, and return the content of fit.json.

    weights.safetensors, scores.npy, counts.npy and examples.npz do not depend on time or process. If the process
    dies at any point, a repetition from last.pt writes the same bytes. `extra` is stored in the weights file.
    fit.json holds `micro_batch` if it changed the result.
    """
    task, rows, n_held_out = fit.task, fit.rows, len(fit.task.held_out_indices)
    info = WeightsInfo(
        model=task.config.unet,
        in_channels=data.n_channels,
        normalization=task.normalization,
        size=task.size,
        extra=extra or {},
    )
    save_weights(paths.weights, fit.model, info)
    save_array(paths.scores, fit.scores)
    save_array(paths.counts, fit.counts)
    if n_held_out:
        save_examples(paths.examples, fit.model, info, data, task.held_out_indices, fit.scores[-1], runtime)
    train_s, eval_s = sum(row.train_s for row in rows), sum(row.eval_s for row in rows)
    summary = {
        "format": 1,
        "epochs": len(rows),
        "value": float(np.mean(fit.scores[-1], dtype=np.float64)) if n_held_out else None,
        "n_held_out": n_held_out,
        "micro_batch": None if microbatches_are_exact(task.config.unet) else task.micro_batch,
        "seconds": train_s + eval_s,
        "train_s": train_s,
        "eval_s": eval_s,
        "images_per_s": sum(row.images_per_s * row.train_s for row in rows) / train_s,
        "peak_bytes": max(row.peak_bytes for row in rows),
        "scores_sha256": files.sha256_file(paths.scores),
        "weights_sha256": files.sha256_file(paths.weights),
        "runtime": devices.describe(runtime),
    }
    files.write_json(paths.fit, summary)
    for path in (paths.last, paths.previous):
        path.unlink(missing_ok=True)
    return summary


def save_examples(
    path: Path,
    model: Forward,
    info: WeightsInfo,
    data: DeviceData,
    indices: Indices,
    scores: npt.NDArray[np.floating[Any]],
    runtime: Runtime,
) -> None:
    """Save the predictions for the two worst, median and best images by `scores` (n,), in this order.

    The .npz file has `indices` (m,) int64 into `data`, `scores` (m,) and `probabilities` (m, H, W) uint8, where 255
    is probability 1.
    """
    order = np.argsort(scores, kind="stable")
    n, middle = len(order), max(0, (len(order) - 1) // 2)
    # With fewer images each is saved once.
    ranks = np.unique([0, 1, middle, middle + 1, n - 2, n - 1])
    chosen = order[ranks[(ranks >= 0) & (ranks < n)]]
    batches = eval_batches(
        data, indices[chosen], batch_size=len(chosen), normalization=info.normalization, size=info.size
    )
    with runtime.active():
        probabilities = [
            logits.sigmoid().mul(255).round().to(torch.uint8).squeeze(1).cpu().numpy()
            for logits, _ in predict_logits(model, batches, runtime)
        ]
    with files.atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file, indices=indices[chosen], scores=scores[chosen], probabilities=np.concatenate(probabilities)
        )
