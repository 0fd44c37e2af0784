"""State of a fit between epochs: save it, restore it from a checkpoint, and write the files of a finished fit."""

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from hpsearch.data.batches import DeviceData, eval_batches
from hpsearch.paths import FitPaths, append_line, atomic_write, write_json, write_text
from hpsearch.training import checkpoint
from hpsearch.training.checkpoint import WeightsInfo
from hpsearch.training.evaluation import Forward, Indices, predict_logits
from hpsearch.training.rows import EpochRow, FitSummary, to_line
from hpsearch.training.runtime import Runtime, describe
from hpsearch.training.task import FitTask
from hpsearch.typed_json import from_json, to_json

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """Network, optimizer and results of a fit after its latest epoch."""

    task: FitTask
    model: nn.Module
    """Network on the device of the fit."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    rows: list[EpochRow] = field(default_factory=list)
    scores: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    """Score of every held-out image in the study's metric after every epoch, (epochs, n)."""
    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 4), np.int64))
    """Pixel counts tp, fp, fn, tn of every held-out image after the latest epoch, (n, 4)."""

    @property
    def stopped(self) -> bool:
        """Whether the fit is not finished: it ended before its last epoch, or is still running."""
        return len(self.rows) < self.task.config.train.epochs

    def to_state(self, task_digest: str) -> dict[str, Any]:
        """Return the state for a checkpoint, as tensors and plain types."""
        return {
            "digest": task_digest,
            "epoch": len(self.rows),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rows": [to_json(row) for row in self.rows],
            "scores": torch.from_numpy(self.scores),
            "counts": torch.from_numpy(self.counts),
        }

    def restore_(self, state: dict[str, Any]) -> None:
        """Restore a state that `to_state` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.rows = [from_json(EpochRow, row) for row in state["rows"]]
        self.scores, self.counts = state["scores"].numpy(), state["counts"].numpy()

    def best_score(self) -> float:
        """Return the best mean score over the held-out images so far; minus infinity if none were scored."""
        return max((float(scores.mean()) for scores in self.scores if scores.size), default=-math.inf)


def resume_(progress: Progress, paths: FitPaths, task_digest: str) -> None:
    """Restore `progress` from the last valid checkpoint, if any, and rewrite scores.npy and epochs.jsonl to match it.

    Raises CheckpointError if the checkpoint belongs to another fit.
    """
    state = checkpoint.load_latest(paths, task_digest)
    if state is not None:
        progress.restore_(state)
        logger.info("%s: resumed after epoch %d", paths.root, len(progress.rows))
        checkpoint.save_array(paths.scores, progress.scores)
    if progress.rows or paths.epochs.exists():
        write_text(paths.epochs, "".join(to_line(row) + "\n" for row in progress.rows))


def save_epoch(progress: Progress, paths: FitPaths, task_digest: str, *, is_best: bool) -> None:
    """Write the files of the latest epoch, with best.pt if `is_best`. The line in epochs.jsonl is written last."""
    row = progress.rows[-1]
    if is_best:
        # Write best.pt before the checkpoint: if the process dies in between, the resumed fit trains this epoch again
        # and writes both.
        best = {"epoch": row.epoch, "score": progress.best_score(), "model": progress.model.state_dict()}
        checkpoint.save_checkpoint(paths.best, best)
    checkpoint.save_checkpoint(paths.last, progress.to_state(task_digest), previous=paths.previous)
    checkpoint.save_array(paths.scores, progress.scores)
    append_line(paths.epochs, to_line(row))


def finish_fit(
    fit: Progress, paths: FitPaths, data: DeviceData, runtime: Runtime, *, extra: dict[str, Any] | None = None
) -> FitSummary:
    """Write the files of a finished fit, remove its checkpoints, and return the content of fit.json.

    fit.json is written last. weights.safetensors, scores.npy, counts.npy and examples.npz contain no timestamps or
    process ids. If the process dies while this function runs, resuming from last.pt and calling it again writes the
    same bytes. `extra` becomes `WeightsInfo.extra` in the weights file.
    """
    task = fit.task
    info = WeightsInfo(
        model=task.config.unet,
        in_channels=task.config.data.n_channels,
        normalization=task.normalization,
        size=task.size,
        extra=extra or {},
    )
    checkpoint.save_weights(paths.weights, fit.model, info)
    checkpoint.save_array(paths.scores, fit.scores)
    checkpoint.save_array(paths.counts, fit.counts)
    value = None
    if len(task.held_out_indices) > 0:
        save_examples(paths.examples, fit.model, info, data, task.held_out_indices, fit.scores[-1], runtime)
        value = float(np.mean(fit.scores[-1], dtype=np.float64))
    summary = FitSummary(epochs=len(fit.rows), value=value, runtime=describe(runtime))
    write_json(paths.fit, {"format": 1, **to_json(summary)})
    for path in (paths.last, paths.previous, paths.attempt):
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
    """Save the predictions for the two worst, two median and two best images by `scores` (n,), in this order.

    The .npz file has `indices` (m,) int64 into `data`, `scores` (m,) and `probabilities` (m, H, W) uint8, in which
    255 stands for probability 1.
    """
    order = np.argsort(scores, kind="stable")
    n, middle = len(order), max(0, (len(order) - 1) // 2)
    # With fewer than six images the ranks overlap, and each image is saved once.
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
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file, indices=indices[chosen], scores=scores[chosen], probabilities=np.concatenate(probabilities)
        )
