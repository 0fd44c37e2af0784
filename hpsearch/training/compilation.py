"""torch.compile for a fit: whether it saves time, and the compiled network."""

import logging

import torch
from torch import nn

from hpsearch.errors import DeviceError
from hpsearch.models.costs import training_flops
from hpsearch.training import runtime as devices
from hpsearch.training.evaluation import Forward
from hpsearch.training.runtime import Runtime
from hpsearch.training.task import FitTask

logger = logging.getLogger(__name__)

COMPILED_FLOPS = 2e17
"""Smallest work of a fit that `train.compile = "auto"` compiles on CUDA: 20 minutes at a fifth of the peak of an
H200, and longer on smaller GPUs, compared with one or two minutes of compilation."""


def compiled_if_useful(model: nn.Module, task: FitTask, runtime: Runtime) -> Forward:
    """Return the compiled network where compilation saves time or is required, otherwise `model`.

    Raises DeviceError if compilation is required and fails.
    """
    return _compiled(model, task, runtime) if _is_compiled(task, runtime) else model


def _is_compiled(task: FitTask, runtime: Runtime) -> bool:
    """Return whether to compile. `auto` never compiles on a CPU.

    For the UNet at 64x64 and 128x128 compilation took more than a minute on a CPU. Steps in bf16 were then as fast as
    before and those in float32 at most 10 % faster.
    """
    reason = devices.why_no_compile(runtime.device)
    if runtime.compile == "on" and reason is not None:
        raise DeviceError(reason)
    if runtime.compile != "auto":
        return runtime.compile == "on"
    if reason is not None or runtime.device.type != "cuda":
        return False
    config = task.config
    n_images = config.train.epochs * task.steps_per_epoch * sum(task.part_sizes)
    return n_images * training_flops(config.unet, config.data.n_channels, *task.size) >= COMPILED_FLOPS


def _compiled(model: nn.Module, task: FitTask, runtime: Runtime) -> Forward:
    """Compile the network by a trial step that leaves no trace in it; with `auto` a failure returns it as it is."""
    compiled: Forward = torch.compile(model, dynamic=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.zeros(task.part_sizes[0], task.config.data.n_channels, *task.size, device=runtime.device)
    model.train()
    try:
        with runtime.autocast():
            logits = compiled(images.to(memory_format=torch.channels_last))
        logits.float().sum().backward()  # type: ignore[no-untyped-call]
    except Exception as error:
        if devices.is_out_of_memory(error):
            raise
        if runtime.compile == "on":
            raise DeviceError(f"torch.compile failed on {runtime.device}: {error}") from error
        logger.warning("torch.compile failed, continuing without it: %s", error)
        compiled = model
    model.zero_grad(set_to_none=True)
    model.load_state_dict(before)
    return compiled
