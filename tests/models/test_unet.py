"""The UNet: its parts, its sizes, its alignment, and that its faster forms are the same functions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from hpsearch.config.model import UNetConfig
from hpsearch.models.shapes import why_impossible
from hpsearch.models.unet import ConvolutionBlock, UNet, Up, UpSampling


def _images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("base_channels", "n", "mebibytes"), [(64, 31_031_745, 118.4), (32, 7_760_097, 29.6)])
def test_parameter_counts_are_the_papers(base_channels: int, n: int, mebibytes: float) -> None:
    with torch.device("meta"):
        model = UNet(UNetConfig(base_channels=base_channels, norm="none"), in_channels=3)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert counted == n
    assert round(counted * 4 / 2**20, 1) == mebibytes


def test_unpadded_network_gives_388_for_572() -> None:
    with torch.device("meta"):
        model = UNet(UNetConfig(padding="valid", norm="none"), in_channels=3)
        images = torch.empty(1, 3, 572, 572)
    sides: list[int] = []
    for part in (*model.encoder, *model.decoder):
        part.register_forward_hook(lambda _module, _args, output: sides.append(output.shape[-1]))
    assert model(images).shape == (1, 1, 572, 572)
    sides.clear()
    model.margin = 92
    assert model(images).shape == (1, 1, 388, 388)
    assert sides[:9] == [568, 280, 136, 64, 28, 52, 100, 196, 388]


def test_state_dict_names_say_where_a_weight_belongs() -> None:
    names = set(UNet(UNetConfig(base_channels=2, depth=1, stacking=1), in_channels=1).state_dict())
    assert {
        "encoder.0.0.conv.weight",
        "encoder.1.stack.0.norm.running_mean",
        "decoder.0.up.weight",
        "decoder.0.stack.0.conv.weight",
        "head.bias",
    } <= names
    assert "encoder.0.0.conv.bias" not in names  # the batch normalisation after it has one


@settings(max_examples=30)
@given(
    depth=st.integers(1, 3),
    stacking=st.integers(1, 2),
    kernel_size=st.sampled_from([1, 3, 5]),
    padding=st.sampled_from(["same", "valid"]),
    norm=st.sampled_from(["none", "batch", "group", "instance"]),
    base_channels=st.sampled_from([1, 2, 3]),
    height=st.integers(4, 70),
    width=st.integers(4, 70),
)
def test_logits_have_the_size_of_the_images(height: int, width: int, **settings: object) -> None:
    config = UNetConfig(**settings)  # type: ignore[arg-type]
    model = UNet(config, in_channels=1)
    if why_impossible(config, 1, height, width, batch_size=2) is None:
        logits = model(_images(2, 1, height, width))
        assert logits.shape == (2, 1, height, width)
        logits.sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    elif config.padding == "valid" and why_impossible(config, 1, height, width, batch_size=10**6) is not None:
        with pytest.raises((RuntimeError, ValueError)):
            model(_images(2, 1, height, width))


def _identity(config: UNetConfig) -> UNet:
    """A network that carries channel 0 down to the bottom and up again, and reads no skip."""
    model = UNet(config, in_channels=1)
    middle = config.kernel_size // 2
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d) and name != "head":
                joins = name.startswith("decoder") and name.endswith("stack.0.conv")
                module.weight.zero_()
                module.weight[0, module.out_channels if joins else 0, middle, middle] = 1
            elif isinstance(module, nn.ConvTranspose2d):
                module.weight.zero_()
                module.weight[0, 0] = 1
        model.head.weight.zero_()
        model.head.weight[0, 0] = 1
    return model


def _blocks(height: int, width: int, side: int) -> Tensor:
    """An image (1, 1, height, width) of random blocks of `side` pixels, cut at the right and at the bottom."""
    small = _images(1, 1, -(-height // side), -(-width // side))
    return F.interpolate(small, scale_factor=side, mode="nearest")[..., :height, :width]


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 31), (37, 61), (17, 8), (45, 9)])
@pytest.mark.parametrize("stacking", [1, 2])
def test_every_pixel_comes_back_to_its_place_through_the_bottom(height: int, width: int, stacking: int) -> None:
    images = _blocks(height, width, 8)
    model = _identity(UNetConfig(base_channels=2, depth=3, stacking=stacking, norm="none", input_norm="none"))
    assert torch.equal(model(images), images)


@pytest.mark.parametrize("side", [92, 93, 94, 95, 97, 99])
def test_unpadded_network_keeps_what_it_computes_on_the_images_grid(side: int) -> None:
    # Blocks begin at 6, where the windows of the third pooling do: 2 pixels go, then 2 * 2, then 4 * 2, modulo 8.
    images = _blocks(side + 2, side + 2, 8)[..., 2:, 2:]
    model = _identity(UNetConfig(base_channels=2, depth=3, norm="none", input_norm="none", padding="valid"))
    model.margin = 44
    logits = model(images)
    rows, columns = logits.shape[-2:]
    # 2 * (1 + 2 + 4) on the way down, 8 * 2 at the bottom, 2 * (4 + 2 + 1) on the way up.
    assert torch.equal(logits, images[..., 44 : 44 + rows, 44 : 44 + columns])
    assert rows >= side - 2 * 44


def test_odd_images_get_the_logits_of_the_even_image_that_continues_them() -> None:
    whole = _images(1, 1, 64, 64)
    model = UNet(UNetConfig(base_channels=2, depth=2, norm="none", input_norm="none"), in_channels=1)
    odd = model(whole[..., :51, :49])
    # The network sees 20 pixels far, and up to 3 more by the windows of its poolings.
    assert torch.allclose(odd[..., :27, :25], model(whole)[..., :27, :25], atol=1e-6)


def test_interpolating_logits_is_interpolating_features_before_the_head() -> None:
    model = UNet(UNetConfig(base_channels=4, depth=1, padding="valid"), in_channels=1, seed=3)
    features: list[Tensor] = []
    model.decoder[-1].register_forward_hook(lambda _module, _args, output: features.append(output))
    images = _images(2, 1, 31, 40)
    logits = model(images)
    reports = model.head(F.interpolate(features[0], size=(31, 40), mode="bilinear", align_corners=False))
    assert torch.allclose(logits, reports, atol=1e-6)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_up_sampling_is_the_transposed_convolution(memory_format: torch.memory_format) -> None:
    part = UpSampling(6, 3, kernel_size=2, stride=2).to(memory_format=memory_format)  # type: ignore[call-overload]
    x = _images(2, 6, 5, 7).to(memory_format=memory_format).requires_grad_()
    weights = _images(2, 3, 10, 14, seed=1)
    ours = torch.autograd.grad((part(x) * weights).sum(), (x, part.weight, part.bias))
    plain = F.conv_transpose2d(x, part.weight, part.bias, stride=2)
    assert torch.allclose(part(x), plain, atol=1e-6)
    for a, b in zip(ours, torch.autograd.grad((plain * weights).sum(), (x, part.weight, part.bias)), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("norm", ["none", "batch", "group", "instance"])
def test_a_block_is_convolution_normalisation_relu(norm: str) -> None:
    config = UNetConfig(norm=norm)  # type: ignore[arg-type]
    block = ConvolutionBlock(config, 3, 8)
    x = _images(4, 3, 9, 9)
    y = F.conv2d(x, block.conv.weight, block.conv.bias, padding=1)
    groups = {"none": None, "batch": None, "group": 2, "instance": 8}[norm]
    if norm == "batch":
        y = (y - y.mean((0, 2, 3), keepdim=True)) / (y.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
    elif groups is not None:
        parts = y.view(4, groups, -1)
        parts = (parts - parts.mean(2, keepdim=True)) / (parts.var(2, keepdim=True, correction=0) + 1e-5).sqrt()
        y = parts.view_as(y)
    assert torch.allclose(block(x), y.clamp(min=0), atol=1e-5)


@pytest.mark.parametrize("norm", ["none", "batch", "group", "instance"])
def test_layout_and_bf16_change_no_more_than_rounding(norm: str) -> None:
    config = UNetConfig(base_channels=4, depth=2, norm=norm)  # type: ignore[arg-type]
    model = UNet(config, in_channels=3, seed=1)
    images = _images(2, 3, 21, 30)
    plain = model(images)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = images.to(memory_format=torch.channels_last)
    assert torch.allclose(model(images), plain, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(images)
    assert low.dtype == torch.bfloat16
    assert (low.float() - plain).abs().mean() < 0.03 * plain.std()


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["none", "batch", "group", "instance"])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_compiled_network_is_the_same_function(norm: str, padding: str) -> None:
    config = UNetConfig(base_channels=4, depth=2, norm=norm, padding=padding)  # type: ignore[arg-type]
    model = UNet(config, in_channels=3, seed=1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = _images(2, 3, 61, 66).to(memory_format=torch.channels_last)
    expected = model(images)
    compiled = torch.compile(model)
    assert torch.allclose(compiled(images), expected, atol=1e-4)


def test_standardised_images_are_all_that_the_network_sees_of_exposure() -> None:
    images = _images(2, 3, 32, 32)
    exposed = images * torch.tensor([0.5, 1.5, 3.0]).view(3, 1, 1) - torch.tensor([1.0, 0.0, 2.0]).view(3, 1, 1)
    found = {}
    for input_norm in ("none", "image"):
        model = UNet(UNetConfig(base_channels=4, depth=2, input_norm=input_norm), 3).eval()  # type: ignore[arg-type]
        found[input_norm] = (model(images) - model(exposed)).abs().max()
    assert found["image"] < 0.01 < found["none"]


def test_the_skip_comes_before_the_map_that_is_up_sampled() -> None:
    """Stored weights rely on it: the first input channels of a stack are those of the skip."""
    up = Up(UNetConfig(base_channels=2, depth=1), 4, 2, offset=1)
    joined: list[Tensor] = []
    up.stack.register_forward_pre_hook(lambda _, given: joined.append(given[0]))
    x, skip = _images(1, 4, 3, 3), _images(1, 2, 8, 7, seed=1)
    up(x, skip)
    assert torch.equal(joined[0][:, :2], skip[..., 1:7, 1:7])
    assert torch.equal(joined[0][:, 2:], up.up(x))
