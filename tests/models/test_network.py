from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from hpsearch.config import values
from hpsearch.config.model import UNetConfig
from hpsearch.models import network as networks
from hpsearch.models.memory import Step, training_memory
from hpsearch.models.network import build_network, margin_of
from hpsearch.models.unet import UNet


@pytest.fixture
def flat(monkeypatch: pytest.MonkeyPatch) -> UNetConfig:
    """The configuration of a network with two convolutions that offers nothing but `build`."""

    def build(config: UNetConfig, in_channels: int) -> nn.Module:
        inner = nn.Conv2d(in_channels, config.base_channels, 3, padding=1)
        return nn.Sequential(inner, nn.ReLU(), nn.Conv2d(config.base_channels, 1, 3, padding=1))

    module = ModuleType("hpsearch.models.networks.flat")
    module.build = build  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(values, "module_names", lambda folder: ("flat", "unet"))
    return UNetConfig(network="flat", base_channels=5)


def test_the_default_network_is_the_unet_of_the_seed() -> None:
    config = UNetConfig(base_channels=2, depth=1)
    model = build_network(config, 3, seed=4)
    expected = UNet(config, 3, seed=4).state_dict()
    assert type(model) is UNet
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_the_seed_decides_the_weights_and_the_global_generator_is_left_alone(flat: UNetConfig) -> None:
    torch.manual_seed(9)
    before = torch.get_rng_state()
    first, again, other = (build_network(flat, 3, seed=seed).state_dict()["0.weight"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_margin_leaves_the_logits_unstretched() -> None:
    config = UNetConfig(base_channels=1, depth=1, stacking=1, padding="valid", norm="none")
    images = torch.zeros(1, 3, 40, 40)
    assert margin_of(build_network(config, 3)) == 0
    assert build_network(config, 3)(images).shape == (1, 1, 40, 40)
    model = build_network(config, 3, margin=networks.output_margin(config))
    assert margin_of(model) == networks.output_margin(config)
    assert tuple(model(images).shape[-2:]) == networks.output_size(config, 3, (40, 40))


def test_a_network_with_build_alone_is_measured(flat: UNetConfig) -> None:
    n_weights = 27 * 5 + 45
    assert networks.n_parameters(flat, 3) == n_weights + 6
    # Output and gradient of the weight of both layers, gradient of the input of the second.
    assert networks.training_flops(flat, 3, 20, 30) == 2 * 20 * 30 * (2 * 27 * 5 + 3 * 45)
    assert networks.why_impossible(flat, 3, 1, 1, batch_size=1) is None
    assert networks.describe(flat) == "flat"
    assert not networks.uses_batch_statistics(flat)
    assert networks.layer_costs(flat, 3, 32, 32, Step(batch_size=2, precision="float32")) == []
    assert (networks.output_margin(flat), networks.output_size(flat, 3, (8, 9))) == (0, (8, 9))
    memory = networks.training_memory(flat, 3, 32, 32, Step(batch_size=2, precision="float32", momentum=0))
    # Images and the output of the ReLU, which the second convolution saves.
    assert memory.activations == 4 * 2 * 32 * 32 * (3 + 5)
    assert (memory.weights, memory.optimizer) == (4 * (n_weights + 6), 0)


def test_arithmetic_of_the_network_is_preferred_to_a_dry_run() -> None:
    config = UNetConfig(base_channels=4, depth=2)
    step = Step(batch_size=4, precision="bf16", device="cuda")
    assert networks.training_memory(config, 3, 64, 64, step) == training_memory(config, 3, 64, 64, step)


def test_the_costs_of_the_unet_need_no_torch() -> None:
    code = (
        "import sys; from hpsearch.config.model import UNetConfig as C;"
        "from hpsearch.models import network as c, memory as m;"
        "c.why_impossible(C(), 3, 64, 64), c.n_parameters(C(), 3), c.training_flops(C(), 3, 64, 64);"
        "c.training_memory(C(), 3, 64, 64, m.Step(batch_size=2, precision='bf16')); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
