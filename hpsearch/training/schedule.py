"""Optimizer and learning rate of every step."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from hpsearch.config.train import TrainConfig


def lr_factor(config: TrainConfig, step: int, n_steps: int) -> float:
    """Return the factor of `config.lr` in step `step` (from 0) of the `n_steps` of the whole fit.

    Cosine: half a period from 1 at step 0 to 0 at step n_steps, which is never reached (Loshchilov and Hutter 2017,
    without restarts). It depends on the step alone, so there is no scheduler state to save.
    """
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * step / n_steps))


def make_optimizer(
    config: TrainConfig, parameters: Iterable[nn.Parameter], device: torch.device
) -> torch.optim.Optimizer:
    """Return SGD with momentum, or AdamW with torch's default betas, over `parameters` on `device`.

    It is fused where torch supports it: one kernel updates all parameters. On CUDA the loss scaler can then skip a
    step without waiting for the device.
    """
    fused = device.type in ("cpu", "cuda")
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=fused)
    return torch.optim.SGD(
        parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=fused
    )
