from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hpsearch.config.data import AugmentConfig
from hpsearch.data.augment import to_gray
from hpsearch.data.batches import Batch, DeviceData, ToInput, eval_batches, n_train_batches, train_batches
from hpsearch.errors import CacheError, DatasetError

PLAIN = AugmentConfig(hflip=0)


@dataclass
class FakeCache:
    """Images in memory behind the reading side of a cache."""

    images: NDArray[np.uint8]
    masks: NDArray[np.uint8]
    centre: NDArray[np.uint8] | None = None
    """Other images for scoring."""
    ids: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.ids = tuple(f"image{index}" for index in range(len(self.images)))

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> tuple[int, int]:
        return self.images.shape[1], self.images.shape[2]

    @property
    def has_held_out_view(self) -> bool:
        return self.centre is not None

    def read(
        self, indices: NDArray[np.int64], *, held_out: bool = False
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        if held_out and self.centre is not None:
            return self.centre[indices], 1 - self.masks[indices]
        return self.images[indices], self.masks[indices]


@dataclass(frozen=True)
class Statistics:
    mean: tuple[float, ...] = (0.7, 0.5, 0.4)
    std: tuple[float, ...] = (0.2, 0.1, 0.3)


GRAY = Statistics((0.6,), (0.15,))


def make_cache(n: int = 10, height: int = 8, width: int = 12, seed: int = 0) -> FakeCache:
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (n, height, width, 3), dtype=np.uint8)
    return FakeCache(images, generator.integers(0, 2, (n, height, width), dtype=np.uint8))


def epoch_of(data: DeviceData, *, n: int = 10, epoch: int = 1, seed: int = 3, augment: AugmentConfig = PLAIN, **more):
    settings = {"batch_size": 4, "normalization": Statistics(), "size": data.size}
    return list(train_batches(data, np.arange(n), seed=seed, epoch=epoch, augment=augment, **(settings | more)))


def which(batches: list[Batch], cache: FakeCache) -> list[int]:
    """The cache index of every mask in the batches."""
    return [
        next(i for i, known in enumerate(cache.masks) if np.array_equal(known, mask[0]))
        for batch in batches
        for mask in batch.masks.numpy()
    ]


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a.images, b.images) and torch.equal(a.masks, b.masks) for a, b in zip(first, second, strict=True)
    )


def test_images_are_divided_by_255_and_standardised() -> None:
    cache = make_cache()
    (batch,) = eval_batches(
        DeviceData(cache), np.array([7, 2]), batch_size=8, normalization=Statistics(), size=(8, 12)
    )
    expected = (cache.images[[7, 2]] / 255 - np.array(Statistics.mean)) / np.array(Statistics.std)
    np.testing.assert_allclose(batch.images.numpy(), expected.transpose(0, 3, 1, 2), atol=2e-6)
    assert batch.images.dtype == torch.float32
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch.masks, torch.from_numpy(cache.masks[[7, 2]])[:, None])
    assert batch.masks.dtype == torch.uint8


def test_grayscale_is_the_weighted_sum_of_the_channels() -> None:
    cache = make_cache()
    data = DeviceData(cache)
    (batch,) = eval_batches(data, np.array([1, 3]), batch_size=2, normalization=GRAY, size=(8, 12))
    gray = cache.images[[1, 3]] @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(batch.images.numpy(), ((gray / 255 - 0.6) / 0.15)[:, None], atol=5e-6)
    assert to_gray(torch.full((1, 1, 1, 3), 255, dtype=torch.uint8)).item() == pytest.approx(255)


def test_evaluation_keeps_the_given_order_and_drops_nothing() -> None:
    cache = make_cache()
    indices = np.array([9, 0, 4, 4, 1])
    batches = list(eval_batches(DeviceData(cache), indices, batch_size=2, normalization=Statistics(), size=(8, 12)))
    assert [len(batch.images) for batch in batches] == [2, 2, 1]
    assert which(batches, cache) == indices.tolist()


def test_an_epoch_shows_every_image_at_most_once_and_drops_the_ragged_batch() -> None:
    cache = make_cache()
    batches = epoch_of(DeviceData(cache))
    seen = which(batches, cache)
    assert [len(batch.images) for batch in batches] == [4, 4]
    assert len(set(seen)) == 8
    assert seen != sorted(seen)


def test_a_ragged_batch_is_kept_when_it_is_the_only_one() -> None:
    cache = make_cache()
    (batch,) = epoch_of(DeviceData(cache), n=3)
    assert sorted(which([batch], cache)) == [0, 1, 2]


@pytest.mark.parametrize(("n", "batch_size", "steps"), [(10, 4, 2), (8, 4, 2), (3, 4, 1), (1, 4, 1), (0, 4, 0)])
def test_number_of_steps_is_known_beforehand(n: int, batch_size: int, steps: int) -> None:
    assert n_train_batches(n, batch_size) == steps
    if n:
        assert len(epoch_of(DeviceData(make_cache()), n=n, batch_size=batch_size)) == steps


def test_only_the_given_indices_are_served() -> None:
    cache = make_cache()
    held_in = np.array([8, 1, 5, 2])
    settings = {"batch_size": 2, "augment": PLAIN, "normalization": Statistics(), "size": (8, 12)}
    batches = list(train_batches(DeviceData(cache), held_in, seed=0, epoch=1, **settings))
    assert sorted(which(batches, cache)) == [1, 2, 5, 8]


FULL = AugmentConfig(
    vflip=0.5, rotate=20, scale=0.2, brightness=0.3, contrast=0.3, saturation=0.3, hue=0.2, blur=1, noise=0.1
)


def test_seed_and_epoch_alone_decide_an_epoch() -> None:
    data = DeviceData(make_cache())
    first = epoch_of(data, epoch=5, augment=FULL)
    np.random.default_rng().random(7)
    torch.rand(5)
    epoch_of(data, epoch=4, augment=FULL)
    assert same(first, epoch_of(data, epoch=5, augment=FULL))
    assert not same(first, epoch_of(data, epoch=6, augment=FULL))
    assert not same(first, epoch_of(data, epoch=5, seed=4, augment=FULL))
    assert not same(first, epoch_of(data, epoch=4, seed=4, augment=FULL))


def test_what_happens_to_an_image_does_not_depend_on_the_size_of_batches() -> None:
    data = DeviceData(make_cache(n=12))
    moved = replace(FULL, noise=0)
    few, many = (epoch_of(data, n=12, batch_size=n, augment=moved) for n in (3, 12))
    torch.testing.assert_close(torch.cat([batch.images for batch in few]), many[0].images)
    assert torch.equal(torch.cat([batch.masks for batch in few]), many[0].masks)


def test_drawing_batches_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    epoch_of(DeviceData(make_cache()), augment=FULL)
    assert torch.equal(state, torch.random.get_rng_state())


def test_augmentation_does_not_change_the_cache() -> None:
    cache = make_cache()
    images, masks = cache.images.copy(), cache.masks.copy()
    epoch_of(DeviceData(cache), augment=FULL)
    np.testing.assert_array_equal(cache.images, images)
    np.testing.assert_array_equal(cache.masks, masks)


def test_batches_are_the_same_under_autocast() -> None:
    data = DeviceData(make_cache())
    for normalization in (Statistics(), GRAY):
        plain = epoch_of(data, augment=FULL, normalization=normalization)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert same(plain, epoch_of(data, augment=FULL, normalization=normalization))


def test_a_pool_without_images_cannot_be_trained_on() -> None:
    with pytest.raises(DatasetError, match="no images"):
        epoch_of(DeviceData(make_cache()), n=0)


def test_a_cache_of_another_size_is_refused() -> None:
    data = DeviceData(make_cache())
    with pytest.raises(CacheError, match="8x12, expected 8x8"):
        epoch_of(data, size=(8, 8))
    with pytest.raises(CacheError, match="smaller than 9x12"):
        list(eval_batches(data, np.arange(2), batch_size=2, normalization=Statistics(), size=(9, 12)))


def test_evaluation_on_larger_cached_images_takes_the_centre() -> None:
    cache = make_cache()
    (batch,) = eval_batches(DeviceData(cache), np.arange(2), batch_size=2, normalization=Statistics(), size=(4, 6))
    assert torch.equal(batch.masks[:, 0], torch.from_numpy(cache.masks[:2, 2:6, 3:9]))
    whole = ToInput(Statistics(), "cpu")(torch.from_numpy(cache.images[:2]))
    assert torch.equal(batch.images, whole[:, :, 2:6, 3:9])


def test_images_are_scored_as_they_are_held_out_and_trained_on_as_they_are_not() -> None:
    cache = make_cache()
    cache.centre = 255 - cache.images
    data = DeviceData(cache)
    (scored,) = eval_batches(data, np.arange(10), batch_size=10, normalization=Statistics(), size=(8, 12))
    (trained,) = epoch_of(data, batch_size=10)
    assert torch.equal(scored.images, ToInput(Statistics(), "cpu")(torch.from_numpy(cache.centre)))
    assert torch.equal(scored.masks[:, 0], torch.from_numpy(1 - cache.masks))
    order = which([trained], cache)
    assert torch.equal(trained.images, ToInput(Statistics(), "cpu")(torch.from_numpy(cache.images[order])))


def test_augmented_batches_are_normalised_like_plain_ones() -> None:
    data = DeviceData(make_cache())
    for normalization in (Statistics(), GRAY):
        (plain,) = epoch_of(data, batch_size=10, normalization=normalization)
        # A blur far below one pixel changes nothing, but takes the way through float planes.
        blur = AugmentConfig(hflip=0, blur=1e-3)
        (floats,) = epoch_of(data, batch_size=10, augment=blur, normalization=normalization)
        torch.testing.assert_close(floats.images, plain.images, atol=1e-5, rtol=0)
        assert floats.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(floats.masks, plain.masks)


def test_fresh_crops_of_larger_cached_images_differ_from_epoch_to_epoch() -> None:
    cache = make_cache(height=12, width=16)
    data = DeviceData(cache)
    crops = AugmentConfig(hflip=0, crop=True)
    shown = {epoch: epoch_of(data, batch_size=10, epoch=epoch, augment=crops, size=(8, 8))[0] for epoch in (1, 2)}
    assert shown[1].images.shape == (10, 3, 8, 8)
    assert shown[1].masks.shape == (10, 1, 8, 8)
    windows = torch.from_numpy(cache.masks).unfold(1, 8, 1).unfold(2, 8, 1).reshape(-1, 8, 8)
    for batch in shown.values():
        assert all(bool((windows == mask).all((1, 2)).any()) for mask in batch.masks[:, 0])
    assert {m.numpy().tobytes() for m in shown[1].masks} != {m.numpy().tobytes() for m in shown[2].masks}


def test_masks_for_evaluation_come_from_the_cache_of_their_size() -> None:
    small, large = make_cache(), make_cache(height=16, width=24, seed=1)
    data = DeviceData(small, truth=large)
    batches = list(eval_batches(data, np.array([4, 2, 6]), batch_size=2, normalization=Statistics(), size=(8, 12)))
    assert batches[0].images.shape == (2, 3, 8, 12)
    assert torch.equal(torch.cat([batch.masks for batch in batches])[:, 0], torch.from_numpy(large.masks[[4, 2, 6]]))
    large.centre = 255 - large.images
    (cropped,) = eval_batches(data, np.array([4]), batch_size=2, normalization=Statistics(), size=(8, 12))
    assert torch.equal(cropped.masks[:, 0], torch.from_numpy(1 - large.masks[[4]]))
    with pytest.raises(CacheError, match="contain different images"):
        DeviceData(small, truth=make_cache(n=9))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGpu:
    def test_batches_are_those_of_the_cpu_resident_or_streamed(self) -> None:
        cache = make_cache(n=30)
        # What a GPU gives to the pixel: noise is drawn there, and turned pixels may fall to either neighbour.
        exact = replace(FULL, noise=0, rotate=0, scale=0)
        expected = epoch_of(DeviceData(cache), n=30, augment=exact)
        resident = DeviceData(cache, "cuda")
        streamed = DeviceData(cache, "cuda", resident_share=0)
        assert resident.is_resident
        assert not streamed.is_resident
        for data in (resident, streamed):
            for batch, wanted in zip(epoch_of(data, n=30, augment=exact), expected, strict=True):
                assert batch.images.is_cuda
                torch.testing.assert_close(batch.images.cpu(), wanted.images, atol=1e-4, rtol=0)
                assert torch.equal(batch.masks.cpu(), wanted.masks)

    def test_streamed_batches_survive_slow_consumers(self) -> None:
        cache = make_cache(n=64, height=64, width=64)
        batches = [np.arange(start, start + 4) for start in range(0, 64, 4)]
        kept = []
        for images, _ in DeviceData(cache, "cuda", resident_share=0).stream(batches):
            torch.cuda._sleep(10_000_000)
            kept.append(images.clone())
        assert torch.equal(torch.cat(kept).cpu(), torch.from_numpy(cache.images))
