from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hpsearch.config.data import DataConfig
from hpsearch.data.batches import DeviceData, eval_batches
from hpsearch.data.cache import Normalization, open_cache
from hpsearch.data.sample import draw_sample
from hpsearch.data.torch_datasets import RoleDataset
from hpsearch.errors import ConfigError, DatasetError

PLAIN = Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roles")
    draw_sample(folder / "ISIC-2017", n_train=5, n_val=2, n_test=3)
    return folder


@pytest.fixture(scope="module")
def config(folder: Path) -> DataConfig:
    return DataConfig(root=str(folder / "ISIC-2017"), size=(16, 24), cache="memmap", cache_dir=str(folder / "cache"))


@pytest.fixture(scope="module")
def train(config: DataConfig) -> RoleDataset:
    return RoleDataset("search-train", config)


def test_the_roles_are_made_of_the_splits(config: DataConfig, train: RoleDataset) -> None:
    validation, final = RoleDataset("search-validation", config), RoleDataset("final-train", config)
    test = RoleDataset("final-test", config)
    assert train.ids == tuple(f"ISIC_000000{i}" for i in range(5))
    assert validation.ids == ("ISIC_1000000", "ISIC_1000001")
    assert final.ids == train.ids + validation.ids
    assert test.ids == ("ISIC_2000000", "ISIC_2000001", "ISIC_2000002")
    assert [len(each) for each in (train, validation, final, test)] == [5, 2, 7, 3]


def test_an_item_is_a_normalised_image_and_its_binary_mask(train: RoleDataset) -> None:
    image, mask = train[2]
    assert image.shape == (3, 16, 24)
    assert image.dtype == torch.float32
    assert mask.shape == (1, 16, 24)
    assert mask.dtype == torch.uint8
    assert mask.unique().tolist() == [0, 1]
    pixels = torch.stack([image for image, _ in train])
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(pixels.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)


def test_items_are_those_that_a_study_evaluates(train: RoleDataset, config: DataConfig) -> None:
    data = DeviceData(open_cache(train.cache_path))
    (batch,) = eval_batches(data, np.arange(5), batch_size=5, normalization=train.normalization, size=(16, 24))
    for (image, mask), expected_image, expected_mask in zip(train, *batch, strict=True):
        assert torch.equal(image, expected_image)
        assert torch.equal(mask, expected_mask)


def test_held_out_images_are_normalised_like_those_trained_on(config: DataConfig, train: RoleDataset) -> None:
    final = RoleDataset("final-train", config)
    assert RoleDataset("search-validation", config).normalization == train.normalization
    assert RoleDataset("final-test", config).normalization == final.normalization != train.normalization
    assert RoleDataset("final-test", config, normalization=PLAIN).normalization == PLAIN


def test_iteration_ends_and_negative_indices_count_from_the_end(train: RoleDataset) -> None:
    assert len(list(train)) == 5
    assert torch.equal(train[-1][0], train[4][0])
    with pytest.raises(IndexError):
        train[5]


def test_a_data_loader_batches_and_shuffles_it(train: RoleDataset) -> None:
    batches = list(DataLoader(train, batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(0)))
    assert [images.shape for images, _ in batches] == [(2, 3, 16, 24), (2, 3, 16, 24), (1, 3, 16, 24)]
    assert [masks.shape[1:] for _, masks in batches] == [(1, 16, 24)] * 3


def test_a_copy_in_a_worker_reads_the_same_without_carrying_the_pixels(train: RoleDataset) -> None:
    expected = train[1][0]
    pickled = pickle.dumps(train)
    assert len(pickled) < 5000
    assert torch.equal(pickle.loads(pickled)[1][0], expected)


def test_a_forked_worker_opens_the_cache_anew(train: RoleDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, before = train[1][0], train._data()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert train._data() is not before
    assert torch.equal(train[1][0], expected)


def test_grayscale_images_have_one_channel(config: DataConfig) -> None:
    gray = RoleDataset("search-train", replace(config, color="grayscale"))
    assert gray.color == "grayscale"
    assert gray[0][0].shape == (1, 16, 24)
    assert len(gray.normalization.mean) == 1


def test_a_normalization_of_another_number_of_channels_is_refused(config: DataConfig) -> None:
    with pytest.raises(ConfigError, match="normalization has 3 channels, images of color 'grayscale' have 1"):
        RoleDataset("final-test", replace(config, color="grayscale"), normalization=PLAIN)


def test_a_role_can_be_limited_to_its_first_images(config: DataConfig, train: RoleDataset) -> None:
    few = RoleDataset("search-train", config, n=2, normalization=PLAIN)
    assert few.ids == train.ids[:2]
    assert torch.equal(few[1][1], train[1][1])
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        RoleDataset("search-train", config, n=0)


def test_crops_are_random_for_training_and_central_for_scoring(config: DataConfig) -> None:
    crops = replace(config, match="crop")
    train = RoleDataset("search-train", crops, normalization=PLAIN)
    validation = RoleDataset("search-validation", crops, normalization=PLAIN)
    cache = open_cache(train.cache_path)
    assert cache.has_held_out_view
    pool = np.arange(len(cache))
    drawn, centre = (
        torch.from_numpy(cache.read(pool, held_out=out)[0]).movedim(-1, 1) / 255 for out in (False, True)
    )
    assert not torch.equal(drawn, centre)
    torch.testing.assert_close(torch.stack([image for image, _ in train]), drawn[:5], atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.stack([image for image, _ in validation]), centre[5:], atol=1e-6, rtol=0)
    (batch,) = eval_batches(DeviceData(cache), pool, batch_size=9, normalization=PLAIN, size=(16, 24))
    torch.testing.assert_close(batch.images, centre, atol=1e-6, rtol=0)


def test_an_unknown_role_and_a_role_without_images_are_refused(folder: Path, config: DataConfig) -> None:
    with pytest.raises(ConfigError, match="'train'; known: search-train, search-validation"):
        RoleDataset("train", config)  # type: ignore[arg-type]
    draw_sample(folder / "no-validation", n_train=2, n_val=0, n_test=1)
    with pytest.raises(DatasetError, match="no images for the role search-validation"):
        RoleDataset("search-validation", replace(config, root=str(folder / "no-validation")))
