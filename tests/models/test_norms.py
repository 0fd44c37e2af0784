from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hpsearch.models import unet
from hpsearch.models.unet import LANES, BatchNorm, ImageNorm

NARROW = [(torch.float32, 2), (torch.float32, 4), (torch.bfloat16, 4), (torch.bfloat16, 8)]
"""Types and channels that do not fill a vector."""


def maps(channels: int, dtype: torch.dtype = torch.float32, batch: int = 4, size: int = 64, seed: int = 0) -> Tensor:
    """Feature maps that are far from being normalised, in channels_last."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, size, size, generator=generator)
    x = x * torch.linspace(0.5, 3, channels)[:, None, None] + torch.linspace(-4, 5, channels)[:, None, None]
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def layers(channels: int) -> tuple[BatchNorm, nn.BatchNorm2d]:
    """Ours in float32, and torch's in float64, with the same uneven scales and shifts."""
    ours = BatchNorm(channels)
    with torch.no_grad():
        ours.weight.copy_(torch.linspace(0.5, 2, channels))
        ours.bias.copy_(torch.linspace(-1, 1, channels))
    theirs = nn.BatchNorm2d(channels).double()
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    return ours, theirs


def is_ours(layer: BatchNorm, x: Tensor) -> bool:
    return "_NarrowBatchNorm" in type(layer(x.detach().requires_grad_()).grad_fn).__name__


@pytest.mark.parametrize(("dtype", "channels"), NARROW)
def test_narrow_maps_are_normalised_as_torch_does_it(dtype: torch.dtype, channels: int) -> None:
    x = maps(channels, dtype, batch=8)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours, theirs = layers(channels)
    assert is_ours(copy.deepcopy(ours), x)
    found = []
    for layer, given in ((ours, x), (theirs, x.double())):
        given = given.requires_grad_()
        y = layer(given)
        y.backward(grad.to(y.dtype))
        layer.eval()
        found.append([y.detach(), given.grad, layer.weight.grad, layer.bias.grad, layer(given).detach()])
        found[-1] += [layer.running_mean, layer.running_var, layer.num_batches_tracked]
    # Only what is as large as the maps is rounded to their type.
    rounding = 2e-6 if dtype == torch.float32 else 8e-3
    for i, (value, reference) in enumerate(zip(*found, strict=True)):
        tolerance = rounding if i in (0, 1, 4) else 2e-5
        assert value is not None
        assert reference is not None
        error = (value.double() - reference.double()).abs().max()
        assert error <= 4 * tolerance * reference.abs().max(), i
    assert found[0][0].dtype == dtype


def test_the_result_may_be_changed_in_place_as_relu_does() -> None:
    x = maps(4).requires_grad_()
    layer = BatchNorm(4)
    torch.relu_(layer(x)).sum().backward()
    given = x.detach().double().requires_grad_()
    torch.relu_(nn.BatchNorm2d(4).double()(given)).sum().backward()
    assert x.grad is not None
    assert given.grad is not None
    torch.testing.assert_close(x.grad.double(), given.grad, rtol=1e-4, atol=1e-5)


def test_a_gradient_in_another_layout_is_understood() -> None:
    x, layer = maps(4), BatchNorm(4)
    grads = []
    for memory_format in (torch.channels_last, torch.contiguous_format):
        given = x.clone().requires_grad_()
        layer(given).backward(maps(4, seed=2).contiguous(memory_format=memory_format))
        assert given.grad is not None
        grads.append(given.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(maps(32), id="wide maps"),
        pytest.param(maps(3), id="channels that do not divide the lanes"),
        pytest.param(maps(4).contiguous(), id="plane by plane"),
        pytest.param(maps(4, size=8), id="small maps"),
        pytest.param(maps(4, batch=1, size=129)[:, :, :, :128], id="a part of larger maps"),
    ],
)
def test_maps_that_gain_nothing_are_left_to_torch(x: Tensor) -> None:
    channels = x.shape[1]
    ours, theirs = BatchNorm(channels), nn.BatchNorm2d(channels)
    assert not is_ours(copy.deepcopy(ours), x)
    assert torch.equal(ours(x), theirs(x))


def test_the_lanes_are_whole_vectors_of_every_processor() -> None:
    # 64 bytes are the widest vectors there are; bf16 takes 2 of them a number.
    assert LANES * 2 % 64 == 0


@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_is_standardised_by_itself(channels: int) -> None:
    x = maps(channels, size=45)[..., :31]
    x[1] *= 7
    x[2] += 3
    double = x.double()
    mean, std = double.mean((2, 3), keepdim=True), double.std((2, 3), keepdim=True, correction=0)
    found = ImageNorm()(x)
    assert (found - (double - mean) / std).abs().max() < 1e-3
    assert found.is_contiguous(memory_format=torch.channels_last)
    half = ImageNorm()(x.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert (half - found).abs().max() < 0.05


def test_an_image_that_is_nearly_of_one_colour_is_not_blown_up() -> None:
    """At a deviation of 0.01, where images run from 0 to 1 before normalisation, half of the variance is eps."""
    x = 0.3 + 0.01 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(8, 8)[None, None]
    found = ImageNorm()(x.contiguous(memory_format=torch.channels_last))
    assert float(found.std(correction=0)) == pytest.approx(0.5**0.5, rel=1e-3)


def test_an_image_of_one_colour_becomes_nothing() -> None:
    flat = torch.full((2, 3, 20, 20), 1.7).contiguous(memory_format=torch.channels_last)
    assert ImageNorm()(flat).abs().max() < 1e-3
    # In float32 the variance of large numbers can come out below 0.
    assert bool(ImageNorm()(1868.39208984375 * torch.ones(1, 1, 20, 20)).isfinite().all())


def test_the_variance_that_is_kept_is_the_unbiased_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unet, "NARROW_NUMBERS", 64)
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last)
    ours, theirs = BatchNorm(4), nn.BatchNorm2d(4)
    assert is_ours(copy.deepcopy(ours), x)
    ours(x), theirs(x)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
