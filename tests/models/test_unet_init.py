"""First weights: against torch's own interpolation, Xavier's and torch's rules; from the seed alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hpsearch.config.model import UNetConfig
from hpsearch.models.unet import UNet, initialize_, interpolation_weight


def test_a_kernel_of_2_interpolates_as_far_as_it_can() -> None:
    x = torch.rand(2, 6, 6, 5)
    up = F.conv_transpose2d(x, interpolation_weight(6, 3), stride=2)
    halves = x.view(2, 2, 3, 6, 5).mean(1)
    assert torch.allclose(up, F.interpolate(halves, scale_factor=2, mode="nearest"), atol=1e-6)
    # On a plane the bilinear interpolation has the same mean in each block of four.
    plane = torch.arange(6.0)[:, None] + 2 * torch.arange(5.0)
    bilinear = F.interpolate(plane[None, None], scale_factor=2, mode="bilinear", align_corners=False)
    weight = interpolation_weight(1, 1)
    means = F.avg_pool2d(F.conv_transpose2d(plane[None, None], weight, stride=2), 2)
    assert torch.allclose(F.avg_pool2d(bilinear, 2)[..., 1:-1, 1:-1], means[..., 1:-1, 1:-1], atol=1e-5)


def test_interpolation_keeps_a_constant() -> None:
    up = F.conv_transpose2d(torch.full((1, 4, 6, 6), 3.0), interpolation_weight(4, 2), stride=2)
    assert torch.equal(up, torch.full((1, 2, 12, 12), 3.0))


def test_each_output_channel_is_the_mean_of_the_input_channels_of_its_number() -> None:
    shown = F.conv_transpose2d(torch.arange(6.0).view(1, 6, 1, 1), interpolation_weight(6, 2), stride=2)
    # 0, 2, 4 and 1, 3, 5
    assert torch.equal(shown[0, :, 0, 0], torch.tensor([2.0, 3.0]))


def test_xavier_convolutions_have_glorots_variance_and_no_bias() -> None:
    model = UNet(UNetConfig(base_channels=32, depth=1, norm="none"), in_channels=3)
    conv = model.encoder[1].stack[1].conv
    bound = math.sqrt(6 / (2 * 64 * 9))
    assert conv.weight.abs().max() <= bound
    assert conv.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert all(not module.bias.any() for module in model.modules() if isinstance(module, nn.Conv2d))


def test_up_sampling_starts_as_interpolation() -> None:
    model = UNet(UNetConfig(base_channels=4, depth=1), in_channels=3)
    assert torch.equal(model.decoder[0].up.weight, interpolation_weight(8, 4))


@pytest.mark.parametrize("part", [nn.Conv2d(7, 5, 3), nn.ConvTranspose2d(6, 3, 2, stride=2)])
def test_torch_init_has_the_distribution_of_torchs_constructors(part: nn.Conv2d | nn.ConvTranspose2d) -> None:
    drawn: dict[str, list[torch.Tensor]] = {"ours": [], "torchs": []}
    for seed in range(200):
        initialize_(part, "torch", seed=seed)
        drawn["ours"].append(torch.cat((part.weight.detach().flatten(), part.bias.detach())))
        part.reset_parameters()
        drawn["torchs"].append(torch.cat((part.weight.detach().flatten(), part.bias.detach())))
    ours, torchs = torch.cat(drawn["ours"]), torch.cat(drawn["torchs"])
    assert ours.abs().max().item() == pytest.approx(torchs.abs().max().item(), rel=1e-3)
    assert ours.std().item() == pytest.approx(torchs.std().item(), rel=0.05)


@pytest.mark.parametrize("init", ["xavier", "torch"])
def test_the_seed_alone_decides_the_weights(init: str) -> None:
    config = UNetConfig(base_channels=2, depth=2, init=init)  # type: ignore[arg-type]
    first = UNet(config, in_channels=3, seed=1).state_dict()
    torch.rand(1)
    again = UNet(config, in_channels=3, seed=1).state_dict()
    other = UNet(config, in_channels=3, seed=2).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_building_a_network_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    UNet(UNetConfig(base_channels=2, depth=1), in_channels=3)
    assert torch.equal(torch.random.get_rng_state(), before)
