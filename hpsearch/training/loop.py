"""Training loop of one fit: train a network, score held-out images after every epoch, and resume after a stop."""

import math
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hpsearch.config import stable_seed
from hpsearch.config.train import TrainConfig
from hpsearch.data.batches import DeviceData, eval_batches, train_batches
from hpsearch.errors import ConfigError, DeviceError, DivergedError, OutOfMemoryError
from hpsearch.models.network import build_network, output_size, training_flops
from hpsearch.paths import FitPaths
from hpsearch.training import runtime as devices
from hpsearch.training.evaluation import Forward, count, covered, eval_batch_size, evaluate, fetch
from hpsearch.training.losses import Loss, loss_function
from hpsearch.training.metrics import SCORES, PixelCounts
from hpsearch.training.progress import Progress, resume_, save_epoch
from hpsearch.training.rows import EpochRow, Scores
from hpsearch.training.runtime import Runtime
from hpsearch.training.task import FitTask

COMPILED_FLOPS = 2e17
"""Smallest number of FLOPs of a fit for which `train.compile = "auto"` compiles on CUDA. At a fifth of its peak
speed, an H200 needs about 20 minutes for them; smaller GPUs need longer. Compilation takes one or two minutes."""
OnEpoch = Callable[[EpochRow, npt.NDArray[np.float32]], Literal["go", "stop"]]
"""Callback after each epoch, called with the epoch's row and the scores (n,) float32 of the held-out images. If it
returns "stop", the fit ends after this epoch."""


def fit(
    task: FitTask,
    data: DeviceData,
    runtime: Runtime,
    *,
    paths: FitPaths | None = None,
    keep_best: bool = False,
    on_epoch: OnEpoch | None = None,
) -> Progress:
    """Train a network for `config.train.epochs` epochs, score the held-out images after each, and return the results.

    With `paths`, the fit resumes from its last valid checkpoint and gives the same result as an uninterrupted fit. On
    a CPU with the same `runtime`, weights and scores are byte-identical. After each epoch, the fit writes the
    checkpoint, scores.npy and a line of epochs.jsonl, in this order. With `keep_best`, it first writes best.pt if the
    mean held-out score is the best so far. The fit never reads best.pt. `on_epoch` is called after all files are
    written. A resumed fit first calls it again for the last finished epoch, because the process may have died before
    the call.

    Raises ConfigError if the network cannot be trained with this image size and batch size; DivergedError if a loss
    is NaN or infinite, which is checked at the end of each epoch; OutOfMemoryError if memory runs out, after the
    memory of the fit has been released; CheckpointError if `paths` has the checkpoint of another fit.
    """
    if reason := task.why_impossible():
        raise ConfigError(reason)
    # Memory left over from an earlier fit would count towards the peak of this one.
    devices.trim_memory(runtime.device)
    try:
        with runtime.active():
            return _fit(task, data, runtime, paths, keep_best, on_epoch or (lambda row, scores: "go"))
    except (RuntimeError, MemoryError) as error:
        if not devices.is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else "no memory left"
    # Outside the except block, the traceback no longer keeps the tensors of the fit in memory.
    devices.free_memory(runtime.device)
    raise OutOfMemoryError(f"training on {runtime.device} ran out of memory: {reason}")


def _fit(
    task: FitTask, data: DeviceData, runtime: Runtime, paths: FitPaths | None, keep_best: bool, on_epoch: OnEpoch
) -> Progress:
    config, device = task.config, runtime.device
    model = build_network(config.unet, config.data.n_channels, seed=task.seed, margin=task.margin)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    progress = Progress(task, model, make_optimizer(config.train, model.parameters(), device), runtime.make_scaler())
    task_digest = task.digest(data.cache.key)
    if paths is not None:
        resume_(progress, paths, task_digest)
    forward: Forward = model
    if _is_compiled(task, runtime):
        # With `auto`, parts of the network that cannot be compiled run uncompiled.
        torch._dynamo.config.suppress_errors = runtime.compile == "auto"
        forward = torch.compile(model, dynamic=False)
    loss = loss_function(config.train)
    goes_on = not progress.rows or on_epoch(progress.rows[-1], progress.scores[-1]) == "go"
    while progress.stopped and goes_on:
        best_before = progress.best_score()
        row = _run_epoch(progress, data, runtime, forward, loss)
        progress.rows.append(row)
        if paths is not None:
            save_epoch(progress, paths, task_digest, is_best=keep_best and progress.best_score() > best_before)
        goes_on = on_epoch(row, progress.scores[-1]) == "go"
    model.eval()
    return progress


def _run_epoch(progress: Progress, data: DeviceData, runtime: Runtime, forward: Forward, loss: Loss) -> EpochRow:
    """Run the next epoch and return its row. Scores and counts of the held-out images are stored in `progress`.

    `forward` is the compiled network, or the model itself if it is not compiled. It is called only in training.
    """
    task, epoch, device = progress.task, len(progress.rows) + 1, runtime.device
    # Reseed in every epoch, so that a resumed fit draws the same random numbers.
    devices.set_seed(stable_seed(task.seed, epoch))
    devices.reset_peak_memory(device)
    began = time.perf_counter()
    train_scores = _train_epoch(progress, data, runtime, forward, loss)
    trained = time.perf_counter()
    if not math.isfinite(train_scores.loss):
        raise DivergedError(epoch, train_scores.loss)
    held_out = _evaluate_epoch(progress, data, runtime, loss)
    return EpochRow(
        epoch=epoch,
        time=round(time.time(), 3),
        train=train_scores,
        held_out=held_out,
        lr=progress.optimizer.param_groups[0]["lr"],
        train_s=trained - began,
        eval_s=time.perf_counter() - trained,
        images_per_s=task.steps_per_epoch * task.images_per_step / (trained - began),
        peak_bytes=devices.peak_memory(device),
    )


def _train_epoch(progress: Progress, data: DeviceData, runtime: Runtime, forward: Forward, loss: Loss) -> Scores:
    """Train the next epoch and return the mean scores of its images.

    Losses and counts stay on the device until the end of the epoch, so that the CPU does not wait for the device
    earlier.
    """
    task, train, epochs_before = progress.task, progress.task.config.train, len(progress.rows)
    optimizer, scaler = progress.optimizer, progress.scaler
    part_size = task.micro_batch or train.batch_size
    n_steps, first_step = train.epochs * task.steps_per_epoch, epochs_before * task.steps_per_epoch
    losses: list[Tensor] = []
    counts: list[Tensor] = []
    progress.model.train()
    batches = train_batches(
        data,
        task.train_indices,
        batch_size=train.batch_size,
        seed=task.seed,
        epoch=epochs_before + 1,
        augment=task.config.augment,
        normalization=task.normalization,
        size=task.size,
    )
    for step, batch in enumerate(batches, first_step):
        for group in optimizer.param_groups:
            group["lr"] = train.lr * lr_factor(train, step, n_steps)
        optimizer.zero_grad(set_to_none=True)
        for images, masks in zip(*(torch.split(part, part_size) for part in batch), strict=True):
            with runtime.autocast():
                logits = forward(images)
            masks = covered(masks, logits, task.margin)
            value = loss(logits, masks) * (len(images) / len(batch.images))
            scaler.scale(value).backward()  # type: ignore[no-untyped-call]
            losses.append(value.detach() * len(batch.images))
            counts.append(count(logits.detach(), masks))
        scaler.step(optimizer)
        scaler.update()
        runtime.end_step()
    return _mean_scores(*fetch(counts, losses))


def _evaluate_epoch(progress: Progress, data: DeviceData, runtime: Runtime, loss: Loss) -> Scores | None:
    """Return the mean scores over the held-out images, or None if there are none.

    The pixel counts and the score of every held-out image are stored in `progress`.
    """
    task, config, epoch = progress.task, progress.task.config, len(progress.rows) + 1
    model = progress.model.eval()
    scores = np.zeros(0, np.float32)
    held_out = None
    if len(task.held_out_indices) > 0:
        batch_size = eval_batch_size(config.train.batch_size, task.size, runtime.device)
        batches = eval_batches(
            data, task.held_out_indices, batch_size=batch_size, normalization=task.normalization, size=task.size
        )
        counts, mean_loss = evaluate(model, batches, runtime, loss)
        if not math.isfinite(mean_loss):
            raise DivergedError(epoch, mean_loss)
        size = output_size(config.unet, config.data.n_channels, task.size) if task.margin else config.eval_size
        n_pixels = int(counts[0].sum())
        if n_pixels != size[0] * size[1]:
            raise ValueError(f"eval_size is {size}, but the masks have {n_pixels} pixels")
        scores = SCORES[config.study.metric](PixelCounts.from_columns(counts)).astype(np.float32)
        progress.counts, held_out = counts, _mean_scores(counts, mean_loss)
    elif not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
        # Without held-out images, nothing else detects that the last step made weights NaN or infinite.
        raise DivergedError(epoch, math.nan)
    progress.scores = np.vstack([*progress.scores, scores])
    return held_out


def _mean_scores(counts: npt.NDArray[np.int64], loss: float) -> Scores:
    columns = PixelCounts.from_columns(counts)
    return Scores(loss, *(float(SCORES[name](columns).mean()) for name in ("dice", "jaccard", "accuracy")))


def lr_factor(config: TrainConfig, step: int, n_steps: int) -> float:
    """Return the factor by which `config.lr` is multiplied in step `step`, counted from 0. A fit has `n_steps` steps.

    The cosine schedule falls from 1 at step 0 to 0 at step n_steps, which is never reached (Loshchilov and Hutter
    2017, without restarts). The factor depends only on the step, so there is no scheduler state to save.
    """
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * step / n_steps))


def make_optimizer(
    config: TrainConfig, parameters: Iterable[nn.Parameter], device: torch.device
) -> torch.optim.Optimizer:
    """Return SGD with momentum, or AdamW with torch's default betas, for `parameters` on `device`.

    On CPU and CUDA the optimizer is fused: one kernel updates all parameters. On CUDA the loss scaler can then skip a
    step without waiting for the device.
    """
    fused = device.type in ("cpu", "cuda")
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": fused}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **options)
    return torch.optim.SGD(parameters, momentum=config.momentum, **options)


def _is_compiled(task: FitTask, runtime: Runtime) -> bool:
    """Return whether to compile the network. `auto` compiles only long fits on CUDA.

    On a CPU, compiling the UNet for 64x64 and 128x128 took more than a minute. Afterwards, its steps were no faster
    in bf16 and at most 10 % faster in float32. Raises DeviceError if `compile` is "on" and torch.compile cannot work
    on the device.
    """
    reason = devices.why_no_compile(runtime.device)
    if runtime.compile == "on" and reason is not None:
        raise DeviceError(reason)
    if runtime.compile == "auto" and runtime.device.type == "cuda" and reason is None:
        config = task.config
        n_images = config.train.epochs * task.steps_per_epoch * task.images_per_step
        return n_images * training_flops(config.unet, config.data.n_channels, *task.size) >= COMPILED_FLOPS
    return runtime.compile == "on"
