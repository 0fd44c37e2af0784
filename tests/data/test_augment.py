from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as reference

from hpsearch.config.data import AugmentConfig
from hpsearch.data.augment import Changes, augment_batch, blur, crop, draw_changes, jitter_color_
from hpsearch.errors import CacheError

EVERYTHING = AugmentConfig(
    hflip=0.5, vflip=0.5, rotate=30, scale=0.3, crop=True, brightness=0.3, contrast=0.3, saturation=0.3, hue=0.2,
    blur=1.5, noise=0.1,
)  # fmt: skip
COLOR = AugmentConfig(hflip=0, brightness=0.9, contrast=0.9, saturation=0.9, hue=0.5, blur=2, noise=0.3)
sizes = st.integers(8, 24)
seeds = st.integers(0, 2**32 - 1)


def make_batch(seed: int, n: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Masks of blobs, and images that are white where the mask is 1 and black elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((n, 1, 4, 4), generator=generator)
    masks = (torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear") > 0.5).to(torch.uint8)[:, 0]
    return (masks * 255)[..., None].repeat(1, 1, 1, 3), masks


def random_images(n: int = 3, height: int = 12, width: int = 10) -> Tensor:
    return torch.randint(0, 256, (n, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def draw(config: AugmentConfig, n: int, seed: int, from_size: tuple[int, int], to_size: tuple[int, int]) -> Changes:
    return draw_changes(config, n, np.random.default_rng(seed), from_size=from_size, to_size=to_size)


def planes(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).float()


# What moves


@settings(max_examples=40, deadline=None)
@given(seed=seeds, height=sizes, width=sizes, config=st.sampled_from(["flips", "crops"]), cut=st.integers(0, 4))
def test_masks_move_with_images_to_the_pixel(seed: int, height: int, width: int, config: str, cut: int) -> None:
    size = (height - cut, width - cut // 2) if config == "crops" else (height, width)
    images, masks = make_batch(seed, 5, height, width)
    changes = draw(AugmentConfig(vflip=0.5, crop=config == "crops"), 5, seed, (height, width), size)
    moved, truth = augment_batch(images, masks, changes, size)
    assert moved.shape == (5, *size, 3)
    assert moved.dtype == truth.dtype == torch.uint8
    assert torch.equal(moved, (truth * 255)[..., None].expand_as(moved))


@settings(max_examples=40, deadline=None)
@given(seed=seeds, height=sizes, width=sizes, cut=st.integers(0, 4))
def test_masks_follow_rotation_and_zoom_and_stay_binary(seed: int, height: int, width: int, cut: int) -> None:
    size = (height - cut, width - cut // 2)
    images, masks = make_batch(seed, 5, height, width)
    config = AugmentConfig(vflip=0.5, rotate=180, scale=0.5, crop=True)
    moved, truth = augment_batch(images, masks, draw(config, 5, seed, (height, width), size), size)
    assert truth.dtype == torch.uint8
    assert set(truth.unique().tolist()) <= {0, 1}
    # The nearest of the four pixels that an image's pixel is mixed of has at least a quarter of the weight.
    white = moved / 255
    assert bool((truth[white[:, 0] > 0.76] == 1).all())
    assert bool((truth[white[:, 0] < 0.24] == 0).all())


@settings(max_examples=30, deadline=None)
@given(seed=seeds, height=sizes, width=sizes)
def test_flips_are_their_own_inverse(seed: int, height: int, width: int) -> None:
    images, masks = make_batch(seed, 4, height, width)
    changes = draw(AugmentConfig(hflip=0.5, vflip=0.5), 4, seed, (height, width), (height, width))
    once = augment_batch(images, masks, changes, (height, width))
    again = augment_batch(*once, changes, (height, width))
    assert torch.equal(again[0], images)
    assert torch.equal(again[1], masks)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, height=sizes, width=sizes)
def test_colour_blur_and_noise_never_touch_masks(seed: int, height: int, width: int) -> None:
    images, masks = make_batch(seed, 4, height, width)
    before = masks.clone()
    changed, truth = augment_batch(
        images, masks, draw(COLOR, 4, seed, (height, width), (height, width)), (height, width)
    )
    assert torch.equal(truth, before)
    assert not torch.equal(changed, planes(images))


@settings(max_examples=30, deadline=None)
@given(seed=seeds, height=sizes, width=sizes)
def test_images_stay_between_black_and_white(seed: int, height: int, width: int) -> None:
    images, masks = make_batch(seed, 4, height, width)
    size = (height - 2, width - 3)
    changed, _ = augment_batch(images, masks, draw(EVERYTHING, 4, seed, (height, width), size), size)
    assert changed.shape == (4, 3, *size)
    assert float(changed.min()) >= -1e-3
    assert float(changed.max()) <= 255.001


def test_a_flip_mirrors_the_flagged_images_only() -> None:
    images = random_images()
    masks = images[..., 0] % 2
    flags = torch.tensor([True, False, True])
    for name, axis in (("hflip", 2), ("vflip", 1)):
        moved, truth = augment_batch(images, masks, Changes({name: flags}), (12, 10))
        expected = torch.stack([images[0].flip(axis - 1), images[1], images[2].flip(axis - 1)])
        assert torch.equal(moved, expected)
        assert torch.equal(truth, expected[..., 0] % 2)


@pytest.mark.parametrize("degrees", [-90, 90, 180])
def test_a_quarter_turn_is_exact_and_anticlockwise(degrees: int) -> None:
    images = random_images(height=9, width=9)
    masks = images[..., 1] % 2
    angle = torch.full((3,), math.radians(degrees))
    moved, truth = augment_batch(images, masks, Changes({"rotate": angle}), (9, 9))
    turned = torch.rot90(images, degrees // 90, (1, 2))
    torch.testing.assert_close(moved, planes(turned), atol=0.02, rtol=0)
    assert torch.equal(truth, turned[..., 1] % 2)


def test_any_rotation_agrees_with_torchvision_inside() -> None:
    images = random_images(height=40, width=30)
    angles = torch.tensor([17.0, -33.0, 5.0])
    moved, _ = augment_batch(images, images[..., 0] % 2, Changes({"rotate": angles.deg2rad()}), (40, 30))
    for each, image, angle in zip(moved, planes(images), angles.tolist(), strict=True):
        expected = reference.rotate(image, angle, interpolation=InterpolationMode.BILINEAR)
        torch.testing.assert_close(each[:, 13:27, 8:22], expected[:, 13:27, 8:22], atol=0.05, rtol=0)


def test_beyond_its_border_an_image_goes_on_mirrored() -> None:
    images, masks = torch.full((2, 12, 10, 3), 200, dtype=torch.uint8), torch.ones((2, 12, 10), dtype=torch.uint8)
    changes = Changes({"rotate": torch.tensor([0.7, -2.0]), "scale": torch.tensor([0.6, 0.8])})
    moved, truth = augment_batch(images, masks, changes, (12, 10))
    torch.testing.assert_close(moved, torch.full((2, 3, 12, 10), 200.0))
    assert torch.equal(truth, masks)


def test_zoom_by_two_enlarges_the_middle() -> None:
    images = torch.zeros((1, 16, 16, 3), dtype=torch.uint8)
    images[:, 6:10, 6:10] = 255
    masks = images[..., 0] // 255
    _, truth = augment_batch(images, masks, Changes({"scale": torch.tensor([2.0])}), (16, 16))
    expected = torch.zeros((1, 16, 16), dtype=torch.uint8)
    expected[:, 4:12, 4:12] = 1
    assert torch.equal(truth, expected)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, cut=st.integers(0, 5))
def test_a_warp_that_does_not_turn_equals_cropping_and_flipping(seed: int, cut: int) -> None:
    images, masks = random_images(height=14, width=11), random_images(height=14, width=11)[..., 0] % 2
    size = (14 - cut, 11 - cut)
    changes = draw(AugmentConfig(vflip=0.5, crop=True), 3, seed, (14, 11), size)
    exact, truth = augment_batch(images, masks, changes, size)
    still = Changes({**changes.values, "rotate": torch.zeros(3), "scale": torch.ones(3)})
    warped, warped_truth = augment_batch(images, masks, still, size)
    torch.testing.assert_close(warped, planes(exact), atol=0.01, rtol=0)
    assert torch.equal(warped_truth, truth)


def test_each_image_is_cropped_at_its_own_corner() -> None:
    images = random_images(n=4, height=13, width=17)
    top, left = torch.tensor([0, 5, 2, 4]), torch.tensor([9, 0, 3, 9])
    for batch in (images, images[..., 0].contiguous()):
        expected = torch.stack([batch[i, top[i] : top[i] + 8, left[i] : left[i] + 8] for i in range(4)])
        assert torch.equal(crop(batch, top, left, (8, 8)), expected)


def test_crops_reach_every_corner_and_vary() -> None:
    changes = draw(AugmentConfig(crop=True), 500, 0, (12, 10), (9, 8))
    assert sorted(set(changes.values["top"].tolist())) == [0, 1, 2, 3]
    assert sorted(set(changes.values["left"].tolist())) == [0, 1, 2]


# Colour


@pytest.mark.parametrize(
    ("kind", "adjust", "factors"),
    [
        ("brightness", reference.adjust_brightness, (0.0, 0.6, 1.7)),
        ("contrast", reference.adjust_contrast, (0.0, 0.6, 1.7)),
        ("saturation", reference.adjust_saturation, (0.0, 0.6, 1.7)),
        ("hue", reference.adjust_hue, (-0.5, -0.1, 0.3)),
    ],
)
def test_colour_changes_are_those_of_torchvision(kind: str, adjust: Any, factors: tuple[float, ...]) -> None:
    images = random_images()
    images[0, :4] = 90  # grey: no hue
    images[1, :4] = torch.tensor([200, 200, 30], dtype=torch.uint8)  # two channels are the largest
    changed = jitter_color_(planes(images), {kind: torch.tensor(factors)})
    for each, image, factor in zip(changed, planes(images), factors, strict=True):
        torch.testing.assert_close(each / 255, adjust(image / 255, factor), atol=2e-6, rtol=0)


def test_colour_changes_come_in_the_order_of_their_names() -> None:
    images = random_images()
    factors = {"brightness": 1.3, "contrast": 0.7, "saturation": 1.4, "hue": 0.2}
    changed = jitter_color_(planes(images), {k: torch.full((3,), v) for k, v in factors.items()})
    expected = planes(images) / 255
    for kind, factor in factors.items():
        expected = getattr(reference, f"adjust_{kind}")(expected, factor)
    torch.testing.assert_close(changed / 255, expected, atol=5e-6, rtol=0)


def test_blur_is_that_of_torchvision() -> None:
    images = planes(random_images(height=20, width=24))
    sigma = torch.tensor([0.7, 1.5, 2.0])
    for each, image, s in zip(blur(images, sigma, 6), images, sigma.tolist(), strict=True):
        torch.testing.assert_close(each, reference.gaussian_blur(image, [13, 13], [s, s]), atol=0.01, rtol=0)


def test_blur_of_no_width_changes_nothing() -> None:
    images = planes(random_images())
    torch.testing.assert_close(blur(images, torch.zeros(3), 3), images)


def test_blur_wider_than_the_image_keeps_its_mean_level() -> None:
    flat = torch.full((1, 3, 4, 5), 77.0)
    torch.testing.assert_close(blur(flat, torch.tensor([20.0]), 60), flat)


def test_noise_has_the_deviation_of_its_image() -> None:
    images = torch.full((2, 64, 64, 3), 128, dtype=torch.uint8)
    changes = Changes({"noise": torch.tensor([0.02, 0.1])}, noise_seed=5)
    changed, _ = augment_batch(images, images[..., 0] * 0, changes, (64, 64))
    deviations = (changed - 128).std((1, 2, 3)) / 255
    torch.testing.assert_close(deviations, torch.tensor([0.02, 0.1]), rtol=0.03, atol=0)
    assert torch.equal(changed, augment_batch(images, images[..., 0] * 0, changes, (64, 64))[0])
    # Noise is added after the blur.
    blurred = Changes({**changes.values, "blur": torch.tensor([2.0, 2.0])}, blur_radius=6, noise_seed=5)
    torch.testing.assert_close(augment_batch(images, images[..., 0] * 0, blurred, (64, 64))[0], changed)
    other = augment_batch(images, images[..., 0] * 0, Changes(changes.values, noise_seed=6), (64, 64))[0]
    assert not torch.equal(changed, other)


# What is drawn


def test_everything_that_is_off_stays_off() -> None:
    changes = draw(AugmentConfig(hflip=0), 4, 0, (8, 8), (8, 8))
    assert changes.values == {}
    images, masks = make_batch(0, 4, 8, 8)
    assert augment_batch(images, masks, changes, (8, 8)) == (images, masks)


def test_switching_one_change_on_does_not_change_the_others() -> None:
    all_ = draw(EVERYTHING, 6, 3, (10, 10), (8, 8))
    few = draw(AugmentConfig(hflip=0, hue=0.2, noise=0.1, crop=True), 6, 3, (10, 10), (8, 8))
    for name in ("hue", "noise", "top", "left"):
        assert torch.equal(few.values[name], all_.values[name])
    assert few.noise_seed == all_.noise_seed


def test_draws_lie_within_their_limits_and_use_them() -> None:
    changes = draw(EVERYTHING, 2000, 0, (10, 10), (8, 8))
    limits = {
        "brightness": (0.7, 1.3), "contrast": (0.7, 1.3), "saturation": (0.7, 1.3), "hue": (-0.2, 0.2),
        "rotate": (-math.pi / 6, math.pi / 6), "scale": (0.7, 1.3), "blur": (0, 1.5), "noise": (0, 0.1),
    }  # fmt: skip
    for name, (low, high) in limits.items():
        values = changes.values[name]
        span = high - low
        assert low - 1e-6 <= float(values.min()) <= low + 0.01 * span, name
        assert high - 0.01 * span <= float(values.max()) <= high + 1e-6, name
    assert changes.blur_radius == 5
    flips = draw(AugmentConfig(hflip=0.2, vflip=0.7), 2000, 0, (8, 8), (8, 8))
    for name, probability in (("hflip", 0.2), ("vflip", 0.7)):
        assert float(flips.values[name].float().mean()) == pytest.approx(probability, abs=0.04)


def test_part_of_the_changes_is_that_of_those_images() -> None:
    changes = draw(EVERYTHING, 6, 0, (10, 10), (8, 8))
    part = changes[2:4]
    assert part.values.keys() == changes.values.keys()
    assert torch.equal(part.values["hue"], changes.values["hue"][2:4])
    assert part.noise_seed != changes[4:6].noise_seed


def test_cached_images_of_a_wrong_size_are_refused() -> None:
    with pytest.raises(CacheError, match="are 10x10, expected 8x8"):
        draw(AugmentConfig(), 1, 0, (10, 10), (8, 8))
    with pytest.raises(CacheError, match="are 10x10, expected crops of 8x11"):
        draw(AugmentConfig(crop=True), 1, 0, (10, 10), (8, 11))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("turned", [False, True])
def test_a_gpu_gives_what_the_cpu_gives(turned: bool) -> None:
    config = AugmentConfig(
        vflip=0.5, crop=True, brightness=0.3, contrast=0.3, saturation=0.3, hue=0.2, blur=1.5,
        rotate=30 if turned else 0, scale=0.3 if turned else 0,
    )  # fmt: skip
    images, masks = random_images(8, 40, 40), make_batch(0, 8, 40, 40)[1]
    expected, truth = augment_batch(images, masks, draw(config, 8, 0, (40, 40), (32, 32)), (32, 32))
    changes = draw_changes(config, 8, np.random.default_rng(0), from_size=(40, 40), to_size=(32, 32), device="cuda")
    with torch.autocast("cuda"):
        changed, moved = augment_batch(images.cuda(), masks.cuda(), changes, (32, 32))
    torch.testing.assert_close(changed.cpu(), expected, atol=0.05, rtol=0)
    assert float((moved.cpu() != truth).float().mean()) < 1e-3
