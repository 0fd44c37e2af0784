"""A dry run against the arithmetic of the UNet, which other tests compare with what torch does."""

from __future__ import annotations

import inspect
import itertools
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from torch import nn

from hpsearch.config.model import UNetConfig
from hpsearch.models import memory, shapes
from hpsearch.models import network as networks
from hpsearch.models.memory import Step

NAMES = ("n_parameters", "training_flops", "training_memory", "uses_batch_statistics", "why_impossible")
dry_run = SimpleNamespace(**{name: inspect.unwrap(getattr(networks, name)) for name in NAMES})
"""The functions that answer for any network, without the arithmetic of the UNet."""

CONFIGS = [
    UNetConfig(base_channels=4, depth=depth, norm=norm)  # type: ignore[arg-type]
    for depth, norm in itertools.product([1, 3], ["none", "batch", "group", "instance"])
]


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_parameters_and_flops_are_those_of_the_arithmetic(config: UNetConfig) -> None:
    assert dry_run.n_parameters(config, 3) == shapes.n_parameters(config, 3)
    assert dry_run.training_flops(config, 3, 40, 48) == shapes.training_flops(config, 3, 40, 48)
    assert dry_run.uses_batch_statistics(config) == (config.norm == "batch")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_memory_is_close_to_the_arithmetic(
    config: UNetConfig, precision: str, optimizer: Literal["sgd", "adamw"]
) -> None:
    step = Step(batch_size=8, precision=precision, optimizer=optimizer, device="cuda")
    found = dry_run.training_memory(config, 3, 64, 64, step)
    expected = memory.training_memory(config, 3, 64, 64, step)
    assert 0.8 < found.total / expected.total < 1.5
    assert (found.weights, found.optimizer) == (expected.weights, expected.optimizer)


def test_memory_grows_with_the_batch() -> None:
    config = UNetConfig(base_channels=4, depth=2)
    steps = [Step(batch_size=n, precision="float32") for n in (2, 16)]
    totals = [dry_run.training_memory(config, 3, 64, 64, step).total for step in steps]
    assert totals[1] > 6 * totals[0]


def test_the_reason_is_what_the_network_reports() -> None:
    config = UNetConfig(base_channels=2, depth=2, stacking=1)
    assert dry_run.why_impossible(config, 3, 32, 32) is None
    assert dry_run.why_impossible(config, 3, 4, 4, batch_size=2) is None
    reason = dry_run.why_impossible(config, 3, 4, 4, batch_size=1)
    assert reason is not None
    assert reason.startswith("network unet cannot take images of 4x4: Expected more than 1 value per channel")


def test_logits_of_another_shape_are_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "_model", lambda config, in_channels: nn.Conv2d(3, 2, 3, device="meta"))
    reason = dry_run.why_impossible(UNetConfig(base_channels=7), 3, 32, 32)
    assert reason == "network unet returns logits of shape (2, 2, 30, 30), expected (2, 1, 32, 32)"


def test_a_dry_run_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    dry_run.training_flops(UNetConfig(base_channels=3, depth=1), 3, 32, 32)
    assert torch.equal(torch.get_rng_state(), before)
