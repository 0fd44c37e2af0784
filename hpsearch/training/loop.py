"""One fit: train one network on one set of images, score it on another after every epoch, resume exactly."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hpsearch.config import stable_seed
from hpsearch.config.data import AugmentConfig
from hpsearch.config.model import UNetConfig
from hpsearch.config.train import TrainConfig
from hpsearch.data.batches import Batch, DeviceData, train_batches
from hpsearch.data.cache import Normalization
from hpsearch.errors import DivergedError, OutOfMemoryError
from hpsearch.models.costs import output_size
from hpsearch.models.network import build_network
from hpsearch.paths import FitPaths
from hpsearch.training import runtime as devices
from hpsearch.training.compilation import compiled_if_useful
from hpsearch.training.evaluation import Forward, Indices, count, covered, eval_batch_size, evaluate, fetch
from hpsearch.training.losses import Loss, loss_function
from hpsearch.training.metrics import SCORES, PixelCounts
from hpsearch.training.progress import Progress, as_recorded, resume_, save_epoch
from hpsearch.training.rows import EpochRow as EpochRow
from hpsearch.training.rows import Scores as Scores
from hpsearch.training.runtime import Runtime
from hpsearch.training.schedule import lr_factor, make_optimizer, set_lr_
from hpsearch.training.task import FitTask
from hpsearch.training.task import microbatches_are_exact as microbatches_are_exact
from hpsearch.training.task import part_sizes as part_sizes

OnEpoch = Callable[[EpochRow, npt.NDArray[np.float32]], Literal["go", "stop"]]
"""Called with the row of each epoch and the held-out scores (n,) float32; "stop" ends the fit after this epoch."""


@dataclass(frozen=True)
class FitResult:
    """Result of a fit."""

    model: nn.Module
    """The network after the last epoch, on its device, in evaluation mode."""
    model_config: UNetConfig
    rows: tuple[EpochRow, ...]
    scores: npt.NDArray[np.float32]
    """The metric of every held-out image after every epoch, (epochs, n)."""
    counts: npt.NDArray[np.int64]
    """tp, fp, fn, tn of every held-out image after the last epoch, (n, 4)."""
    stopped: bool
    """Whether `on_epoch` ended the fit before its last epoch."""


def fit(
    *,
    model_config: UNetConfig,
    in_channels: int,
    data: DeviceData,
    train_indices: Indices,
    held_out_indices: Indices,
    train: TrainConfig,
    augment: AugmentConfig,
    normalization: Normalization,
    size: tuple[int, int],
    metric: Literal["dice", "jaccard"],
    seed: int,
    runtime: Runtime,
    eval_size: tuple[int, int] | None = None,
    stretch: bool = True,
    paths: FitPaths | None = None,
    keep_best: bool = False,
    micro_batch: int | None = None,
    on_epoch: OnEpoch | None = None,
    clock: Callable[[], float] = time.time,
) -> FitResult:
    """Train a network for `train.epochs` epochs and score the held-out images after each.

    Images have `size`. Scores are computed at `eval_size` (None: `size`), which must be the size of the masks that
    `data` serves for evaluation. `held_out_indices` may be empty. Without `stretch`, which suits images that are
    windows, a `valid` network is trained and scored on the part of each image that its output covers.

    With `paths` the fit resumes from its last good checkpoint. It ends as if it had never stopped: on a CPU under the
    same `runtime`, weights and scores are equal to the byte. After each epoch the following is written in this order:
    best.pt, with `keep_best` and if the held-out mean is the best so far (nothing here reads it); the checkpoint;
    scores.npy; the line in epochs.jsonl. `on_epoch` is called last. A resumed fit calls `on_epoch` again for its last
    epoch, because the process may have died before the call.

    `micro_batch` sums gradients over parts of a batch of at most that many images (`part_sizes`), to save memory. The
    result is the same apart from rounding where `microbatches_are_exact`. Otherwise batch normalisation uses the
    statistics of the parts.

    Raises ConfigError if the network cannot be trained at `size` on this few images at once; DivergedError if a
    loss is NaN or infinite, found at the end of its epoch; OutOfMemoryError if memory ran out, after all of it was
    released; CheckpointError if `paths` holds the checkpoint of another fit.
    """
    task = FitTask(
        model_config=model_config,
        in_channels=in_channels,
        train_indices=train_indices,
        held_out_indices=held_out_indices,
        train=train,
        augment=augment,
        normalization=normalization,
        size=size,
        eval_size=eval_size or size,
        stretch=stretch,
        metric=metric,
        seed=seed,
        micro_batch=micro_batch,
    )
    task.check()
    # Memory that an earlier fit left behind would count towards the peak of this one.
    devices.trim_memory(runtime.device)
    try:
        with runtime.active(), devices.seeded(seed, runtime.device):
            return _fit(task, data, runtime, paths, keep_best, on_epoch, clock)
    except (RuntimeError, MemoryError) as error:
        if not devices.is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else "no memory left"
    # Outside the except block the traceback is gone, and with it the last references to the tensors of the fit.
    devices.free_memory(runtime.device)
    raise OutOfMemoryError(f"training on {runtime.device} ran out of memory: {reason}")


def _fit(
    task: FitTask,
    data: DeviceData,
    runtime: Runtime,
    paths: FitPaths | None,
    keep_best: bool,
    on_epoch: OnEpoch | None,
    clock: Callable[[], float],
) -> FitResult:
    device = runtime.device
    model = build_network(task.model_config, task.in_channels, seed=task.seed, margin=task.margin)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    progress = Progress(model, make_optimizer(task.train, model.parameters(), device), runtime.make_scaler())
    task_digest = task.digest(data.cache.key)
    recorded = {} if paths is None else resume_(progress, paths, task_digest)
    forward = compiled_if_useful(model, task, runtime)
    epochs = _Epochs(task, data, runtime, progress, forward, loss_function(task.train), clock)
    stopped = False
    if progress.rows and on_epoch is not None:
        stopped = on_epoch(progress.rows[-1], progress.scores[-1]) == "stop"
    while len(progress.rows) < task.train.epochs and not stopped:
        best_before = progress.best_score()
        row = as_recorded(epochs.run_next(), recorded)
        progress.rows.append(row)
        if paths is not None:
            save_epoch(progress, paths, task_digest, is_best=keep_best and progress.best_score() > best_before)
        stopped = on_epoch is not None and on_epoch(row, progress.scores[-1]) == "stop"
    model.eval()
    return FitResult(
        model,
        task.model_config,
        tuple(progress.rows),
        progress.scores_array(),
        progress.counts,
        stopped=len(progress.rows) < task.train.epochs,
    )


@dataclass(frozen=True)
class _Epochs:
    """Trains and evaluates one epoch after another."""

    task: FitTask
    data: DeviceData
    runtime: Runtime
    progress: Progress
    forward: Forward
    """The network, compiled if that is useful."""
    loss: Loss
    clock: Callable[[], float]

    def run_next(self) -> EpochRow:
        """Run the next epoch and return its row; scores and counts go into `progress`."""
        epoch, device = len(self.progress.rows) + 1, self.runtime.device
        # Reseeded in every epoch, so that a resumed fit draws the same numbers.
        devices.set_seed(stable_seed(self.task.seed, epoch))
        devices.reset_peak_memory(device)
        began = time.perf_counter()
        train_scores, n_images, lr = self._train_epoch(epoch)
        train_s = time.perf_counter() - began
        if not math.isfinite(train_scores.loss):
            raise DivergedError(epoch, train_scores.loss)

        began = time.perf_counter()
        held_out, scores = self._evaluate_epoch(epoch)
        eval_s = time.perf_counter() - began
        self.progress.scores.append(scores)
        return EpochRow(
            epoch=epoch,
            time=round(self.clock(), 3),
            train=train_scores,
            held_out=held_out,
            lr=lr,
            train_s=train_s,
            eval_s=eval_s,
            images_per_s=n_images / train_s,
            peak_bytes=devices.peak_memory(device),
        )

    def _train_epoch(self, epoch: int) -> tuple[Scores, int, float]:
        """Train one epoch; return mean scores over its images, their number, and the last learning rate.

        Losses and counts stay on the device until the end, so that the CPU never waits for it in between.
        """
        task, optimizer, scaler = self.task, self.progress.optimizer, self.progress.scaler
        n_steps, first_step = task.train.epochs * task.steps_per_epoch, (epoch - 1) * task.steps_per_epoch
        losses: list[Tensor] = []
        counts: list[Tensor] = []
        lr = task.train.lr
        self.progress.model.train()
        batches = train_batches(
            self.data,
            task.train_indices,
            batch_size=task.train.batch_size,
            seed=task.seed,
            epoch=epoch,
            augment=task.augment,
            normalization=task.normalization,
            size=task.size,
        )
        for step, batch in enumerate(batches, first_step):
            lr = task.train.lr * lr_factor(task.train, step, n_steps)
            set_lr_(optimizer, lr)
            optimizer.zero_grad(set_to_none=True)
            for images, masks in _parts(batch, task.part_sizes):
                with self.runtime.autocast():
                    logits = self.forward(images)
                masks = covered(masks, logits, task.margin)
                value = self.loss(logits, masks) * (len(images) / len(batch.images))
                scaler.scale(value).backward()  # type: ignore[no-untyped-call]
                losses.append(value.detach() * len(batch.images))
                counts.append(count(logits.detach(), masks))
            scaler.step(optimizer)
            scaler.update()
            self.runtime.end_step()
        all_counts, total = fetch(counts, losses)
        return _mean_scores(all_counts, total / len(all_counts)), len(all_counts), lr

    def _evaluate_epoch(self, epoch: int) -> tuple[Scores | None, npt.NDArray[np.float32]]:
        """Return mean scores and the metric of every held-out image; the counts go into `progress`."""
        task, model = self.task, self.progress.model.eval()
        if len(task.held_out_indices) == 0:
            # Without held-out images nothing else detects a last step that ruined the weights.
            if not bool(torch.stack([parameter.isfinite().all() for parameter in model.parameters()]).all()):
                raise DivergedError(epoch, math.nan)
            return None, np.zeros(0, np.float32)
        counts, loss = evaluate(
            model,
            self.data,
            task.held_out_indices,
            normalization=task.normalization,
            size=task.size,
            runtime=self.runtime,
            batch_size=eval_batch_size(task.train.batch_size, task.size, self.runtime.device),
            loss=self.loss,
        )
        if not math.isfinite(loss):
            raise DivergedError(epoch, loss)
        size = output_size(task.model_config, task.in_channels, task.size) if task.margin else task.eval_size
        n_pixels = int(counts[0].sum())
        if n_pixels != size[0] * size[1]:
            raise ValueError(f"eval_size is {size}, but the masks have {n_pixels} pixels")
        self.progress.counts = counts
        scores = SCORES[task.metric](PixelCounts.from_columns(counts))
        return _mean_scores(counts, loss), scores.astype(np.float32)


def _parts(batch: Batch, sizes: list[int]) -> Iterator[Batch]:
    return map(Batch, torch.split(batch.images, sizes), torch.split(batch.masks, sizes))


def _mean_scores(counts: npt.NDArray[np.int64], loss: float) -> Scores:
    columns = PixelCounts.from_columns(counts)
    return Scores(loss, *(float(SCORES[name](columns).mean()) for name in ("dice", "jaccard", "accuracy")))
