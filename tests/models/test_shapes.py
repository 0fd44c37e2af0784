"""The arithmetic of shapes, parameters and FLOPs, against the network itself and the paper's figures."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hpsearch.config.model import UNetConfig
from hpsearch.models.shapes import (
    layers,
    n_parameters,
    norm_groups,
    skip_offset,
    training_flops,
    why_impossible,
)
from hpsearch.models.unet import UNet

configs = st.builds(
    UNetConfig,
    base_channels=st.sampled_from([1, 2, 5]),
    depth=st.integers(1, 4),
    stacking=st.integers(1, 3),
    kernel_size=st.sampled_from([1, 3, 5]),
    padding=st.sampled_from(["same", "valid"]),
    norm=st.sampled_from(["none", "batch", "group", "instance"]),
)
sides = st.integers(1, 100)


@settings(max_examples=30)
@given(config=configs, in_channels=st.sampled_from([1, 3]), height=sides, width=sides)
def test_every_layer_has_the_shape_the_network_gives_it(
    config: UNetConfig, in_channels: int, height: int, width: int
) -> None:
    if why_impossible(config, in_channels, height, width):
        return
    model = UNet(config, in_channels)
    seen: dict[str, tuple[int, ...]] = {}
    parameters: dict[str, int] = {}
    expected = layers(config, in_channels, height, width)
    for layer in expected:
        if layer.kind != "interpolation":
            module = model.get_submodule(layer.name)
            parameters[layer.name] = sum(parameter.numel() for parameter in module.parameters())
            module.register_forward_hook(
                lambda _module, _args, output, name=layer.name: seen.update({name: tuple(output.shape)})
            )
    logits = model(torch.empty(2, in_channels, height, width))
    if expected[-1].kind == "interpolation":
        seen["interpolation"] = tuple(logits.shape)
        parameters["interpolation"] = 0
    assert seen == {layer.name: (2, layer.channels, layer.height, layer.width) for layer in expected}
    assert parameters == {layer.name: layer.n_parameters for layer in expected}
    assert n_parameters(config, in_channels) == sum(parameter.numel() for parameter in model.parameters())


@settings(max_examples=6)
@given(config=configs, in_channels=st.sampled_from([1, 3]), height=sides, width=sides)
def test_flops_are_those_that_torch_counts(config: UNetConfig, in_channels: int, height: int, width: int) -> None:
    if why_impossible(config, in_channels, height, width):
        return
    model = UNet(config, in_channels)
    images = torch.zeros(2, in_channels, height, width)
    with FlopCounterMode(display=False) as forward:
        logits = model(images)
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    n_forward, n_backward = forward.get_total_flops(), backward.get_total_flops()
    assert 2 * sum(layer.flops for layer in layers(config, in_channels, height, width)) == n_forward
    assert 2 * training_flops(config, in_channels, height, width) == n_forward + n_backward


def test_a_training_step_of_the_report_is_226_gflop_an_image() -> None:
    config = UNetConfig(base_channels=32, padding="valid", norm="none")
    assert int(training_flops(config, 3, 572, 572) / 1e9) == 226
    with torch.device("meta"):
        model = UNet(config, in_channels=3)
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 572, 572, device="meta")).sum().backward()
    assert counter.get_total_flops() == training_flops(config, 3, 572, 572)


def test_the_papers_network_by_hand() -> None:
    found = layers(UNetConfig(padding="valid", norm="none"), 3, 572, 572)
    encoder = [570, 568, 284, 282, 280, 140, 138, 136, 68, 66, 64, 32, 30, 28]
    decoder = [56, 54, 52, 104, 102, 100, 200, 198, 196, 392, 390, 388]
    assert [layer.height for layer in found] == [*encoder, *decoder, 388, 572]
    assert [layer.channels for layer in found if layer.kind == "up"] == [512, 256, 128, 64]
    assert sum(layer.n_parameters for layer in found) == 31_031_745


def test_skips_are_cropped_as_in_the_paper() -> None:
    """From 568, 280, 136 and 64 pixels a side to 392, 200, 104 and 56, in the centre."""
    config = UNetConfig(padding="valid", norm="none")
    assert [skip_offset(config, stage) for stage in range(4)] == [
        (have - want) // 2 for have, want in ((568, 392), (280, 200), (136, 104), (64, 56))
    ]


def test_there_are_27_layers_and_the_interpolation_is_the_28th() -> None:
    assert len(layers(UNetConfig(padding="valid"), 3, 572, 572)) == 28
    assert len(layers(UNetConfig(padding="same"), 3, 571, 333)) == 27


@settings(max_examples=30)
@given(config=configs, height=sides, width=sides, batch_size=st.sampled_from([1, 2]))
def test_what_is_possible_trains(config: UNetConfig, height: int, width: int, batch_size: int) -> None:
    reason = why_impossible(config, 1, height, width, batch_size=batch_size)
    if reason is None:
        model = UNet(config, 1)
        model(torch.zeros(batch_size, 1, height, width)).sum().backward()
        return
    sentence, _, advice = reason.partition("; images must be at least ")
    assert sentence.startswith(("encoder.", "decoder."))
    if advice:
        side = int(advice.partition("x")[0])
        assert why_impossible(config, 1, side, side, batch_size=batch_size) is None
        assert why_impossible(config, 1, side - 1, side - 1, batch_size=batch_size) is not None


@pytest.mark.parametrize(
    ("config", "side", "batch_size", "words"),
    [
        (UNetConfig(padding="valid"), 100, 2, "cannot apply a 3x3 convolution without padding to a map of 1x1"),
        (
            UNetConfig(padding="valid"),
            4,
            2,
            "encoder.0.1 cannot apply a 3x3 convolution without padding to a map of 2x2",
        ),
        (
            UNetConfig(depth=5),
            16,
            2,
            "encoder.5.pool cannot halve a map of 1x1; images must be at least 17x17",
        ),
        (UNetConfig(depth=4, norm="instance"), 16, 2, "encoder.4.stack.0 has a map of 1x1, too small for instance"),
        (UNetConfig(depth=4, norm="batch"), 16, 1, "too small for batch normalisation to compute a variance"),
    ],
)
def test_the_reason_names_layer_and_sizes(config: UNetConfig, side: int, batch_size: int, words: str) -> None:
    reason = why_impossible(config, 3, side, side, batch_size=batch_size)
    assert reason is not None
    assert words in reason


def test_batch_normalisation_of_single_values_is_possible_with_two_images() -> None:
    config = UNetConfig(depth=4, base_channels=2)
    assert why_impossible(config, 3, 16, 16, batch_size=2) is None
    assert why_impossible(config, 3, 16, 16) is None
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        UNet(config, 3)(torch.zeros(1, 3, 16, 16))


def test_group_normalisation_of_a_single_pixel_is_possible_with_several_channels_a_group() -> None:
    # 4 -> 2 -> 1, with 8 groups of 4 channels at the bottom.
    config = UNetConfig(base_channels=8, depth=2, norm="group")
    assert why_impossible(config, 3, 4, 4, batch_size=1) is None
    UNet(config, 3).train()(torch.rand(1, 3, 4, 4)).sum().backward()


def test_vanishing_maps_have_no_layers() -> None:
    with pytest.raises(ValueError, match="cannot halve a map of 1x1"):
        layers(UNetConfig(padding="valid"), 3, 64, 64)


@given(st.integers(1, 4096))
def test_group_normalisation_divides_any_number_of_channels(channels: int) -> None:
    groups = norm_groups(channels)
    assert channels % groups == 0
    assert 1 <= groups <= 32
    assert groups == 1 or channels // groups >= 4
    nn.GroupNorm(groups, channels, device="meta")


def test_shapes_and_memory_load_no_torch() -> None:
    code = "import sys, hpsearch.models.shapes, hpsearch.models.memory; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
