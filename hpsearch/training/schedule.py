"""The learning rate of every step, and the optimizer that takes it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from hpsearch.config.train import TrainConfig


def lr_factor(config: TrainConfig, step: int, n_steps: int) -> float:
    """What `config.lr` is multiplied by in step `step` (from 0) of `n_steps` of the whole fit.

    Cosine: half a period from 1 at step 0 towards 0 at step n_steps, which is never taken (Loshchilov and Hutter
    2017, without restarts). A function of the step alone, so that there is no scheduler state to save.
    """
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * step / n_steps))


def set_lr_(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the learning rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def make_optimizer(
    config: TrainConfig, parameters: Iterable[nn.Parameter], device: torch.device
) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW with torch's betas, over `parameters` on `device`.

    Fused where torch has it: one kernel for all parameters, and on CUDA it is also what lets the loss scaler skip a
    step without asking the device.
    """
    fused = device.type in ("cpu", "cuda")
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=fused)
    return torch.optim.SGD(
        parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=fused
    )
