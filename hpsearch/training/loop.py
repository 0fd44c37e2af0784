"""One fit: train one network on one set of images, score it on another after every epoch, resume exactly."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpsearch import paths as files
from hpsearch.config import digest
from hpsearch.config.data import AugmentConfig
from hpsearch.config.model import UNetConfig
from hpsearch.config.train import TrainConfig
from hpsearch.data.batches import Batch, DeviceData, n_train_batches, train_batches
from hpsearch.data.cache import Normalization
from hpsearch.errors import ConfigError, DeviceError, DivergedError, OutOfMemoryError
from hpsearch.models.shapes import output_size, training_flops, why_impossible
from hpsearch.models.unet import UNet
from hpsearch.paths import FitPaths
from hpsearch.training import checkpoint
from hpsearch.training import runtime as devices
from hpsearch.training.checkpoint import save_array
from hpsearch.training.evaluation import Forward, Indices, count, covered, eval_batch_size, evaluate, fetch
from hpsearch.training.losses import Loss, loss_function
from hpsearch.training.metrics import SCORES, PixelCounts
from hpsearch.training.rows import EpochRow as EpochRow
from hpsearch.training.rows import Scores as Scores
from hpsearch.training.rows import read_lines, to_line
from hpsearch.training.runtime import Runtime
from hpsearch.training.schedule import lr_factor, make_optimizer, set_lr_
from hpsearch.typed_json import from_json, to_json

logger = logging.getLogger(__name__)

OnEpoch = Callable[[EpochRow, npt.NDArray[np.float32]], Literal["go", "stop"]]
"""Hears each epoch's row and the held-out scores (n,) float32; "stop" ends the fit after this epoch."""

COMPILED_FLOPS = 2e17
"""Work of a fit from which on `train.compile = "auto"` compiles on CUDA: 20 minutes at a fifth of an H200's peak, and
longer on any lesser card, beside one or two minutes of compilation."""


@dataclass(frozen=True)
class FitResult:
    """What a fit gave."""

    model: UNet
    """After the last epoch, on its device, in evaluation mode."""
    rows: tuple[EpochRow, ...]
    scores: npt.NDArray[np.float32]
    """The metric of every held-out image after every epoch, (epochs, n)."""
    counts: npt.NDArray[np.int64]
    """tp, fp, fn, tn of every held-out image after the last epoch, (n, 4)."""
    stopped: bool
    """Whether `on_epoch` ended it before its last epoch."""


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
    """Train a network for `train.epochs` epochs, scoring the held-out images after each.

    Images come at `size`; scores are computed at `eval_size` (None: `size`), which must be the size of the masks that
    `data` serves for evaluation. `held_out_indices` may be empty. Without `stretch`, which images that are windows
    want, a `valid` network is trained and scored on the part of them that its output covers.

    With `paths` the fit resumes from its last good checkpoint, and ends as if it had never stopped: same weights and
    same scores, to the byte on a CPU under the same `runtime`. After each epoch come, in this order, with
    `keep_best` and if its held-out mean is the best so far best.pt, which nothing here reads; the checkpoint,
    scores.npy, the line in epochs.jsonl, `on_epoch`. A fit that resumes first calls `on_epoch` again for the last
    epoch it has, since whoever was killed may not have judged it.

    `micro_batch` sums gradients over parts of a batch of at most so many images (`part_sizes`), to need less memory.
    The result is the same but for rounding where there is no batch normalisation (`microbatches_are_exact`);
    elsewhere the statistics are those of the parts.

    Raises ConfigError when the network cannot be trained at `size` on so few images at once; DivergedError when a
    loss is NaN or infinite, found at the end of its epoch; OutOfMemoryError when memory ran out, all of it given
    back; CheckpointError when `paths` holds the checkpoint of another fit.
    """
    task = _Task(
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
    n_images = min(task.part_sizes)
    if reason := why_impossible(model_config, in_channels, *size, batch_size=n_images):
        raise ConfigError(f"with {n_images} image{'s' if n_images > 1 else ''} at once: {reason}")
    # What an earlier fit left behind would count towards this one's peak.
    devices.trim_memory(runtime.device)
    try:
        with runtime.active(), devices.seeded(seed, runtime.device):
            return _fit(task, data, runtime, paths, keep_best, on_epoch, clock)
    except (RuntimeError, MemoryError) as error:
        if not devices.is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else "no memory left"
    # Only here, where the traceback is gone, does nothing refer to the tensors of the fit any more.
    devices.free_memory(runtime.device)
    raise OutOfMemoryError(f"training on {runtime.device} ran out of memory: {reason}")


def microbatches_are_exact(config: UNetConfig) -> bool:
    """Whether gradients summed over parts of a batch are those of the whole batch, rounding aside."""
    return config.norm != "batch"


def part_sizes(n_images: int, micro_batch: int | None) -> list[int]:
    """Images in each part of a batch of `n_images` whose parts shall have at most `micro_batch` (None: one part).

    As equal as can be: 5 by 4 is 3 and 2, since of 4 and 1 the last would be normalised by a single image.
    """
    n_parts = math.ceil(n_images / micro_batch) if micro_batch else 1
    smaller, n_larger = divmod(n_images, n_parts)
    return [smaller + 1] * n_larger + [smaller] * (n_parts - n_larger)


@dataclass(frozen=True, kw_only=True)
class _Task:
    """All that decides what comes out of a fit, the images and the arithmetic aside."""

    model_config: UNetConfig
    in_channels: int
    train_indices: Indices
    held_out_indices: Indices
    train: TrainConfig
    augment: AugmentConfig
    normalization: Normalization
    size: tuple[int, int]
    eval_size: tuple[int, int]
    stretch: bool
    metric: Literal["dice", "jaccard"]
    seed: int
    micro_batch: int | None

    @property
    def steps_per_epoch(self) -> int:
        return n_train_batches(len(self.train_indices), self.train.batch_size)

    @property
    def part_sizes(self) -> list[int]:
        """Images that go through the network at once, one part of a step after the other."""
        return part_sizes(max(1, min(self.train.batch_size, len(self.train_indices))), self.micro_batch)

    def digest(self, data_key: str) -> str:
        """A hash that a checkpoint carries, so that it is never continued as another fit."""
        table: dict[str, Any] = {"data": data_key}
        for part in dataclasses.fields(self):
            value = getattr(self, part.name)
            if isinstance(value, np.ndarray):
                value = hashlib.sha256(np.ascontiguousarray(value, np.int64).tobytes()).hexdigest()
            elif dataclasses.is_dataclass(value) and not isinstance(value, type):
                value = dataclasses.asdict(value)
            table[part.name] = value
        # These choose how to compute, as the device does, not what.
        for name in ("amp", "compile"):
            del table["train"][name]
        if microbatches_are_exact(self.model_config):
            del table["micro_batch"]
        if self.stretch or self.model_config.padding == "same":
            del table["stretch"]
        return digest(table)


@dataclass
class _Progress:
    """What must survive a restart."""

    model: UNet
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    rows: list[EpochRow] = field(default_factory=list)
    scores: list[npt.NDArray[np.float32]] = field(default_factory=list)
    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 4), np.int64))

    def to_state(self, task_digest: str, device: torch.device) -> dict[str, Any]:
        return {
            "digest": task_digest,
            "epoch": len(self.rows),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": devices.rng_states(device),
            "rows": [to_json(row) for row in self.rows],
            "scores": torch.from_numpy(self.scores_array()),
            "counts": torch.from_numpy(self.counts),
        }

    def restore_(self, state: dict[str, Any], source: Path, device: torch.device) -> None:
        checkpoint.load_state_(self.model, state["model"], source)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        devices.restore_rng_states(state["rng"], device)
        self.rows = [from_json(EpochRow, row) for row in state["rows"]]
        self.scores = list(state["scores"].numpy())
        self.counts = state["counts"].numpy()

    def scores_array(self) -> npt.NDArray[np.float32]:
        """(epochs, held-out images)."""
        return np.stack(self.scores) if self.scores else np.zeros((0, 0), np.float32)

    def best_score(self) -> float:
        """The best held-out mean so far; minus infinity without one."""
        return max((float(scores.mean()) for scores in self.scores if scores.size), default=-math.inf)


def _fit(
    task: _Task,
    data: DeviceData,
    runtime: Runtime,
    paths: FitPaths | None,
    keep_best: bool,
    on_epoch: OnEpoch | None,
    clock: Callable[[], float],
) -> FitResult:
    train, device = task.train, runtime.device
    model = UNet(task.model_config, task.in_channels, seed=task.seed, stretch=task.stretch)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    progress = _Progress(model, make_optimizer(train, model.parameters(), device), runtime.make_scaler())
    task_digest = task.digest(data.cache.key)
    recorded: dict[int, EpochRow] = {}
    if paths is not None:
        recorded = _resume_(progress, paths, task_digest, device)

    loss = loss_function(train)
    forward = _compiled(model, task, runtime) if _is_compiled(task, runtime) else model
    stopped = False
    if progress.rows and on_epoch is not None:
        stopped = on_epoch(progress.rows[-1], progress.scores[-1]) == "stop"
    while len(progress.rows) < train.epochs and not stopped:
        epoch = len(progress.rows) + 1
        devices.reset_peak_memory(device)
        began = time.perf_counter()
        train_scores, n_images, lr = _train_epoch(task, data, runtime, progress, forward, loss, epoch)
        train_s = time.perf_counter() - began
        if not math.isfinite(train_scores.loss):
            raise DivergedError(epoch, train_scores.loss)

        began = time.perf_counter()
        held_out, scores = _evaluate_epoch(task, data, runtime, progress, loss, epoch)
        eval_s = time.perf_counter() - began

        row = EpochRow(
            epoch=epoch,
            time=round(clock(), 3),
            train=train_scores,
            held_out=held_out,
            lr=lr,
            train_s=train_s,
            eval_s=eval_s,
            images_per_s=n_images / train_s,
            peak_bytes=devices.peak_memory(device),
        )
        row = _as_recorded(row, recorded.get(epoch))
        best_before = progress.best_score()
        progress.rows.append(row)
        progress.scores.append(scores)
        if paths is not None:
            if keep_best and progress.best_score() > best_before:
                # Before the checkpoint: who dies in between trains this epoch again, and keeps it again.
                checkpoint.save_checkpoint(
                    paths.best, {"epoch": epoch, "score": progress.best_score(), "model": model.state_dict()}
                )
            checkpoint.save_latest(paths, progress.to_state(task_digest, device))
            save_array(paths.scores, progress.scores_array())
            files.append_line(paths.epochs, to_line(row))
        stopped = on_epoch is not None and on_epoch(row, scores) == "stop"
    model.eval()
    return FitResult(
        model,
        tuple(progress.rows),
        progress.scores_array(),
        progress.counts,
        stopped=len(progress.rows) < train.epochs,
    )


def _is_compiled(task: _Task, runtime: Runtime) -> bool:
    """Whether torch.compile pays, or is wanted whatever it costs. DeviceError if it is wanted and cannot be.

    On a processor it never pays: for the UNet at 64x64 and at 128x128 it took more than a minute, and steps in bf16
    were then as fast as before, those in float32 a tenth faster at best.
    """
    reason = devices.why_no_compile(runtime.device)
    if runtime.compile == "on" and reason is not None:
        raise DeviceError(reason)
    if runtime.compile != "auto":
        return runtime.compile == "on"
    n_images = task.train.epochs * task.steps_per_epoch * sum(task.part_sizes)
    flops = n_images * training_flops(task.model_config, task.in_channels, *task.size)
    return reason is None and runtime.device.type == "cuda" and flops >= COMPILED_FLOPS


def _compiled(model: UNet, task: _Task, runtime: Runtime) -> Forward:
    """The model compiled by a trial step that leaves no trace in it; DeviceError if the compiler fails.

    Where compilation was only worth trying (`auto`), a failure leaves the model as it is.
    """
    compiled = torch.compile(model, dynamic=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.zeros(task.part_sizes[0], task.in_channels, *task.size, device=runtime.device)
    model.train()
    try:
        with runtime.autocast():
            logits = compiled(images.to(memory_format=torch.channels_last))
        logits.float().sum().backward()
    except Exception as error:
        if devices.is_out_of_memory(error):
            raise
        if runtime.compile == "on":
            raise DeviceError(f"torch.compile failed on {runtime.device}: {error}") from error
        logger.warning("torch.compile failed, going on without it: %s", error)
        compiled = model
    model.zero_grad(set_to_none=True)
    model.load_state_dict(before)
    return compiled


def _train_epoch(
    task: _Task,
    data: DeviceData,
    runtime: Runtime,
    progress: _Progress,
    forward: Forward,
    loss: Loss,
    epoch: int,
) -> tuple[Scores, int, float]:
    """Train one epoch: mean scores over its images, how many they were, and the last learning rate.

    Losses and counts stay on the device until the end: nothing before makes the processor wait for it.
    """
    train, optimizer, scaler = task.train, progress.optimizer, progress.scaler
    n_steps = train.epochs * task.steps_per_epoch
    step = (epoch - 1) * task.steps_per_epoch
    losses: list[Tensor] = []
    counts: list[Tensor] = []
    lr = train.lr
    progress.model.train()
    for batch in train_batches(
        data,
        task.train_indices,
        batch_size=train.batch_size,
        seed=task.seed,
        epoch=epoch,
        augment=task.augment,
        normalization=task.normalization,
        size=task.size,
    ):
        lr = train.lr * lr_factor(train, step, n_steps)
        set_lr_(optimizer, lr)
        optimizer.zero_grad(set_to_none=True)
        for part in _parts(batch, task.part_sizes):
            with runtime.autocast():
                logits = forward(part.images)
            masks = covered(part.masks, logits, progress.model.margin)
            value = loss(logits, masks) * (len(part.images) / len(batch.images))
            scaler.scale(value).backward()  # type: ignore[no-untyped-call]
            losses.append(value.detach() * len(batch.images))
            counts.append(count(logits.detach(), masks))
        scaler.step(optimizer)
        scaler.update()
        runtime.end_step()
        step += 1
    all_counts, total = fetch(counts, losses)
    return _mean_scores(all_counts, total / len(all_counts)), len(all_counts), lr


def _evaluate_epoch(
    task: _Task, data: DeviceData, runtime: Runtime, progress: _Progress, loss: Loss, epoch: int
) -> tuple[Scores | None, npt.NDArray[np.float32]]:
    """Mean scores and the metric of every held-out image; puts the counts into `progress`."""
    progress.model.eval()
    if len(task.held_out_indices) == 0:
        # Nothing else would notice a last step that ruined the weights.
        finite = torch.stack([parameter.isfinite().all() for parameter in progress.model.parameters()])
        if not bool(finite.all()):
            raise DivergedError(epoch, math.nan)
        return None, np.zeros(0, np.float32)
    counts, held_out_loss = evaluate(
        progress.model,
        data,
        task.held_out_indices,
        normalization=task.normalization,
        size=task.size,
        runtime=runtime,
        batch_size=eval_batch_size(task.train.batch_size, task.size, runtime.device),
        loss=loss,
    )
    if not math.isfinite(held_out_loss):
        raise DivergedError(epoch, held_out_loss)
    size = task.eval_size
    if progress.model.margin:
        size = output_size(task.model_config, task.in_channels, task.size)
    n_pixels, expected = int(counts[0].sum()), size[0] * size[1]
    if n_pixels != expected:
        raise ValueError(f"scores are wanted at {size}, but the masks have {n_pixels} pixels")
    progress.counts = counts
    scores = SCORES[task.metric](PixelCounts.from_columns(counts))
    return _mean_scores(counts, held_out_loss), scores.astype(np.float32)


def _parts(batch: Batch, sizes: list[int]) -> Iterator[Batch]:
    return map(Batch, torch.split(batch.images, sizes), torch.split(batch.masks, sizes))


def _mean_scores(counts: npt.NDArray[np.int64], loss: float) -> Scores:
    columns = PixelCounts.from_columns(counts)
    return Scores(loss, *(float(SCORES[name](columns).mean()) for name in ("dice", "jaccard", "accuracy")))


def _resume_(progress: _Progress, paths: FitPaths, task_digest: str, device: torch.device) -> dict[int, EpochRow]:
    """Fill `progress` from the last good checkpoint, if any, and make epochs.jsonl tell the same.

    Gives the rows that were recorded before, by epoch. CheckpointError if the checkpoint is that of another fit.
    """
    recorded = _recorded_rows(paths.epochs)
    state, _ = checkpoint.load_latest(paths, task_digest)
    if state is not None:
        progress.restore_(state, paths.last, device)
        logger.info("%s: resumed after epoch %d", paths.root, len(progress.rows))
    progress.rows = [_as_recorded(row, recorded.get(row.epoch)) for row in progress.rows]
    if progress.rows:
        save_array(paths.scores, progress.scores_array())
    if progress.rows or paths.epochs.exists():
        files.write_text(paths.epochs, "".join(to_line(row) + "\n" for row in progress.rows))
    return recorded


def _recorded_rows(path: Path) -> dict[int, EpochRow]:
    """Rows of epochs.jsonl by epoch; lines that a crash tore or that make no sense are left out."""
    rows: dict[int, EpochRow] = {}
    for row in read_lines(path.read_bytes())[0] if path.is_file() else []:
        rows.setdefault(row.epoch, row)
    return rows


def _as_recorded(row: EpochRow, recorded: EpochRow | None) -> EpochRow:
    """The row as it was first recorded, so that an epoch done again is logged again with the same time."""
    if recorded is None:
        return row
    if (recorded.train, recorded.held_out, recorded.lr) == (row.train, row.held_out, row.lr):
        return recorded
    # A device whose sums differ from run to run: what was found now, at the time it was first found.
    return dataclasses.replace(row, time=recorded.time)
